"""Unpacks code in a pod, where nothing in the archive is trusted before it is proven.

    python -P -m ktrain.launcher.code.unpack ARCHIVE SHA256 TARGET

Standard library and `ktrain.errors` alone: it runs before anything else does.
"""

from __future__ import annotations

import hashlib
import stat
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ktrain.base import contract
from ktrain.errors import ConfigError, CorruptionError, KtrainError

MOST_BYTES = 1 << 30  # what all files may have together
MOST_FILES = 50_000
_PIECE = 1 << 20
_LONGEST_NAME = 1024


def unpack_code(archive: Path, sha256: str, target: Path, *, most_bytes: int = MOST_BYTES) -> int:
    """Writes the archive's files below an empty folder; returns how many. Nothing is written unless all is allowed.

    Raises:
        CorruptionError: the bytes are not those of the digest, or no zip.
        ConfigError: a member may not be unpacked, there are too many bytes, or the target holds something.
    """
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise CorruptionError(f"code archive {archive}: expected SHA-256 {sha256}, found {found}; launch again")
        try:
            with zipfile.ZipFile(file) as members:
                return _extract(members, target, most_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CorruptionError(f"code archive {archive}: no whole zip: {error}; launch again") from error


def _extract(members: zipfile.ZipFile, target: Path, most_bytes: int) -> int:
    infos = members.infolist()
    _expect_allowed(infos, most_bytes)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ConfigError(f"code: {target} is not empty; nothing was unpacked")
    for info in infos:
        path = target / info.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(members, info, path)
    return len(infos)


def _write(members: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Never more than the size that was declared, and counted; a member that holds more is refused."""
    left = info.file_size
    with members.open(info) as source, open(path, "xb") as file:
        while piece := source.read(min(_PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                raise ConfigError(
                    f"code archive: {info.filename!r} has more than the {info.file_size} bytes it declares"
                )
            file.write(piece)
    path.chmod(0o755 if (info.external_attr >> 16) & stat.S_IXUSR else 0o644)


def _expect_allowed(infos: list[zipfile.ZipInfo], most_bytes: int) -> None:
    if len(infos) > MOST_FILES:
        raise ConfigError(f"code archive: {len(infos)} files, expected at most {MOST_FILES}")
    total = sum(info.file_size for info in infos)
    if total > most_bytes:
        raise ConfigError(f"code archive: its files have {total} bytes, expected at most {most_bytes}")
    seen: set[str] = set()
    folders: set[str] = set()
    for info in infos:
        problem = _problem(info)
        name = info.filename.casefold()  # some file systems do not tell cases apart
        if problem is None and name in seen:
            problem = "is there twice"
        if problem is not None:
            raise ConfigError(f"code archive: member {info.filename!r} {problem}; nothing was unpacked")
        seen.add(name)
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    both = sorted(seen & folders)
    if both:
        raise ConfigError(f"code archive: {both[0]!r} is a file and a folder; nothing was unpacked")


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why a member may not be unpacked."""
    problem = name_problem(info.orig_filename)  # as it stands in the archive: the library cuts names at a zero byte
    if problem is not None:
        return problem
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        return "is no regular file"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is encrypted or packed in another way"
    return None


def name_problem(name: str) -> str | None:
    """Why no file of this name is packed or unpacked, or None."""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable() or "\\" in name or ":" in name:
        return "has a name that no file of code has"
    if name.startswith("/") or name != str(PurePosixPath(name)) or ".." in name.split("/"):
        return "does not lie below the folder"
    return None


def main(argv: list[str]) -> int:
    archive, sha256, target = argv
    try:
        unpack_code(Path(archive), sha256, Path(target))
    except (KtrainError, OSError) as error:
        sys.stderr.write(f"ktrain: {error}\n")
        return contract.EXIT_CORRUPT if isinstance(error, CorruptionError) else contract.EXIT_USAGE
    return contract.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
