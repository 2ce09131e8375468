"""A directory of code as one zip: the same files give the same bytes, on any machine at any time."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import stat
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ktrain.errors import ConfigError
from ktrain.launcher.code.unpack import name_problem
from ktrain.launcher.quantity import MIB, show_bytes

IGNORE_FILE = ".ktrainignore"
MOST_BYTES = 200 * MIB  # of the files, before they are packed
_NEVER = (".git", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints")
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that zip knows
_LEVEL = 6
_UNIX = 3  # zip's number for the system whose file modes follow
_GIT_S = 60.0
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CodeArchive:
    """The bytes of a zip, and what proves them."""

    data: bytes
    sha256: str
    names: tuple[str, ...]  # relative, with "/"


def pack_code(folder: Path, *, most_bytes: int = MOST_BYTES) -> CodeArchive:
    """Packs the files of a folder that git knows or would add, or all of them where there is no git.

    Raises:
        ConfigError: the folder is none, holds no file, a link, a name that would be refused when it is unpacked, or
            more than the cap.
    """
    if not folder.is_dir():
        raise ConfigError(f"code {folder}: expected a directory; give one that has the script")
    names = _chosen(folder)
    if not names:
        raise ConfigError(f"code {folder}: no file is left to send; look at its ignore files")
    _expect_plain(folder, names)
    _expect_fits(folder, names, most_bytes)
    data = _zip(folder, names)
    return CodeArchive(data, hashlib.sha256(data).hexdigest(), tuple(names))


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
    return CodeArchive(data, hashlib.sha256(data).hexdigest(), (*names, *sorted(files)))


def _chosen(folder: Path) -> list[str]:
    """Relative names with `/`, sorted by their bytes."""
    listed = _git_files(folder)
    found = listed if listed is not None else _all_files(folder)
    patterns = _patterns(folder)
    kept = [name for name in found if not _is_ignored(name, patterns)]
    return sorted(set(kept), key=lambda name: name.encode("utf-8", "surrogateescape"))


def _git_files(folder: Path) -> list[str] | None:
    """What git tracks, and what it would add; None where the folder is no work tree, or there is no git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_S, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"code {folder}: git listed no files within {_GIT_S:g} s; give another") from None
    if done.returncode != 0:
        return None
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return [name for name in names if name and _is_there(folder / name)]  # tracked and deleted ones are not


def _is_there(path: Path) -> bool:
    """Whether there is something to send, a link included: it is refused, not left out. Submodules are left out."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _patterns(folder: Path) -> list[str]:
    """Of the ignore file: shell patterns, one a line, for a path or any part of it."""
    try:
        lines = (folder / IGNORE_FILE).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [line.strip().rstrip("/") for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _is_ignored(name: str, patterns: Iterable[str]) -> bool:
    parts = name.split("/")
    if any(part in _NEVER for part in parts):
        return True
    paths = ["/".join(parts[: at + 1]) for at in range(len(parts))]
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in (*parts, *paths))


def _expect_plain(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if any((folder / part).is_symlink() for part in _prefixes(name)):
            raise ConfigError(f"code {folder}: {name} is a link or lies below one; send the file itself, or ignore it")
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise ConfigError(f"code {folder}: {name} is no regular file; ignore it in {IGNORE_FILE}")
        problem = name_problem(name)
        if problem is not None:
            raise ConfigError(f"code {folder}: {name!r} {problem}; rename or ignore it")


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: at + 1]) for at in range(len(parts))]


def _expect_fits(folder: Path, names: Iterable[str], most_bytes: int) -> None:
    sizes = {name: (folder / name).lstat().st_size for name in names}
    total = sum(sizes.values())
    if total > most_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
        said = ", ".join(f"{name} ({show_bytes(sizes[name])})" for name in largest)
        raise ConfigError(
            f"code {folder}: {len(sizes)} files have {show_bytes(total)}, expected at most {show_bytes(most_bytes)}; "
            f"the largest are {said}; ignore some in {IGNORE_FILE}, or bring them in an image"
        )


def _zip(folder: Path, names: Iterable[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as file:
        for name in names:
            path = folder / name
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            file.writestr(_member(name, mode), path.read_bytes(), compresslevel=_LEVEL)
    return buffer.getvalue()


def _member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.create_system = _UNIX
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | mode) << 16
    return info
