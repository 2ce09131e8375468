"""Which files of code may be packed, sent and written: the same rules for a zip and for a commit of git.

Standard library and `ktrain.errors` alone: it runs in the init container before anything else does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ktrain.errors import ConfigError

MOST_BYTES = 1 << 30  # what all files may have together
MOST_FILES = 50_000
MARK = ".ktrain-code"  # in a target that is ours: what lies there may be removed and unpacked again
_LONGEST_NAME = 1024
_LONGEST_PART = 255  # bytes: no file system has longer ones


def expect_members(what: str, sizes: Sequence[tuple[str, int]], *, most_bytes: int | None = None) -> None:
    """Refuses the names and declared sizes of all files together; `what` begins the message.

    Raises:
        ConfigError: too many files or bytes, a name that is none, twice (also by case), or a file and a folder.
    """
    most_bytes = MOST_BYTES if most_bytes is None else most_bytes
    if len(sizes) > MOST_FILES:
        raise ConfigError(f"{what}: {len(sizes)} files, expected at most {MOST_FILES}; nothing was unpacked")
    total = sum(size for _, size in sizes)
    if total > most_bytes:
        raise ConfigError(f"{what}: its files have {total} bytes, expected at most {most_bytes}; nothing was unpacked")
    for name, problem in name_problems(name for name, _ in sizes):
        raise ConfigError(f"{what}: member {name!r} {problem}; nothing was unpacked")


def name_problems(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Each name that may not be written beside the others, and why."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        if (problem := name_problem(name)) is not None:
            yield name, problem
            continue
        key = _key(name)
        if key in seen:
            yield name, "is there twice" if seen[key] == name else f"is there twice, also as {seen[key]!r}"
        seen[key] = name
        folders.update((str(parent), name) for parent in PurePosixPath(key).parents)
    for key in sorted(seen.keys() & folders.keys()):
        yield seen[key], f"is a file and a folder, of {folders[key]!r}"


def name_problem(name: str) -> str | None:
    """Why no file of this name is packed or unpacked, or None."""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable() or "\\" in name or ":" in name:
        return "has a name that no file of code has"
    parts = name.split("/")
    if any(len(part.encode("utf-8")) > _LONGEST_PART for part in parts):
        return "has a name that no file of code has"
    if name.startswith("/") or name != str(PurePosixPath(name)) or ".." in parts:
        return "does not lie below the folder"
    if any(part.casefold() == ".git" for part in parts) or parts[0].casefold() == MARK:
        return "has a name that is not for code"
    return None


def _key(name: str) -> str:
    """Equal for names that some file system takes for one: by case, or by how letters are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def expect_target(target: Path) -> None:
    """Makes the folder, or empties it where an earlier try of ours was cut off; marks it as ours.

    An init container is started again after its node was, with the volume as it was left.

    Raises:
        ConfigError: it holds something that is not ours; nothing was changed.
    """
    target.mkdir(parents=True, exist_ok=True)
    mark = target / MARK
    if not mark.is_file() and any(target.iterdir()):
        raise ConfigError(f"code: {target} is not empty; nothing was unpacked")
    mark.write_bytes(b"")
    for path in target.iterdir():
        if path != mark:
            _remove(path)


def _remove(path: Path) -> None:
    """A file, a link (not what it names), or a folder with all below it."""
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            _remove(below)
        path.rmdir()
    else:
        path.unlink()
