"""Unpacks code in a pod, where nothing in the archive is trusted before it is proven.

    python -P -m ktrain.launcher.code.unpack ARCHIVE... SHA256 TARGET

Several archives are the parts of one, in their order. Standard library and `ktrain.errors` alone: it runs before
anything else does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ktrain.base import contract
from ktrain.errors import ConfigError, CorruptionError, DeadlineError, KtrainError, UnavailableError
from ktrain.launcher.code import members

_PIECE = 1 << 20

OpenFile = io.BufferedReader | io.BufferedRandom | io.BytesIO


def unpack_code(archive: Path, sha256: str, target: Path, *, most_bytes: int | None = None) -> int:
    """Writes the archive's files below an empty folder; returns how many. Nothing is written unless all is allowed.

    Raises:
        CorruptionError: the bytes are not those of the digest, or no whole zip.
        ConfigError: a member may not be unpacked, there are too many bytes, or the target holds something.
    """
    with open(archive, "rb") as file:
        return unpack_file(file, sha256, target, what=f"code archive {archive}", most_bytes=most_bytes)


def unpack_file(
    file: OpenFile, sha256: str, target: Path, *, what: str = "code archive", most_bytes: int | None = None
) -> int:
    """As `unpack_code`, from an open file that nobody else writes."""
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CorruptionError(f"{what}: expected SHA-256 {sha256}, found {found}; launch again")
    try:
        with zipfile.ZipFile(file) as archive:
            return _extract(archive, target, most_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise CorruptionError(f"{what}: no whole zip: {error}; launch again") from error


def _extract(archive: zipfile.ZipFile, target: Path, most_bytes: int | None) -> int:
    """Three phases: the directory of the zip, then every byte of its members, then the files."""
    infos = archive.infolist()
    for info in infos:
        problem = _problem(info)
        if problem is not None:
            raise ConfigError(f"code archive: member {info.filename!r} {problem}; nothing was unpacked")
    members.expect_members(
        "code archive", [(info.orig_filename, info.file_size) for info in infos], most_bytes=most_bytes
    )
    for info in infos:
        for _ in _pieces(archive, info):
            pass
    members.expect_target(target)
    for info in infos:
        path = target / info.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.writelines(_pieces(archive, info))
        path.chmod(0o755 if (info.external_attr >> 16) & stat.S_IXUSR else 0o644)
    return len(infos)


def _pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """A member's bytes: as many as were declared, and of the checksum that the zip has for them."""
    left = info.file_size
    with archive.open(info) as source:
        while piece := source.read(min(_PIECE, left + 1)):
            left -= len(piece)
            yield piece
    if left != 0:
        raise zipfile.BadZipFile(f"{info.filename!r} has not the {info.file_size} bytes that it declares")


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why a member may not be unpacked, whatever its name is."""
    problem = members.name_problem(info.orig_filename)  # as it stands there: the library cuts names at a zero byte
    if problem is not None:
        return problem
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        return "is no regular file"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is encrypted or packed in another way"
    return None


@contextlib.contextmanager
def _joined(parts: Sequence[str]) -> Iterator[OpenFile]:
    """One archive of its parts; several are held in memory, of which a pod gets no more than fit into ConfigMaps."""
    if len(parts) == 1:
        with open(parts[0], "rb") as file:
            yield file
        return
    whole = io.BytesIO()
    for part in parts:
        whole.write(Path(part).read_bytes())
    whole.seek(0)
    yield whole


def said(error: KtrainError | OSError) -> int:
    """Says in one line why there is no code, and returns the exit code of the init container."""
    sys.stderr.write(f"ktrain: {error}\n")
    if isinstance(error, CorruptionError):
        return contract.EXIT_CORRUPT
    return contract.EXIT_UNAVAILABLE if isinstance(error, UnavailableError | DeadlineError) else contract.EXIT_USAGE


def main(argv: list[str]) -> int:
    *parts, sha256, target = argv
    try:
        with _joined(parts) as file:
            unpack_file(file, sha256, Path(target), what=f"code archive {parts[0]}")
    except (KtrainError, OSError) as error:
        return said(error)
    return contract.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
