"""Accelerators, fabrics and providers as data: one TOML file per vendor, read when first asked for (ADR 0031)."""
