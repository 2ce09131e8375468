"""`ktrain ckpt export` and `import`: exit codes, JSON, and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from ktrain.base import contract
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.cli.exchange import size_nbytes
from ktrain.cli.main import main
from ktrain.errors import ConfigError
from ktrain.format.manifest import Identity
from tests.unit.checkpoint.builders import put_checkpoint


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file({"net.a": numpy.arange(6.0), "net.b": numpy.ones(3), "junk": numpy.ones(1)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_import_then_export_as_json_names_what_was_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--from", "safetensors", "--key", "net", "--tie", "c=b", "--step", 5, "--output", "json")
    assert run("ckpt", "import", source, tmp_path / "run", *options) == contract.EXIT_OK
    imported = json.loads(capsys.readouterr().out)
    assert (imported["step"], imported["num_tensors"], imported["left_out"]) == (5, 2, ["junk"])

    options = ("--to", "hf", "--max-shard-size", "40B", "--output", "json")
    assert run("ckpt", "export", tmp_path / "run", tmp_path / "out", *options) == contract.EXIT_OK
    exported = json.loads(capsys.readouterr().out)
    assert len(exported["files"]) == 3 and exported["step"] == 5
    files = [load_file(tmp_path / "out" / name) for name in exported["files"] if name.endswith(".safetensors")]
    assert sorted(name for content in files for name in content) == ["a", "b"]


def test_import_and_export_as_text_say_what_was_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--from", "safetensors", "--exclude", "junk")
    assert run("ckpt", "import", source, tmp_path / "run", *arguments) == contract.EXIT_OK
    said = capsys.readouterr()
    assert "2 tensors, 72 bytes" in said.out and said.err == "left out: junk\n"

    assert run("ckpt", "export", tmp_path / "run", tmp_path / "out", "--to", "safetensors") == contract.EXIT_OK
    assert "2 tensors, 72 bytes in 1 files" in capsys.readouterr().out


def test_import_dry_run_says_the_same_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("ckpt", "import", source, tmp_path / "run", "--from", "safetensors", "--output", "json")
    assert run(*arguments, "--dry-run") == contract.EXIT_OK
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert run(*arguments) == contract.EXIT_OK
    assert json.loads(capsys.readouterr().out) == {**planned, "dry_run": False}
    assert run(*arguments, "--dry-run") == contract.EXIT_CONFLICT


@pytest.mark.parametrize("form", ["hf", "safetensors", "dcp"])
def test_export_dry_run_says_the_same_and_writes_nothing(
    form: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ckpt", "import", source, tmp_path / "run", "--from", "safetensors") == contract.EXIT_OK
    options = ("--to", form, "--max-shard-size", "40B", "--output", "json")
    arguments = ("ckpt", "export", tmp_path / "run", tmp_path / "out", *options)
    capsys.readouterr()
    assert run(*arguments, "--dry-run") == contract.EXIT_OK
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert run(*arguments) == contract.EXIT_OK
    done = json.loads(capsys.readouterr().out)
    assert {**planned, "dry_run": False, "files": planned["files"] or done["files"]} == done
    assert (planned["files"] == []) == (form == "dcp")
    assert run(*arguments, "--dry-run") == contract.EXIT_USAGE, "what is there would be refused"


def test_gc_of_a_run_that_began_by_an_import_is_in_no_doubt(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ckpt", "import", source, tmp_path / "run", "--from", "safetensors") == contract.EXIT_OK
    found = RunCatalog.open(str(tmp_path / "run"), timeouts=Timeouts(), create=False)
    put_checkpoint(found.tier, Identity(found.run_id, 10, found.next_epoch({}), 2))
    capsys.readouterr()

    assert run("ckpt", "gc", tmp_path / "run", "--keep", "1", "--output", "json") == contract.EXIT_OK
    assert [removal["step"] for removal in json.loads(capsys.readouterr().out)["removed"]] == [0]


def test_import_into_the_same_run_again_is_a_conflict(source: Path, tmp_path: Path) -> None:
    arguments = ("ckpt", "import", source, tmp_path / "run", "--from", "safetensors")

    assert run(*arguments) == contract.EXIT_OK
    assert run(*arguments) == contract.EXIT_CONFLICT


def test_export_of_a_changed_byte_exits_3(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("ckpt", "import", source, tmp_path / "run", "--from", "safetensors")
    (payload,) = (tmp_path / "run").glob("checkpoints/*/*/*.safetensors")
    payload.write_bytes(payload.read_bytes()[:-1] + b"\x00")

    assert run("ckpt", "export", tmp_path / "run", tmp_path / "out", "--to", "hf") == contract.EXIT_CORRUPT
    assert "rank-00000.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "nope", "out", "--to", "hf"),
        ("export", "nope", "out"),
        ("export", "nope", "out", "--to", "zip"),
        ("export", "nope", "out", "--to", "hf", "--max-shard-size", "5 parsecs"),
        ("import", "nope", "run", "--from", "hf"),
        ("import", "nope", "run", "--from", "hf", "--tie", "a"),
        ("import", "nope", "run", "--from", "hf", "--step", "-1"),
    ],
)
def test_bad_input_exits_2_and_changes_nothing(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run("ckpt", *arguments) == contract.EXIT_USAGE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("512 MiB", 512 << 20), ("10kb", 10_000), ("7", 7), ("1GiB", 1 << 30)]
)
def test_size_with_a_unit_is_bytes(text: str, nbytes: int) -> None:
    assert size_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1.5GB", "5XB"])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        size_nbytes(text)
