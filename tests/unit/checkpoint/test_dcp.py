"""DCP saves and loads in one process: the bytes that come back, what is proven, and what is refused."""

from __future__ import annotations

import gc
import io
import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from ktrain.abc.tier import Tier
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.checkpoint.collect import Collector
from ktrain.checkpoint.dcp import RunStorageReader, RunStorageWriter, newest_step, step_of
from ktrain.checkpoint.dcp_attempt import attempt_of
from ktrain.checkpoint.removal import Seen, Terms
from ktrain.checkpoint.retention import Latest
from ktrain.checkpoint.stored import choose_commit
from ktrain.errors import ConfigError, ConflictError, CorruptionError, NotFoundError
from tests.unit.checkpoint.builders import TIMEOUTS
from tests.unit.checkpoint.dcp_runs import load, payload, same, save, state, zeros

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    url = str(tmp_path / "run")
    yield url
    attempt_of(url).close()


def cause(error: CheckpointException) -> BaseException:
    return error.failures[0][0]


def catalog(run: str) -> RunCatalog:
    return RunCatalog.open(run, timeouts=Timeouts(), create=False)


def test_save_and_load_gives_the_same_values(run: str) -> None:
    save(run, 10, state(1))

    assert same(load(run), state(1))


def test_load_without_a_step_is_the_newest_and_with_one_is_that(run: str) -> None:
    for step in (1, 2, 3):
        save(run, step, state(step))

    assert same(load(run), state(3))
    assert same(load(run, step=2), state(2))


def test_save_into_any_fsspec_url_loads_again() -> None:
    url = "memory://test-dcp/run"
    save(url, 1, state(1))
    attempt_of(url).close()

    assert same(load(url), state(1))


def test_async_save_keeps_the_values_of_its_call(run: str) -> None:
    value = state(1)
    future = dcp.async_save(value, storage_writer=RunStorageWriter(run), checkpoint_id="1")
    value["model"]["weight"].zero_()
    future.result(timeout=60)  # type: ignore[union-attr]

    assert same(load(run), state(1))


@pytest.fixture
def caching() -> Iterator[Any]:
    """Makes planners that cache plans, in torch's one cache for the process."""
    yield lambda: DefaultSavePlanner(enable_plan_caching=True)
    for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
        getattr(SavePlanner, f"_cached_{name}").clear()


def test_save_with_a_planner_that_caches_writes_each_steps_own_values(run: str, caching: Any) -> None:
    for step in (1, 2, 3):
        save(run, step, {"model": state(step)["model"]}, caching())

    for step in (1, 2, 3):
        found = {"model": zeros()["model"]}
        dcp.load(found, storage_reader=RunStorageReader(run, step=step))
        assert torch.equal(found["model"]["weight"], state(step)["model"]["weight"])


def test_save_with_a_plan_of_an_attempt_that_has_ended_is_not_committed(run: str, caching: Any) -> None:
    for step in (1, 2):
        save(run, step, {"model": state(step)["model"]}, caching())
    dcp.load({"model": zeros()["model"]}, storage_reader=RunStorageReader(run, step=1))

    with pytest.raises(CheckpointException, match="the ranks wrote for the attempt of epoch 1, which has ended"):
        save(run, 2, {"model": state(2)["model"]}, caching())

    assert [commit.identity.epoch for commit in catalog(run).listing().commits] == [1, 1]


def test_save_with_a_plan_of_another_run_is_refused(run: str, caching: Any) -> None:
    save(run, 1, {"model": state()["model"]}, caching())
    with pytest.raises(
        CheckpointException, match="name a run that all nodes share; a planner with enable_plan_caching"
    ):
        save(f"{run}-b", 1, {"model": state()["model"]}, caching())
    attempt_of(f"{run}-b").close()


def test_save_of_one_tensor_in_chunks_of_one_rank_loads_whole(run: str) -> None:
    whole = torch.randn(6, 4)
    items = []

    class Cutting(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            (item,) = super().create_local_plan().items
            assert item.tensor_data is not None
            for at in (0, 2, 4):
                chunk = ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((2, 4)))
                data = replace(item.tensor_data, chunk=chunk)
                items.append(
                    replace(item, index=MetadataIndex("w", (at, 0)), type=WriteItemType.SHARD, tensor_data=data)
                )
            self.plan = SavePlan(list(items), planner_data={"w": ("w",)})
            return self.plan

        def resolve_data(self, write_item: Any) -> Any:
            at = write_item.index.offset[0]
            return whole[at : at + 2]

    save(run, 1, {"w": whole}, Cutting())
    found = {"w": torch.zeros(6, 4)}
    dcp.load(found, storage_reader=RunStorageReader(run))

    assert torch.equal(found["w"], whole)


def test_saved_checkpoint_is_proven_by_the_catalog_and_read_by_safetensors(run: str) -> None:
    from safetensors.torch import load_file

    save(run, 10, state(1))

    (commit,) = catalog(run).listing().commits
    assert (commit.identity.step, commit.identity.world_size) == (10, 1)
    assert list(verify_commit(catalog(run), commit)) == []
    assert torch.equal(load_file(payload(run))["model.weight"], state(1)["model"]["weight"])


def test_planners_bytes_are_stored_as_they_are(run: str) -> None:
    class Opaque(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            found = super().resolve_data(write_item)
            return io.BytesIO(b"\x80\x04no pickle at all") if isinstance(found, io.BytesIO) else found

    class Raw(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            seen.append(value.read())

    seen: list[bytes] = []
    save(run, 1, {"thing": object}, Opaque())
    dcp.load({"thing": None}, storage_reader=RunStorageReader(run), planner=Raw())

    assert seen == [b"\x80\x04no pickle at all"]


class CountingTier:
    """A tier that keeps the lengths of the ranges that were read through it."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.lengths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        self.lengths.append(end - begin)
        return self._tier.read_range(name, begin, end, deadline=deadline)


def test_load_of_one_tensor_reads_its_chunks_alone(run: str) -> None:
    big = {"model": {name: torch.full((4 << 20,), index) for index, name in enumerate("abcd")}}
    save(run, 1, big)
    found = {"model": {"c": torch.zeros(4 << 20, dtype=torch.int64)}}
    counting: list[CountingTier] = []

    class Reader(RunStorageReader):
        def read_metadata(self) -> Any:
            metadata = super().read_metadata()
            assert self._stored is not None
            counting.append(CountingTier(self._stored.catalog.tier))
            self._stored.catalog.tier = counting[0]  # type: ignore[assignment]
            return metadata

    dcp.load(found, storage_reader=Reader(run))

    assert torch.equal(found["model"]["c"], big["model"]["c"])
    assert sum(counting[0].lengths) <= 1.1 * (32 << 20)


def test_load_of_a_run_without_a_checkpoint_is_not_found(run: str) -> None:
    with pytest.raises(CheckpointException, match="there is no run here"):
        load(run)
    save(run, 1, state())
    with pytest.raises(CheckpointException, match=r"no checkpoint of step 2; committed steps are \[1\]"):
        load(run, step=2)


def test_load_without_its_record_is_not_found(run: str) -> None:
    save(run, 1, state())
    (record,) = Path(run).glob("checkpoints/*/commit-*.json")
    record.unlink()

    with pytest.raises(CheckpointException, match="there is no checkpoint; nothing is committed"):
        load(run)


def marks(run: str) -> list[str]:
    return sorted(path.name for path in (Path(run) / "marks").glob("*"))


def test_load_holds_its_step_against_a_collector_from_its_metadata_to_its_last_byte(run: str) -> None:
    for step in (1, 2, 3):
        save(run, step, state(step))
    found, looked = catalog(run), []

    class Watched(RunStorageReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            outcome = Collector(found, timeouts=TIMEOUTS).collect(Terms(Latest(1), found.newest_epoch()))
            assert outcome.doubts == () and outcome.failure is None
            looked.append((outcome.removed, outcome.spared, marks(run)))
            return super().read_data(plan, planner)

    loaded = zeros()
    dcp.load(loaded, storage_reader=Watched(run, step=1))
    ((removed, spared, held),) = looked
    assert [removal.step for removal in removed] == [2] and [step for step, _ in spared] == [1] and len(held) == 1
    assert same(loaded, state(1)) and marks(run) == []


def test_load_that_fails_or_is_given_up_holds_nothing(run: str) -> None:
    save(run, 1, state())
    payload(run).write_bytes(payload(run).read_bytes()[:-1] + b"\x01\x02")
    with pytest.raises(CheckpointException):
        load(run)
    assert marks(run) == []
    reader = RunStorageReader(run)
    reader.read_metadata()
    assert len(marks(run)) == 1
    del reader
    gc.collect()
    assert marks(run) == []


def test_load_of_a_changed_byte_names_object_rank_and_range(run: str) -> None:
    save(run, 1, state())
    data = bytearray(payload(run).read_bytes())
    data[-100] ^= 1
    payload(run).write_bytes(data)

    with pytest.raises(CheckpointException) as caught:
        load(run)

    error = cause(caught.value)
    assert isinstance(error, CorruptionError)
    assert "rank-00000.safetensors: rank 0" in str(error) and f"bytes 0 to {len(data)}" in str(error)


def test_save_of_a_step_that_is_there_is_a_conflict(run: str) -> None:
    save(run, 5, state(1))
    for step in (5, 4):
        with pytest.raises(CheckpointException, match="expected a save beyond step 5, which this attempt committed"):
            save(run, step, state(2))

    assert same(load(run), state(1))


def test_save_by_a_process_that_loaded_nothing_only_adds_beyond_the_newest(run: str) -> None:
    save(run, 5, state(1))
    attempt_of(run).close()  # as another process would find it

    with pytest.raises(CheckpointException, match="expected a save beyond step 5, which the run holds"):
        save(run, 3, state(2))
    save(run, 6, state(3))

    assert [commit.identity.epoch for commit in catalog(run).listing().commits] == [1, 2]


def test_save_by_a_process_that_loaded_nothing_leaves_older_steps_on_the_line_and_no_doubt(run: str) -> None:
    save(run, 1, state(1))
    attempt_of(run).close()
    save(run, 2, state(2))
    seen, terms = Seen.read(catalog(run)), Terms(Latest(1), 9)
    assert [commit.identity.epoch for commit in seen.line()] == [1, 2]
    plan = Collector(catalog(run), timeouts=TIMEOUTS).plan(seen, terms)
    assert plan.doubts == () and [removal.step for removal in plan.removals] == [1]


def test_save_after_loading_an_older_step_leaves_the_newer_ones_off_the_line(run: str) -> None:
    for step in (1, 2, 3):
        save(run, step, state(step))
    load(run, step=1)
    save(run, 2, state(9))

    assert same(load(run), state(9))
    (restored,) = [attempt.restored for attempt in catalog(run).attempts() if attempt.epoch == 2]
    assert restored is not None and restored["step"] == 1


def test_save_into_a_run_that_is_live_elsewhere_is_a_conflict(run: str) -> None:
    from ktrain.checkpoint.holder import Holder

    found = RunCatalog.open(run, timeouts=Timeouts())
    holder = Holder(found.tier, local_path=Path(run), timeouts=Timeouts())
    try:
        with pytest.raises(CheckpointException, match="live already"):
            save(run, 1, state())
    finally:
        holder.close()
    assert catalog(run).listing().commits == ()


def test_save_whose_files_are_damaged_before_the_record_is_not_committed(run: str) -> None:
    class Damaging(RunStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            payload(run).write_bytes(payload(run).read_bytes()[:-1])
            super().finish(metadata, results)

    with pytest.raises(CheckpointException) as caught:
        dcp.save(state(), storage_writer=Damaging(run), checkpoint_id="1")

    assert isinstance(cause(caught.value), CorruptionError)
    assert catalog(run).listing().commits == ()


def test_save_whose_record_is_there_is_done_though_nothing_more_could_be_written(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Blocking(RunStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            (Path(run) / "attempts" / "attempt-000001-committed.json").mkdir()
            super().finish(metadata, results)

    dcp.save(state(1), storage_writer=Blocking(run), checkpoint_id="1")

    assert same(load(run), state(1)) and "is committed; what is told of it" in caplog.text


def test_save_that_lacks_an_item_of_the_plan_is_not_committed(run: str) -> None:
    class Forgetful(RunStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            return super().write_data(replace(plan, items=plan.items[1:]), planner)

    with pytest.raises(CheckpointException, match="what the ranks wrote is not what was planned"):
        dcp.save(state(), storage_writer=Forgetful(run), checkpoint_id="1")

    assert catalog(run).listing().commits == ()


def test_save_with_a_plan_of_other_storage_is_refused(run: str) -> None:
    class Stale(DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            return replace(super().finish_plan(new_plan), storage_data="__0_")

    with pytest.raises(CheckpointException, match="the plan of this save was made for other storage"):
        save(run, 1, state(), Stale())


@pytest.mark.parametrize("form", ["memory://someone:hunter2@{}/run", "memory://{}/run?token=hunter2"])
def test_storage_of_a_url_with_credentials_is_refused_before_anything_is_made(form: str) -> None:
    name = f"refused-{ids.random_id()}"
    url = form.format(name)
    for make in (RunStorageWriter, RunStorageReader, newest_step):
        with pytest.raises(ConfigError, match="without password, token and query") as caught:
            make(url)
        assert name in str(caught.value)
        assert "hunter2" not in "".join(traceback.format_exception_only(caught.value))
    with pytest.raises(NotFoundError, match="there is no run here"):
        catalog(f"memory://{name}/run")


def test_save_without_a_step_or_a_coordinator_is_refused(run: str) -> None:
    with pytest.raises(CheckpointException, match="no step is named"):
        dcp.save(state(), storage_writer=RunStorageWriter(run))
    with pytest.raises(ConfigError, match="use_collectives=False"):
        dcp.save(state(), storage_writer=RunStorageWriter(run, step=1), use_collectives=False)


def test_load_of_a_checkpoint_that_checkpointer_made_says_how_to_read_it(tmp_path: Path) -> None:
    import ktrain

    run = str(tmp_path / "own")
    model = torch.nn.Linear(2, 2)
    with ktrain.Checkpointer(run, state={"model": model}, every=1) as ckpt:
        ckpt.restore()
        ckpt.step(1)

    with pytest.raises(CheckpointException, match="was not saved through DCP; .* --to dcp"):
        dcp.load({"model": model.state_dict()}, storage_reader=RunStorageReader(run))


def test_global_plan_of_ranks_that_chose_different_steps_is_a_conflict(run: str) -> None:
    from torch.distributed.checkpoint.planner import LoadPlan

    for step in (1, 2):
        save(run, step, state(step))
    plans = []
    for step in (1, 2):
        reader = RunStorageReader(run, step=step)
        reader.read_metadata()
        plans.append(reader.prepare_local_plan(LoadPlan([])))

    with pytest.raises(ConflictError, match="rank 0 reads step 1 .* rank 1 reads step 2"):
        RunStorageReader(run).prepare_global_plan(plans)


@pytest.mark.parametrize(
    ("checkpoint_id", "step"),
    [(100, 100), ("100", 100), ("step-7", 7), ("outputs/checkpoint/step-30", 30), (Path("a/step_4"), 4)],
)
def test_step_of_names_that_frameworks_use(checkpoint_id: Any, step: int) -> None:
    assert step_of(checkpoint_id) == step


@pytest.mark.parametrize("checkpoint_id", ["", "latest", "step-", "a7b"])
def test_step_of_other_names_is_refused(checkpoint_id: str) -> None:
    with pytest.raises(ConfigError, match="expected a step"):
        step_of(checkpoint_id)


def test_stored_checkpoint_of_an_unknown_step_is_not_found(run: str) -> None:
    save(run, 1, state())

    with pytest.raises(NotFoundError, match="no checkpoint of step 9"):
        choose_commit(catalog(run), 9)


def test_manifest_holds_planner_data_as_json(run: str) -> None:
    save(run, 1, state())
    (manifest,) = Path(run).glob("checkpoints/*/data-*/*.json")

    about = json.loads(manifest.read_text())["objects"]["dcp"]

    assert about["bytes"] == ["extra.epoch", "extra.lr", "extra.names"]
    assert about["planner_data"]["model.weight"] == {"$": "tuple", "v": ["model", "weight"]}
