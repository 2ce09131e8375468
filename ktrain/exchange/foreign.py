"""Weights that others wrote, as names, forms and a way to their bytes; here the forms that need no torch.

What another program wrote has no digests: a file is taken as it is, once its header is consistent with its size.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ktrain.errors import ConfigError, CorruptionError, NotFoundError
from ktrain.format import dtype as dtypes
from ktrain.format.payload import HeaderEntry, header_nbytes, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""How Hugging Face names the files of a model, in one file or in several."""

_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")  # an index must not lead a reader anywhere else


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors of a foreign checkpoint.

    Attributes:
        tensors: name -> dtype and shape.
        fill: writes every named tensor's bytes, row by row, into the memory given for it.
        left_out: names of what is no tensor, and is not taken.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    fill: Callable[[Mapping[str, memoryview]], None]
    left_out: tuple[str, ...] = ()


def below(weights: Weights, key: str) -> Weights:
    """The tensors below a name, under the rest of their names.

    Raises:
        ConfigError: there are none.
    """
    prefix = f"{key}."
    taken = {name.removeprefix(prefix): about for name, about in weights.tensors.items() if name.startswith(prefix)}
    if not taken:
        tops = sorted({name.partition(".")[0] for name in weights.tensors})
        raise ConfigError(f"import: there are no tensors below {key!r}; there are {tops[:10]}")

    def fill(targets: Mapping[str, memoryview]) -> None:
        weights.fill({prefix + name: target for name, target in targets.items()})

    others = (name for name in weights.tensors if not name.startswith(prefix))
    return Weights(taken, fill, (*weights.left_out, *others))


def read_safetensors(path: Path) -> Weights:
    """The tensors of one file.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is no safetensors file, or not a whole one.
    """
    return _of_files({path: None})


def read_hf(folder: Path) -> Weights:
    """The tensors of a Hugging Face folder: those of its index, or of its one file.

    Raises:
        NotFoundError: there is neither.
        CorruptionError: index and files differ.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise NotFoundError(f"{folder}: it has neither {INDEX_FILE} nor {SINGLE_FILE}; check the path and --from")
        return read_safetensors(folder / SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{index}: expected an index with a weight_map ({error}); take another copy") from error
    wanted: dict[Path, set[str] | None] = {}
    for name, file in sorted(files.items()):
        if _FILE_NAME.fullmatch(file) is None:
            raise ConfigError(f"{index}: expected names of .safetensors files beside it, found {file[:80]!r}")
        names = wanted.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return _of_files(wanted)


def _of_files(wanted: Mapping[Path, set[str] | None]) -> Weights:
    """Tensors of several files; by file the names that it has to hold, None for whatever it holds."""
    places: dict[str, tuple[Path, HeaderEntry]] = {}
    for path, names in wanted.items():
        found = {entry.key: entry for entry in _header(path)}
        if names is not None and set(found) != names:
            differing = sorted(set(found) ^ names)[:5]
            raise CorruptionError(f"{path}: it and the index differ about the tensors {differing}; take another copy")
        for name, entry in found.items():
            places[name] = (path, entry)

    def fill(targets: Mapping[str, memoryview]) -> None:
        for path in wanted:
            mine = {name: places[name][1] for name in targets if places[name][0] == path}
            with open(path, "rb") as file:
                for name, entry in sorted(mine.items(), key=lambda item: item[1].begin):
                    file.seek(entry.begin)
                    if file.readinto(targets[name]) != entry.end - entry.begin:
                        raise CorruptionError(f"{path}: it was cut short while it was read; take another copy")

    return Weights({name: _form(path, entry) for name, (path, entry) in places.items()}, fill)


def _header(path: Path) -> tuple[HeaderEntry, ...]:
    try:
        with open(path, "rb") as file:
            nbytes = file.seek(0, 2)
            if not nbytes:
                raise CorruptionError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                begin = header_nbytes(memory[:8])
                entries = read_header(memory[:begin]).entries
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"{path}: there is no such file; check the path and --from") from error
    except CorruptionError as error:
        raise CorruptionError(f"{path}: {error}") from error
    end = entries[-1].end if entries else begin
    if end != nbytes:
        raise CorruptionError(f"{path}: expected {end} bytes, as its header says, found {nbytes}; take another copy")
    return entries


def _form(path: Path, entry: HeaderEntry) -> tuple[str, tuple[int, ...]]:
    dtype = dtypes.from_safetensors(entry.dtype)
    if dtype is None:
        raise ConfigError(f"{path}: tensor {entry.key!r}: dtype {entry.dtype} cannot be stored; convert it first")
    return dtype, entry.shape
