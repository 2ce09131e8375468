"""The format stands alone: whoever reads a manifest needs no training library."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import ktrain.abc.source, ktrain.format
for module in pkgutil.iter_modules(ktrain.format.__path__, "ktrain.format."):
    importlib.import_module(module.name)
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & {"torch", "ray", "fsspec", "numpy", "safetensors"}))
print(*sorted(name for name in sys.modules if name.startswith("ktrain.format.")))
"""


def test_format_imported_alone_loads_neither_torch_nor_ray_nor_fsspec() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    heavy, modules = done.stdout.splitlines()
    assert heavy == ""
    assert "ktrain.format.record" in modules.split()
