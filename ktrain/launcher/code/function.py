"""A function as a file: packed where it was written, opened where it runs, and nowhere else (ADR 0042).

Two files make one: a script of a few lines, and what cloudpickle made of the function behind one line of JSON that says
which Python may open it. Its SHA-256 is an argument of the script, so it stands in the job and not beside the bytes;
it is proven before a byte is unpickled. It is code, and is trusted as code is: never a format, never a tier.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.errors import ConfigError, CorruptionError
from ktrain.launcher.code.preflight import MOST_DATA_BYTES, find_problems
from ktrain.launcher.quantity import show_bytes

SCRIPT = "ktrain_function.py"
FILE = "ktrain_function.bin"
_FORMAT = 1
_SHOWN = 8
_TEXT = b"""\
# Made by ktrain: runs the function that lies beside this file.
import sys
from pathlib import Path

from ktrain.launcher.code.function import run_function

run_function(Path(__file__).parent, *sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class ShippedFunction:
    """A function, ready to be sent."""

    name: str
    data: bytes
    sha256: str

    @property
    def plain_name(self) -> str:
        """Its last part, in characters that a folder may have."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", self.name.rpartition(".")[2]).strip("-") or "function"

    @property
    def command(self) -> tuple[str, ...]:
        """The script and its arguments; where modules of another folder are needed, that folder follows."""
        return (SCRIPT, self.sha256)

    @property
    def files(self) -> dict[str, bytes]:
        """File name -> bytes, all in one folder."""
        return {SCRIPT: _TEXT, FILE: self.data}


def pack_function(
    function: Callable[..., object], args: tuple[object, ...] = (), *, code: Path | None = None
) -> ShippedFunction:
    """Packs a function with its arguments, by value; modules of the folder `code` are left to be imported.

    Raises:
        ConfigError: something that it holds cannot be shipped; the message names each thing, its path and why.
    """
    name = str(getattr(function, "__qualname__", type(function).__name__))
    arguments = {f"argument {at} of {name}": value for at, value in enumerate(args)}
    problems = find_problems({name: function, **arguments}, code=code)
    if problems:
        raise ConfigError(_refusal(name, [str(item) for item in problems]))
    data = _packed(name, functools.partial(function, *args) if args else function)
    return ShippedFunction(name, data, hashlib.sha256(data).hexdigest())


def _packed(name: str, function: Callable[..., object]) -> bytes:
    try:
        import cloudpickle

        pickled: bytes = cloudpickle.dumps(function)
    except ModuleNotFoundError as error:
        raise ConfigError(f"function {name}: the package {error.name} is not there; pip install cloudpickle") from error
    except Exception as error:  # noqa: BLE001 -- code of any class that is pickled
        raise ConfigError(_refusal(name, [f"{type(error).__name__}: {error}"])) from error
    head = {"format": _FORMAT, "function": name, "python": _python(), "cloudpickle": cloudpickle.__version__}
    if len(pickled) > MOST_DATA_BYTES:
        raise ConfigError(_refusal(name, [f"it has {show_bytes(len(pickled))}, {show_bytes(MOST_DATA_BYTES)} at most"]))
    return json.dumps(head).encode() + b"\n" + pickled


def run_function(folder: Path, sha256: str, code: str | None = None) -> None:
    """Opens the function in a folder, and calls it; modules of the folder `code` can be imported by it.

    Raises:
        CorruptionError: the bytes are not those that were launched.
        ConfigError: it was packed by another Python.
    """
    function = open_function((folder / FILE).read_bytes(), sha256, code)
    function()


def open_function(data: bytes, sha256: str, code: str | None = None) -> Callable[[], object]:
    """The function of its bytes. Raises as `run_function` does."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptionError(f"{FILE}: expected SHA-256 {sha256}, found {found}; launch the function again")
    line, _, pickled = data.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    _expect_same(head)
    if code is not None:
        sys.path.insert(1, code)
    import cloudpickle

    function: Callable[[], object] = cloudpickle.loads(pickled)
    return function


def _expect_same(head: dict[str, Any]) -> None:
    """Bytecode is of one minor version; nothing of it is read by another."""
    if head["format"] != _FORMAT:
        raise ConfigError(f"function {head['function']}: it has format {head['format']}, this version reads {_FORMAT}")
    if head["python"] != _python():
        raise ConfigError(
            f"function {head['function']}: it was packed by Python {head['python']}, and this is Python {_python()}; "
            f"launch it from Python {_python()}, run it in an image with {head['python']}, or send a script instead"
        )


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _refusal(name: str, lines: list[str]) -> str:
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    return "\n".join([f"function {name}: it cannot be shipped:", *(f"  {line}" for line in shown)])
