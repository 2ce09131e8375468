"""Tensors from and to other programs' files: a stored checkpoint exported, foreign weights imported."""
