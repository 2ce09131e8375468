"""Samples in an order that survives failures."""
