"""Compiles native/tests with sanitizers and runs it: no Python is involved in what is tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "native"


def _tool(name: str) -> str | None:
    """The build tool beside this Python, else one on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_native_kernels_under_sanitizer_are_clean(sanitizer: str, tmp_path: Path) -> None:
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is missing; `make setup` installs both")
    options = ["-DKTRAIN_NATIVE_TESTS=ON", f"-DKTRAIN_SANITIZE={sanitizer}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _run([cmake, "-S", str(NATIVE), "-B", str(tmp_path), "-G", "Ninja", *options])
    _run([cmake, "--build", str(tmp_path), "--parallel", "2"])
    program = [str(tmp_path / "ktrain_native_tests")]
    if sanitizer == "thread" and (setarch := shutil.which("setarch")):
        # Older runtimes find their shadow memory taken where addresses are randomised widely.
        program = [setarch, "--addr-no-randomize", *program]
    _run(program, env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"})
