"""A directory of code as one zip: the same files give the same bytes, on any machine at any time."""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ktrain.errors import ConfigError
from ktrain.launcher.code.files import IGNORE_FILE, choose_files
from ktrain.launcher.code.members import MOST_FILES, name_problems
from ktrain.launcher.code.private import is_private_key, is_private_name, private_warnings
from ktrain.launcher.quantity import MIB, show_bytes

MOST_BYTES = 200 * MIB  # of the files, before they are packed
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that zip knows
_LEVEL = 6
_UNIX = 3  # zip's number for the system whose file modes follow
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CodeArchive:
    """The bytes of a zip, and what proves them."""

    data: bytes
    sha256: str
    names: tuple[str, ...]  # relative, with "/"
    warnings: tuple[str, ...] = ()  # what the user should know before it is sent


def pack_code(folder: Path, *, most_bytes: int = MOST_BYTES) -> CodeArchive:
    """Packs the files of a folder that git knows or would add, or all of them where there is no git.

    Raises:
        ConfigError: the folder is none, holds no file, a link, a name that would be refused when it is unpacked, or
            more than the cap.
    """
    if not folder.is_dir():
        raise ConfigError(f"code {folder}: expected a directory; give one that has the script")
    chosen = choose_files(folder)
    if not chosen.names:
        raise ConfigError(f"code {folder}: no file is left to send; look at its ignore files")
    _expect_plain(folder, chosen.names)
    _expect_fits(folder, chosen.names, most_bytes)
    data, private = _zip(folder, chosen.names)
    warnings = (*chosen.warnings, *private_warnings(f"code {folder}", private, IGNORE_FILE))
    return CodeArchive(data, hashlib.sha256(data).hexdigest(), chosen.names, warnings)


def add_files(archive: CodeArchive | None, files: Mapping[str, bytes]) -> CodeArchive:
    """An archive with files in its root that lie in no folder, beside those that it has.

    Raises:
        ConfigError: it has one of that name.
    """
    names = () if archive is None else archive.names
    taken = sorted(set(names) & set(files))
    if taken:
        raise ConfigError(f"code: it has a file {taken[0]!r} of its own; rename that one")
    buffer = io.BytesIO(b"" if archive is None else archive.data)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as file:
        for name, data in sorted(files.items()):
            file.writestr(_member(name, 0o644), data, compresslevel=_LEVEL)
    data = buffer.getvalue()
    warnings = () if archive is None else archive.warnings
    return CodeArchive(data, hashlib.sha256(data).hexdigest(), (*names, *sorted(files)), warnings)


def _expect_plain(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if any((folder / part).is_symlink() for part in _prefixes(name)):
            raise ConfigError(f"code {folder}: {name} is a link or lies below one; send the file itself, or ignore it")
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise ConfigError(f"code {folder}: {name} is no regular file; ignore it in {IGNORE_FILE}")
    for name, problem in name_problems(names):
        raise ConfigError(f"code {folder}: {name!r} {problem}; rename or ignore it")


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: at + 1]) for at in range(len(parts))]


def _expect_fits(folder: Path, names: Sequence[str], most_bytes: int) -> None:
    if len(names) > MOST_FILES:
        raise ConfigError(
            f"code {folder}: {len(names)} files, expected at most {MOST_FILES}; ignore some in {IGNORE_FILE}"
        )
    sizes = {name: (folder / name).lstat().st_size for name in names}
    total = sum(sizes.values())
    if total > most_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
        said = ", ".join(f"{name} ({show_bytes(sizes[name])})" for name in largest)
        raise ConfigError(
            f"code {folder}: {len(sizes)} files have {show_bytes(total)}, expected at most {show_bytes(most_bytes)}; "
            f"the largest are {said}; ignore some in {IGNORE_FILE}, or bring them in an image"
        )


def _zip(folder: Path, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """The archive, and the names of files in it that look private."""
    buffer = io.BytesIO()
    private = []
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as file:
        for name in names:
            path = folder / name
            data = path.read_bytes()
            if is_private_name(name) or is_private_key(data):
                private.append(name)
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            file.writestr(_member(name, mode), data, compresslevel=_LEVEL)
    return buffer.getvalue(), private


def _member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.create_system = _UNIX
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | mode) << 16
    return info
