"""Exports: what other programs read of them, and what is never written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ktrain.abc.tier import Tier
from ktrain.checkpoint.collect import Collector
from ktrain.checkpoint.removal import Terms
from ktrain.checkpoint.retention import Latest
from ktrain.errors import ConfigError, CorruptionError, NotFoundError
from ktrain.exchange.export import INDEX_FILE, Exported, export_run
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.tier_conformance import soon
from ktrain.testing.tier_url import publish, withdraw
from tests.unit.checkpoint.builders import RUN, TIMEOUTS, catalog, identity, put_tensors
from tests.unit.checkpoint.exchange_runs import Tied, WithExtra, make_run, plain_tensors, train
from tests.unit.checkpoint.meddler import Meddler


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tied, torch.optim.Optimizer]:
    return make_run(tmp_path_factory.mktemp("export"))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_export_to_safetensors_is_read_by_its_own_reader(made: Any, tmp_path: Path) -> None:
    run, model, _ = made
    out = tmp_path / "model.safetensors"

    done = export_run(run, out, form="safetensors")

    assert same(load_file(out), plain_tensors(model))
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    assert done == Exported(2, 1, "safetensors", str(out), (out.name,), 7, done.nbytes, ("_extra_state",))
    assert list(tmp_path.iterdir()) == [out]


def test_export_of_tied_weights_is_read_by_load_model(made: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_model

    run, model, _ = made
    export_run(run, tmp_path / "x.safetensors", form="safetensors")
    other = Tied(seed=5)

    assert load_model(other, tmp_path / "x.safetensors") == (set(), [])
    assert torch.equal(other.head.weight, model.head.weight)


def test_export_to_hf_has_files_of_bounded_size_and_an_index_of_all(made: Any, tmp_path: Path) -> None:
    run, model, _ = made

    done = export_run(run, tmp_path / "hf", form="hf", max_shard_nbytes=100)

    index = json.loads((tmp_path / "hf" / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    assert len(names) > 2 and sorted([*names, INDEX_FILE]) == sorted(done.files)
    merged: dict[str, torch.Tensor] = {}
    for name in names:
        content = load_file(tmp_path / "hf" / name)
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= 100
        assert all(index["weight_map"][key] == name for key in content)
        merged |= content
        with safe_open(tmp_path / "hf" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert same(merged, plain_tensors(model))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values()) == done.nbytes


def test_export_to_hf_that_fits_one_file_is_one_file(made: Any, tmp_path: Path) -> None:
    run, model, _ = made

    assert export_run(run, tmp_path / "hf", form="hf").files == ("model.safetensors",)
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), plain_tensors(model))


def test_export_of_an_older_step_has_its_values(made: Any, tmp_path: Path) -> None:
    run, model, _ = made
    first = Tied()
    train(first, torch.optim.AdamW(first.parameters(), lr=0.1))

    assert export_run(run, tmp_path / "x", form="safetensors", step=1).step == 1
    assert same(load_file(tmp_path / "x"), plain_tensors(first))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_to_dcp_is_read_by_torchs_reader(made: Any, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    run, model, optimizer = made
    done = export_run(run, tmp_path / "dcp", form="dcp")
    other = WithExtra(seed=3)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.7)
    weights, state = get_state_dict(other, fresh)

    dcp.load({"model": weights, "optimizer": state}, storage_reader=dcp.FileSystemReader(tmp_path / "dcp"))
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)

    assert same(plain_tensors(other), plain_tensors(model))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert all(torch.equal(value, optimizer.state[theirs][key]) for key, value in fresh.state[mine].items())
    assert fresh.param_groups[0]["lr"] == 0.1
    assert done.left_out == ("rng",) and ".metadata" in done.files


def test_export_of_a_dcp_save_takes_what_lies_below_the_part(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from ktrain.checkpoint.dcp import RunStorageWriter

    writer = RunStorageWriter(tmp_path / "run", step=1)
    weight = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": {"a.weight": weight}, "optim": {"m": torch.ones(2)}, "n": 1}, storage_writer=writer)
    writer.close()

    export_run(tmp_path / "run", tmp_path / "one", form="safetensors")
    done = export_run(tmp_path / "run", tmp_path / "all", form="safetensors", part="dcp")

    assert same(load_file(tmp_path / "one"), {"a.weight": weight})
    assert same(load_file(tmp_path / "all"), {"model.a.weight": weight, "optim.m": torch.ones(2)})
    assert done.left_out == ("n",)


@pytest.mark.parametrize("form", ["safetensors", "hf", "dcp"])
def test_export_over_what_is_there_is_refused_and_changes_nothing(form: str, made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")

    with pytest.raises(ConfigError, match="is there already"):
        export_run(made[0], out, form=form)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "kept"


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_export_into_an_empty_folder_takes_its_place(form: str, made: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert export_run(made[0], tmp_path / "out", form=form).files


@pytest.mark.parametrize("form", ["safetensors", "hf", "dcp"])
def test_export_of_a_changed_byte_names_it_and_leaves_nothing(form: str, tmp_path: Path) -> None:
    run, _, _ = make_run(tmp_path, steps=1)
    (payload,) = Path(run).glob("checkpoints/*/*/*.safetensors")
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)

    with pytest.raises(CorruptionError, match=r"rank-00000.safetensors: rank 0, .* bytes 0 to \d+ differ"):
        export_run(run, tmp_path / "out", form=form)

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def two_steps() -> FakeBucket:
    """A run with steps 10 and 20 in a store, of which a collector that keeps one would remove step 10."""
    bucket = FakeBucket()
    bucket.write("run.json", json.dumps({"format": 1, "id": RUN}).encode(), deadline=soon())
    weight = Shard("model/weight", "uint8", (4,), Box.whole((4,)), Role.REPLICATED)
    about = {"model": {"kind": "module", "keys": ["weight"]}}
    for step in (10, 20):
        put_tensors(bucket, identity(step, world_size=1), [[(weight, bytes([step] * 4))]], about)
    return bucket


def collect(bucket: FakeBucket) -> None:
    Collector(catalog(bucket), timeouts=TIMEOUTS, clock=FakeClock()).collect(Terms(Latest(1), 9))


def steps(bucket: FakeBucket) -> list[int]:
    return [commit.identity.step for commit in catalog(bucket).listing().commits]


def test_export_keeps_collectors_off_what_it_reads_and_no_longer(two_steps: FakeBucket, tmp_path: Path) -> None:
    meddler = Meddler(two_steps, "read_range", "*rank-00000.safetensors", lambda: collect(two_steps), when="before")
    url = publish(cast(Tier, meddler))

    export_run(url, tmp_path / "out", form="safetensors", step=10)

    assert meddler.has_acted and steps(two_steps) == [10, 20]
    assert load_file(tmp_path / "out")["weight"].tolist() == [10] * 4
    collect(two_steps)
    assert steps(two_steps) == [20]
    withdraw(url)


def test_export_of_what_is_collected_meanwhile_says_so_and_leaves_nothing(
    two_steps: FakeBucket, tmp_path: Path
) -> None:
    meddler = Meddler(two_steps, "write", "marks/*", lambda: collect(two_steps), when="before")
    url = publish(cast(Tier, meddler))

    with pytest.raises(NotFoundError, match="step 10.* was collected just now"):
        export_run(url, tmp_path / "out", form="safetensors", step=10)

    assert meddler.has_acted and list(tmp_path.iterdir()) == []
    withdraw(url)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"step": 9}, NotFoundError, r"no checkpoint of step 9; committed steps are \[1, 2\]"),
        ({"part": "ema"}, NotFoundError, "it has no part 'ema'; its parts are .*'model'"),
        ({"part": "optimizer"}, ConfigError, "part 'optimizer' is no module"),
    ],
)
def test_export_of_what_is_not_there_says_what_is(
    options: Any, error: type[Exception], text: str, made: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        export_run(made[0], tmp_path / "out", form="hf", **options)
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_dtype_without_a_name_in_safetensors_says_where_it_can_go(tmp_path: Path) -> None:
    import ktrain

    model = torch.nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with ktrain.Checkpointer(tmp_path / "run", state={"model": model}, every=1) as ckpt:
        ckpt.restore()
        ckpt.step(1)

    with pytest.raises(ConfigError, match="'phase': its dtype complex64 has no name .* --to dcp"):
        export_run(tmp_path / "run", tmp_path / "out", form="safetensors")


def test_export_to_another_machine_is_refused(made: Any) -> None:
    with pytest.raises(ConfigError, match="expected OUT on this machine"):
        export_run(made[0], "s3://bucket/out", form="hf")


def test_export_to_safetensors_imports_neither_torch_nor_ray(made: Any, tmp_path: Path) -> None:
    program = (
        "import sys; from ktrain.exchange.export import export_run; "
        f"export_run({made[0]!r}, {str(tmp_path / 'x')!r}, form='hf'); print(*{{'torch', 'ray'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == ""


def test_export_holds_no_more_than_its_largest_tensor_and_some_windows(tmp_path: Path) -> None:
    """What the export of 240 MiB adds to a process's peak of memory."""
    import ktrain

    model = torch.nn.Module()
    for index in range(6):
        model.register_buffer(f"b{index}", torch.full((40 << 20,), index, dtype=torch.uint8))
    with ktrain.Checkpointer(tmp_path / "run", state={"model": model}, every=1) as ckpt:
        ckpt.restore()
        ckpt.step(1)
    program = (
        "import resource; from ktrain.exchange.export import export_run; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"export_run({str(tmp_path / 'run')!r}, {str(tmp_path / 'x')!r}, form='safetensors'); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)

    assert int(done.stdout) < (40 + 64 + 50) * 1024  # KiB
