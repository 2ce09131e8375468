"""`ktrain ckpt show | diff | repair | verify` on runs in a directory and behind fsspec."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.base import contract, ids
from ktrain.checkpoint.marks import metrics_name, pin_name
from tests.unit.checkpoint.builders import deadline, flip, identity, put_checkpoint
from tests.unit.cli.runs import StoredRun


@pytest.fixture(params=["directory", "memory"])
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> StoredRun:
    """Steps 10 and 20 in the bucket; no volume and no disk on this machine."""
    monkeypatch.setenv(contract.ENV_VOLUME, str(tmp_path / "volume"))
    monkeypatch.delenv(contract.ENV_DISK, raising=False)
    url = str(tmp_path / "run") if request.param == "directory" else f"memory://{ids.random_id()}"
    made = StoredRun.make(url, capsys)
    for step in (10, 20):
        put_checkpoint(made.tier, identity(step))
    return made


def spoil(run: StoredRun, step: int, name: str) -> None:
    (found,) = [each for each in run.names(f"checkpoints/step-{step:08d}") if each.endswith(name)]
    run.write(found, flip(run.read(found), len(run.read(found)) - 3))


# show


def test_show_newest_says_what_it_holds(run: StoredRun) -> None:
    run.write(pin_name(20), b"{}")
    run.write(metrics_name(20, 1), b'{"metrics": {"val_loss": 0.5}}')
    found = run.ckpt("show", "--output", "json").json
    assert (found["step"], found["epoch"], found["world_size"]) == (20, 1, 2)
    assert found["on_line"] and found["pinned"] and found["metrics"] == {"val_loss": 0.5}
    (tensor,) = found["tensors"]
    assert (tensor["name"], tensor["dtype"], tensor["shape"]) == ("model.weight", "float32", [2, 64])
    assert tensor["ranks"] == {"0": 256, "1": 256} and tensor["nbytes"] == 512
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert run.names("marks") == [metrics_name(20, 1), pin_name(20)], "the reader's own mark is gone"


def test_show_text_names_tensors_and_identity(run: StoredRun) -> None:
    said = run.ckpt("show", "--step", "10").out
    assert "step 10 epoch 1" in said and "model.weight" in said and "0:256,1:256" in said


def test_show_step_that_is_not_there_is_refused(run: StoredRun) -> None:
    assert run.ckpt("show", "--step", "15").code == contract.EXIT_USAGE


def test_show_damaged_manifest_is_not_shown(run: StoredRun) -> None:
    spoil(run, 20, "rank-00001.json")
    assert run.ckpt("show").code == contract.EXIT_CORRUPT


def test_show_step_off_the_line_says_so(run: StoredRun) -> None:
    run.catalog.record(2, "restored", {"step": 10})
    run.catalog.record(2, "committed", {"step": 15})
    assert run.ckpt("show", "--output", "json").json["step"] == 10
    assert "off the line" in run.ckpt("show", "--step", "20").out
    assert [row["on_line"] for row in run.ckpt("ls", "--output", "json").json] == [True, False]


# diff


def test_diff_same_step_is_the_same(run: StoredRun) -> None:
    answer = run.ckpt("diff", "--step", "10", "--step", "10", "--output", "json")
    assert answer.code == contract.EXIT_OK and answer.json["equal"] == ["model.weight"]


def test_diff_two_steps_names_the_tensor(run: StoredRun) -> None:
    answer = run.ckpt("diff", "--step", "10", "--step", "20", "--output", "json")
    assert answer.code == contract.EXIT_FAILED and answer.json["differing"] == ["model.weight"]
    assert (answer.json["a"]["step"], answer.json["b"]["step"]) == (10, 20)
    assert "~ model.weight" in run.ckpt("diff", "--step", "10", "--step", "20").out


def test_diff_with_another_run_compares_its_checkpoint(run: StoredRun, tmp_path: Path) -> None:
    other = StoredRun.make(str(tmp_path / "other"), run.capsys)
    put_checkpoint(other.tier, identity(20))
    assert run.ckpt("diff", other.url).code == contract.EXIT_OK
    assert run.ckpt("diff", other.url, "--step", "20").code == contract.EXIT_OK
    assert run.ckpt("diff", other.url, "--step", "10", "--step", "20").code == contract.EXIT_FAILED
    assert run.ckpt("diff", other.url, "--step", "10").code == contract.EXIT_USAGE


def test_diff_damaged_bytes_are_not_proven(run: StoredRun) -> None:
    spoil(run, 20, "rank-00000.safetensors")
    answer = run.ckpt("diff", "--step", "10", "--step", "20", "--output", "json")
    assert answer.code == contract.EXIT_CORRUPT and list(answer.json["unproven"]) == ["model.weight"]


@pytest.mark.parametrize("arguments", [(), ("--step", "10"), ("--step", "1", "--step", "2", "--step", "3")])
def test_diff_unclear_request_is_refused(run: StoredRun, arguments: tuple[str, ...]) -> None:
    assert run.ckpt("diff", *arguments).code == contract.EXIT_USAGE


# verify


def test_verify_leaves_no_mark(run: StoredRun) -> None:
    assert run.ckpt("verify").code == contract.EXIT_OK and run.names("marks") == []


# repair


def test_repair_whole_run_says_so(run: StoredRun) -> None:
    answer = run.ckpt("repair")
    assert answer.code == contract.EXIT_OK and "every checkpoint of the line is whole" in answer.out


def test_repair_from_another_commit_makes_the_step_whole(run: StoredRun) -> None:
    put_checkpoint(run.tier, identity(20), "cafe")
    for write_id, name in (("0a1b", "rank-00000.safetensors"), ("cafe", "rank-00001.safetensors")):
        spoil(run, 20, f"-{write_id}/{name}")
    before = run.names()
    planned = run.ckpt("repair", "--dry-run", "--output", "json").json["damaged"]
    assert [row["from"] for row in planned] == [{"0": "bucket cafe", "1": "bucket 0a1b"}] and run.names() == before
    answer = run.ckpt("repair", "--output", "json")
    assert answer.code == contract.EXIT_OK and set(before) < set(run.names())
    write_id = answer.json["damaged"][0]["write_id"]
    assert f"checkpoints/step-00000020/commit-000001-{write_id}.json" in run.names()
    assert run.ckpt("repair").code == contract.EXIT_OK


def test_repair_that_finds_no_copy_says_which_rank(run: StoredRun) -> None:
    spoil(run, 20, "rank-00001.safetensors")
    answer = run.ckpt("repair")
    assert answer.code == contract.EXIT_CORRUPT and "rank 1" in answer.err and "NOT REPAIRED" in answer.err
    assert run.ckpt("repair", "--step", "10").code == contract.EXIT_OK
    assert run.ckpt("repair", "--step", "15").code == contract.EXIT_USAGE


def tear(run: StoredRun, step: int, write_id: str) -> str:
    """A record that was not written to its end; its name."""
    name = f"checkpoints/step-{step:08d}/commit-000001-{write_id}.json"
    run.tier.write(name, run.read(name)[:-40], deadline=deadline())
    return name


def test_repair_removes_a_torn_record_of_a_whole_checkpoint_when_confirmed_alone(run: StoredRun) -> None:
    put_checkpoint(run.tier, identity(20), "cafe")
    torn = tear(run, 20, "cafe")
    before = run.names()
    for arguments in ((), ("--dry-run", "--confirm")):
        said = run.ckpt("repair", "--output", "json", *arguments).json
        assert [row["write_id"] for row in said["unreadable"]] == ["cafe"] and not said["removed"]
        assert run.names() == before
    answer = run.ckpt("repair", "--confirm")
    assert answer.code == contract.EXIT_OK and "removed: step 20" in answer.out
    assert {name for name in before if "cafe" in name} == set(before) - set(run.names()) >= {torn}
    assert run.ckpt("verify").code == contract.EXIT_OK


def test_repair_leaves_a_torn_record_that_is_the_only_word_of_its_step(run: StoredRun) -> None:
    torn = tear(run, 20, "0a1b")
    spoil(run, 20, "rank-00000.safetensors")
    before = run.names()
    answer = run.ckpt("repair", "--confirm")
    assert answer.code == contract.EXIT_CORRUPT and run.names() == before and torn in before


def test_repair_leaves_a_torn_record_of_a_pinned_step(run: StoredRun) -> None:
    put_checkpoint(run.tier, identity(20), "cafe")
    torn = tear(run, 20, "cafe")
    run.ckpt("pin", "--step", "20")
    answer = run.ckpt("repair", "--confirm")
    assert answer.code == contract.EXIT_OK and "pinned" in answer.err and torn in run.names()
