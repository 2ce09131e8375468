"""Archives that a stranger made: each is refused, and nothing is written anywhere."""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrain.errors import ConfigError, CorruptionError, KtrainError
from ktrain.launcher.code import members
from ktrain.launcher.code.unpack import unpack_code

Member = tuple[str, bytes, int]  # name, bytes, Unix mode


def zipped(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data, mode in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as it is: the constructor would cut and turn it
            info.external_attr = mode << 16
            file.writestr(info, data)
    return buffer.getvalue()


def plain(name: str, data: bytes = b"x") -> Member:
    return name, data, stat.S_IFREG | 0o644


def of_kind(kind: int) -> Callable[[], bytes]:
    return lambda: zipped(plain("good.py"), ("odd", b"/etc/passwd", kind | 0o777))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "above the folder": lambda: zipped(plain("good.py"), plain("../evil")),
    "above, inside": lambda: zipped(plain("good.py"), plain("a/../../evil")),
    "a dot": lambda: zipped(plain("good.py"), plain("./evil")),
    "an empty part": lambda: zipped(plain("good.py"), plain("a//evil")),
    "absolute": lambda: zipped(plain("good.py"), plain("/tmp/evil")),
    "a drive": lambda: zipped(plain("good.py"), plain("C:/evil")),
    "backslashes": lambda: zipped(plain("good.py"), plain("..\\evil")),
    "a line end": lambda: zipped(plain("good.py"), plain("a\nb")),
    "a zero": lambda: zipped(plain("good.py"), plain("a\0b")),
    "no name": lambda: zipped(plain("good.py"), plain("")),
    "a long name": lambda: zipped(plain("good.py"), plain("a" * 2000)),
    "a link": of_kind(stat.S_IFLNK),
    "a device": of_kind(stat.S_IFCHR),
    "a pipe": of_kind(stat.S_IFIFO),
    "a folder": lambda: zipped(plain("good.py"), ("a/", b"", stat.S_IFDIR | 0o755)),
    "twice": lambda: zipped(plain("good.py"), plain("good.py")),
    "twice by case": lambda: zipped(plain("good.py"), plain("GOOD.py")),
    "a file as folder": lambda: zipped(plain("a"), plain("a/b")),
    "twice by letters": lambda: zipped(plain("h\u00e4.py"), plain("ha\u0308.py")),
    "a long part": lambda: zipped(plain("good.py"), plain("\u00e4" * 200)),
    "a folder of git": lambda: zipped(plain("good.py"), plain("lib/.GIT/config")),
    "the mark of a target": lambda: zipped(plain("good.py"), plain(members.MARK)),
    "a folder as file": lambda: zipped(plain("a/b"), plain("A")),
}


def tried(tmp_path: Path, data: bytes, *, most_bytes: int = members.MOST_BYTES) -> KtrainError:
    """The refusal of an archive whose digest is right; everything below `tmp_path` is as before."""
    archive, target = tmp_path / "code.zip", tmp_path / "box" / "target"
    archive.write_bytes(data)
    with pytest.raises(KtrainError) as caught:
        unpack_code(archive, hashlib.sha256(data).hexdigest(), target, most_bytes=most_bytes)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == [archive]
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused_and_writes_nothing(name: str, tmp_path: Path) -> None:
    error = tried(tmp_path, HOSTILE[name]())

    assert isinstance(error, ConfigError) and "nothing was unpacked" in str(error)


def test_archive_with_more_bytes_than_allowed_is_refused(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(1 << 20))

    assert "expected at most 1000" in str(tried(tmp_path, bomb.getvalue(), most_bytes=1000))


def test_archive_with_more_files_than_allowed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MOST_FILES", 2)

    assert "3 files" in str(tried(tmp_path, zipped(plain("a"), plain("b"), plain("c"))))


@pytest.mark.parametrize("declared", [10, 2000])
def test_archive_that_declares_another_size_is_refused_before_anything_is_written(
    declared: int, tmp_path: Path
) -> None:
    data = bytearray(zipped(plain("a", b"x" * 10), plain("b", b"x" * 1000)))
    record = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, record + 24, declared)  # the size of the file, in the directory that is believed

    assert isinstance(tried(tmp_path, bytes(data)), CorruptionError)


@pytest.mark.parametrize("offset", [-1, 0])
def test_archive_whose_last_member_is_damaged_writes_none_of_them(offset: int, tmp_path: Path) -> None:
    data = bytearray(zipped(plain("a", b"first"), plain("b", b"second")))
    at = data.index(b"second") if offset == 0 else data.rindex(b"PK\x03\x04") + 30  # its bytes, or its other name
    data[at] ^= 1

    assert isinstance(tried(tmp_path, bytes(data)), CorruptionError)


def test_archive_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    whole = zipped(plain("a", b"x" * 100))

    for length in range(0, len(whole), 7):
        assert isinstance(tried(tmp_path, whole[:length]), CorruptionError)


def test_member_that_unpacks_to_more_than_it_declares_is_refused(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(10 << 20))
    data = bytearray(bomb.getvalue())
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 100)

    assert isinstance(tried(tmp_path, bytes(data), most_bytes=1000), CorruptionError)


@pytest.mark.parametrize("data", [b"", b"PK", b"no zip at all"])
def test_bytes_that_are_no_zip_are_said_to_be_broken(data: bytes, tmp_path: Path) -> None:
    assert isinstance(tried(tmp_path, data), CorruptionError)
