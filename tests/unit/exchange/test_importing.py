"""Imports: a run that begins with foreign weights, and sources and runs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import ktrain
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.checkpoint.holder import Holder
from ktrain.errors import ConfigError, ConflictError, CorruptionError, NotFoundError
from ktrain.exchange.export import export_run
from ktrain.exchange.importing import Selection, import_checkpoint
from tests.unit.checkpoint.exchange_runs import Tied, make_run, plain_tensors, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def weights(seed: int = 1) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in plain_tensors(Tied(seed)).items()}


TIES = Selection(ties={"head.weight": "embed.weight"})


def restored(run: Path, **parts: Any) -> tuple[int, Tied]:
    """The step that a new program continues from, and its model."""
    model = Tied(seed=7)
    with ktrain.Checkpointer(run, state={"model": model, **parts}, every=1) as ckpt:
        return ckpt.restore(), model


def is_same(model: Tied, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def write_safetensors(source: Path) -> Path:
    save_file(weights(), source / "x.safetensors")
    return source / "x.safetensors"


def write_hf(source: Path) -> Path:
    names = sorted(weights())
    files = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, held in files.items():
        save_file({name: weights()[name] for name in held}, source / file, {"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


def write_pt(source: Path) -> Path:
    torch.save({"model": weights(), "epoch": 3}, source / "x.pt")
    return source / "x.pt"


def write_dcp(source: Path) -> Path:
    state = {"model": weights(), "optim": {"m": torch.ones(2)}, "epoch": 3}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(source / "dcp"))
    return source / "dcp"


SOURCES = {"safetensors": write_safetensors, "hf": write_hf, "pt": write_pt, "dcp": write_dcp}


@pytest.mark.parametrize("form", sorted(SOURCES))
def test_import_is_what_checkpointer_continues_from(form: str, source: Path, tmp_path: Path) -> None:
    done = import_checkpoint(SOURCES[form](source), tmp_path / "run", form=form, selection=TIES)

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    step, model = restored(tmp_path / "run", optimizer=optimizer)

    assert step == 0 and is_same(model, weights())
    assert (done.num_tensors, done.step, done.part) == (7, 0, "model")
    assert done.left_out == {"dcp": ("epoch", "optim.m")}.get(form, ())


@pytest.mark.parametrize("form", sorted(SOURCES))
def test_import_is_proven_by_the_catalog(form: str, source: Path, tmp_path: Path) -> None:
    import_checkpoint(SOURCES[form](source), tmp_path / "run", form=form)
    catalog = RunCatalog.open(str(tmp_path / "run"), timeouts=Timeouts(), create=False)

    (commit,) = catalog.listing().commits
    assert list(verify_commit(catalog, commit)) == []


def test_import_then_training_saves_all_parts_and_continues_with_them(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_checkpoint(write_safetensors(source), run, form="safetensors", step=40, selection=TIES)
    model = Tied(seed=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with ktrain.Checkpointer(run, state={"model": model, "optimizer": optimizer}, every=1) as ckpt:
        assert ckpt.restore() == 40
        train(model, optimizer)
        ckpt.step(41)

    other = Tied(seed=8)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.9)
    with ktrain.Checkpointer(run, state={"model": other, "optimizer": fresh}, every=1) as ckpt:
        assert ckpt.restore() == 41
    assert is_same(other, plain_tensors(model)) and len(fresh.state) == len(optimizer.state)


def test_restore_of_an_import_says_which_parts_stay(source: Path, tmp_path: Path) -> None:
    import_checkpoint(write_safetensors(source), tmp_path / "run", form="safetensors", selection=TIES)

    restored(tmp_path / "run", optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5))

    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    said = [event["message"] for event in events if event["kind"] == "notice"]
    assert any("part 'optimizer' is not among the imported ones; it stays" in text for text in said)
    # Of no attempt: nothing was trained, and a report counts no failure.
    assert [event["kind"] for event in events if event["attempt"] == 0] == ["notice", "committed"]


def test_restore_of_a_checkpoint_of_ours_still_refuses_a_missing_part(tmp_path: Path) -> None:
    run, _, _ = make_run(tmp_path, steps=1)

    with pytest.raises(ConfigError, match="schedule: the state has this part, the checkpoint has not"):
        restored(Path(run), optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1), schedule=nn.Linear(1, 1))


def test_restore_of_an_import_still_refuses_what_the_state_has_not(source: Path, tmp_path: Path) -> None:
    import_checkpoint(write_safetensors(source), tmp_path / "run", form="safetensors", part="teacher")

    with pytest.raises(ConfigError, match="teacher: the checkpoint has this part, the state has not"):
        restored(tmp_path / "run")


def test_import_without_the_tie_is_refused_at_restore_by_name(source: Path, tmp_path: Path) -> None:
    import_checkpoint(write_safetensors(source), tmp_path / "run", form="safetensors")

    with pytest.raises(ConfigError, match="model/head.weight: expected .* found none stored"):
        restored(tmp_path / "run")


def test_export_then_import_gives_the_same_weights(tmp_path: Path) -> None:
    run, model, _ = make_run(tmp_path)
    for form, out in (("hf", "hf"), ("safetensors", "one.safetensors"), ("dcp", "dcp")):
        export_run(run, tmp_path / out, form=form)
        selection = TIES if form != "dcp" else Selection(key="model", exclude=("_extra_state",))
        import_checkpoint(tmp_path / out, tmp_path / f"run-{form}", form=form, selection=selection)

        assert is_same(restored(tmp_path / f"run-{form}")[1], plain_tensors(model))


def test_import_into_any_fsspec_url_can_be_exported_again(source: Path, tmp_path: Path) -> None:
    import_checkpoint(write_safetensors(source), "memory://test-import/run", form="safetensors")
    export_run("memory://test-import/run", tmp_path / "back", form="safetensors")

    found = load_file(tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_import_with_key_and_exclude_takes_what_is_below_and_not_the_rest(source: Path, tmp_path: Path) -> None:
    save_file({"net.a.w": torch.ones(2), "net.b.w": torch.ones(3), "other": torch.ones(4)}, source / "x.safetensors")

    done = import_checkpoint(
        source / "x.safetensors", tmp_path / "run", form="safetensors", selection=Selection("net", ("b",))
    )

    assert (done.num_tensors, done.left_out) == (1, ("b.w", "other"))
    export_run(tmp_path / "run", tmp_path / "back", form="safetensors")
    assert set(load_file(tmp_path / "back")) == {"a.w"}


def test_import_into_a_run_with_checkpoints_is_a_conflict(source: Path, tmp_path: Path) -> None:
    run, _, _ = make_run(tmp_path, steps=1)

    with pytest.raises(ConflictError, match="expected a run without checkpoints, it has committed step 1"):
        import_checkpoint(write_safetensors(source), run, form="safetensors")


def test_import_that_failed_on_the_way_can_be_done_again(source: Path, tmp_path: Path) -> None:
    folder = write_dcp(source)
    (data,) = folder.glob("*.distcp")
    good = data.read_bytes()
    data.write_bytes(good[: len(good) // 2])
    with pytest.raises(CorruptionError, match="torch could not read"):
        import_checkpoint(folder, tmp_path / "run", form="dcp", selection=TIES)
    assert not list((tmp_path / "run").rglob("commit-*"))

    data.write_bytes(good)
    import_checkpoint(folder, tmp_path / "run", form="dcp", selection=TIES)

    assert is_same(restored(tmp_path / "run")[1], weights())


def test_import_into_a_live_run_is_a_conflict(source: Path, tmp_path: Path) -> None:
    catalog = RunCatalog.open(str(tmp_path / "run"), timeouts=Timeouts())
    holder = Holder(catalog.tier, local_path=tmp_path / "run", timeouts=Timeouts())
    try:
        with pytest.raises(ConflictError, match="live already"):
            import_checkpoint(write_safetensors(source), tmp_path / "run", form="safetensors")
    finally:
        holder.close()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_import_of_a_pt_file_with_other_objects_is_refused_and_runs_nothing(source: Path, tmp_path: Path) -> None:
    torch.save({"model": weights(), "evil": Evil(tmp_path / "touched")}, source / "x.pt")

    with pytest.raises(ConfigError, match="cannot read it with weights_only=True"):
        import_checkpoint(source / "x.pt", tmp_path / "run", form="pt")

    assert not (tmp_path / "touched").exists() and not (tmp_path / "run").exists()


def test_import_of_dcp_metadata_with_other_classes_is_refused_and_runs_nothing(source: Path, tmp_path: Path) -> None:
    import pickle

    folder = write_dcp(source)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "touched")))

    with pytest.raises(ConfigError, match=r"\.metadata: its metadata names pathlib.Path.touch, which is not read"):
        import_checkpoint(folder, tmp_path / "run", form="dcp")

    assert not (tmp_path / "touched").exists() and not (tmp_path / "run").exists()


def test_import_of_dcp_objects_leaves_them_closed(source: Path, tmp_path: Path) -> None:
    state = {"model": weights(), "evil": Evil(tmp_path / "touched")}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(source / "dcp"))

    assert import_checkpoint(source / "dcp", tmp_path / "run", form="dcp").left_out == ("evil",)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("form", ["safetensors", "pt", "dcp", "hf"])
def test_import_of_nothing_is_not_found(form: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        import_checkpoint(source / "absent", tmp_path / "run", form=form)
    if form in ("hf", "dcp"):
        with pytest.raises(NotFoundError, match=str(source)):
            import_checkpoint(source, tmp_path / "run", form=form)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_import_of_a_file_that_was_cut_is_corruption(form: str, source: Path, tmp_path: Path) -> None:
    SOURCES[form](source)
    victim = min(source.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-4])

    with pytest.raises(CorruptionError, match=r"\.safetensors: expected \d+ bytes, as its header says"):
        import_checkpoint(victim if form == "safetensors" else source, tmp_path / "run", form=form)


def test_import_of_an_index_that_differs_from_its_files_is_corruption(source: Path, tmp_path: Path) -> None:
    index = write_hf(source) / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["more"] = min(value["weight_map"].values())
    index.write_text(json.dumps(value))

    with pytest.raises(CorruptionError, match=r"differ about the tensors \['more'\]"):
        import_checkpoint(source, tmp_path / "run", form="hf")


def test_import_of_an_index_that_leads_away_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))

    with pytest.raises(ConfigError, match="expected names of .safetensors files beside it"):
        import_checkpoint(source, tmp_path / "run", form="hf")


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (Selection(key="nope"), "no tensors below 'nope'"),
        (Selection(exclude=("embed", "norm", "scale")), "no tensor is left to take"),
        (Selection(ties={"embed.weight": "scale"}), "tie embed.weight=scale"),
        (Selection(ties={"head.weight": "nope"}), "tie head.weight=nope"),
    ],
)
def test_import_of_a_selection_that_cannot_be_is_refused(
    selection: Selection, text: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        import_checkpoint(write_safetensors(source), tmp_path / "run", form="safetensors", selection=selection)
    assert not (tmp_path / "run").exists()
