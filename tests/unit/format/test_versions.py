"""Every version that was ever released is read and written; one that is not known is refused with both numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ktrain.errors import ConfigError
from ktrain.format import document, manifest, record
from ktrain.format.manifest import Manifest
from ktrain.format.payload import lay_out, read_header
from ktrain.format.record import CommitRecord, parse_commit_name
from tests.unit.format.builders import checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
UNKNOWN = 99
BOTH = rf"format {UNKNOWN}, this ktrain reads formats up to {document.FORMAT}"


def reseal(data: bytes, version: int) -> bytes:
    """A document that says it is of another version, and proves it."""
    body = data[: data.rindex(b',"digest"')].replace(b'"format":1', b'"format":%d' % version)
    return body + b',"digest":"' + document.digest_text(body).encode() + b'"}\n'


def files(suffix: str) -> bytes:
    return next(data for name, data in checkpoint().items() if name.endswith(suffix))


def commit() -> bytes:
    return next(data for name, data in checkpoint().items() if parse_commit_name(name))


@pytest.mark.parametrize("module", [manifest, record])
def test_every_version_has_its_reader_and_its_writer(module: object) -> None:
    assert set(module._READERS) == set(module._WRITERS) == set(document.FORMATS)  # type: ignore[attr-defined]


def test_every_version_has_its_golden_files_that_are_read() -> None:
    assert {path.name for path in GOLDEN.glob("format-*")} == {f"format-{version}" for version in document.FORMATS}
    for version in document.FORMATS:
        root = GOLDEN / f"format-{version}"
        (path,) = root.rglob("commit-*.json")
        found = CommitRecord.from_bytes(path.read_bytes())
        assert found.format == version
        for row in found.ranks:
            read = Manifest.from_bytes((root / row.manifest).read_bytes())
            assert read.format == version and read.digest() == row.manifest_digest


def test_document_of_an_unknown_version_is_refused_with_both_named() -> None:
    for read, data in ((Manifest.from_bytes, files("rank-00000.json")), (CommitRecord.from_bytes, commit())):
        with pytest.raises(ConfigError, match=BOTH):
            read(reseal(data, UNKNOWN))


def test_document_is_never_written_in_an_unknown_version() -> None:
    for found in (Manifest.from_bytes(files("rank-00000.json")), CommitRecord.from_bytes(commit())):
        with pytest.raises(ConfigError, match=BOTH):
            replace(found, format=UNKNOWN).to_bytes()


def test_document_keeps_the_version_it_was_read_in() -> None:
    for found, data in (
        (Manifest.from_bytes(files("rank-00000.json")), files("rank-00000.json")),
        (CommitRecord.from_bytes(commit()), commit()),
    ):
        assert found.to_bytes() == data


def test_payload_of_an_unknown_version_is_refused_with_both_named() -> None:
    payload = files("rank-00000.safetensors")
    assert read_header(payload).metadata["ktrain"] == str(document.FORMAT)
    newer = payload.replace(b'"ktrain":"1"', b'"ktrain":"9"')
    with pytest.raises(ConfigError, match=r"format 9, this ktrain reads formats up to"):
        read_header(newer)
    foreign = payload.replace(b',"ktrain":"1"', b"             ")
    assert "ktrain" not in read_header(foreign).metadata  # another program's file has no such number


@pytest.mark.parametrize("version", document.FORMATS)
def test_payload_names_the_version_that_it_was_laid_out_in(version: int) -> None:
    assert read_header(lay_out([], version=version).header).metadata["ktrain"] == str(version)


def test_payload_is_never_laid_out_in_an_unknown_version() -> None:
    with pytest.raises(ConfigError, match=BOTH):
        lay_out([], version=UNKNOWN)
