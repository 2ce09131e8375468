"""The code of docs/guides/ecosystem.md, run as it stands there; skipped where its project is not installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.checkpoint.dcp_attempt import attempt_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "ecosystem.md"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the projects that are tried


def recipe(heading: str) -> dict[str, Any]:
    """The names that the Python blocks below a heading define."""
    _, _, text = PAGE.read_text().partition(f"\n## {heading}\n")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    url = str(tmp_path / "run")
    yield url
    attempt_of(url).close()


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def committed(run: str) -> list[int]:
    """The committed steps, each of them proven."""
    catalog = RunCatalog.open(run, timeouts=Timeouts(), create=False)
    commits = catalog.listing().commits
    assert [finding for commit in commits for finding in verify_commit(catalog, commit)] == []
    return [commit.identity.step for commit in commits]


def test_recipe_of_dcp_saves_and_resumes(run: str) -> None:
    names = recipe("torch DCP")
    model, optimizer = make(1)
    assert names["resume"](run, *make(2)) == 0
    names["save"](run, model, optimizer, 10)

    other, its_optimizer = make(2)
    assert names["resume"](run, other, its_optimizer) == 10
    step(model, optimizer)
    step(other, its_optimizer)

    assert same(model, other) and committed(run) == [10]


def test_recipe_of_import_and_export_from_python(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names = recipe("Hugging Face and safetensors")
    (tmp_path / "in").mkdir()
    weights = {"body.weight": torch.randn(2, 3), "lm_head.weight": torch.ones(2)}
    save_file(weights, tmp_path / "in" / "model.safetensors")

    names["fine_tune_start"](tmp_path / "in", tmp_path / "run")
    names["publish"](tmp_path / "run", tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"body.weight"} and torch.equal(found["body.weight"], weights["body.weight"])


def test_weights_of_transformers_come_in_are_trained_and_go_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import shutil

    import ktrain
    from ktrain.exchange.export import export_run
    from ktrain.exchange.importing import Selection, import_checkpoint

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads)

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(torch.arange(8)[None]).logits

    published = fresh(1)
    published.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()

    tied = Selection(ties={"lm_head.weight": "model.embed_tokens.weight"})
    import_checkpoint(tmp_path / "in", tmp_path / "run", form="hf", selection=tied)
    model = fresh(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with ktrain.Checkpointer(tmp_path / "run", state={"model": model, "optimizer": optimizer}, every=1) as ckpt:
        assert ckpt.restore() == 0 and torch.equal(logits(model), logits(published))
        model.train()(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        ckpt.step(1)

    export_run(tmp_path / "run", tmp_path / "out", form="hf", max_shard_nbytes=5000)
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), logits(published))


def test_recipe_of_accelerate_saves_and_resumes(run: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    names = recipe("Accelerate")
    names.update({name: recipe("torch DCP")[name] for name in ("save", "resume")})
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make(1))
    names["save_prepared"](run, accelerator, model, optimizer, 3)
    other, its_optimizer = accelerator.prepare(*make(2))

    assert names["resume_prepared"](run, accelerator, other, its_optimizer) == 3
    step(model, optimizer)
    step(other, its_optimizer)

    assert same(model, other) and committed(run) == [3]


def test_recipe_of_lightning_resumes_weights_optimizer_and_loops(run: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, _ = make(1)
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.model(batch).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    def fit(module: Any, max_steps: int, ckpt_path: str | None = None, **options: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", max_steps=max_steps, **quiet, **options)
        # Every batch alike: in mid-epoch Lightning begins with the first one again.
        data = torch.utils.data.DataLoader(torch.ones(20, 3), batch_size=2)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    def ours() -> dict[str, Any]:
        names = {"filename": "step-{step}", "auto_insert_metric_name": False}
        keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, **names)
        return {"plugins": [recipe("Lightning")["RunCheckpointIO"](run)], "callbacks": [keep]}

    whole, first, second = Module(), Module(), Module()
    fit(first, 4, **ours())
    trainer = fit(second, 6, ckpt_path="step-4.ckpt", **ours())
    fit(whole, 6, enable_checkpointing=False)

    assert trainer.global_step == 6 and committed(run) == [2, 4, 6]
    assert first.losses + second.losses == whole.losses and same(second.model, whole.model)


def test_recipe_of_torchtitan_saves_and_resumes(run: str, tmp_path: Path) -> None:
    pytest.importorskip("torchtitan")
    import torch.distributed as dist
    from torchtitan.config import job_config

    class Parts:
        """What torchtitan calls a container: something with a state dict."""

        def __init__(self, value: Any) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    def manager(model: nn.Module, value: int, mode: str) -> Any:
        made = type("Manager", (recipe("torchtitan")["RunCheckpointManager"],), {"run": run})
        config = job_config.Checkpoint(enable=True, interval=1, keep_latest_k=0, async_mode=mode)
        parts = (None, [model], Parts(value), Parts(value), {"train_state": Parts(value)})
        return made(*parts, config, None, base_folder=str(tmp_path))

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for mode, at in (("disabled", 1), ("async", 2)):
            model, other = make(at)[0], make(9)[0]
            saving = manager(model, at, mode)
            saving.save(at)
            saving._async_wait()
            loading = manager(other, 0, mode)
            assert loading.load() is True
            assert same(model, other) and loading.states["train_state"].value == at
    finally:
        dist.destroy_process_group()
    assert committed(run) == [1, 2]
