from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ktrain
from ktrain.errors import ConfigError, KtrainError
from ktrain.train.loss import Loss
from ktrain.train.session import session
from tests.unit.train.fakes import Net, Regression, Shelf, open_session, squared_error


def train(
    shelf: Shelf,
    steps: int,
    *,
    every: int = 1,
    dropout: float = 0.0,
    micro: int | None = None,
    stop_after: int | None = None,
) -> list[tuple[int, float]]:
    """Trains until the run has made `steps`; an error after `stop_after` steps plays a crash."""
    with open_session(shelf, every=every) as s:
        model = s.shard(lambda: Net(dropout))
        opt = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [10, 30], gamma=0.5)
        data = s.samples(Regression(), global_batch=12, micro_batch=micro)
        s.track(model=model, opt=opt, scheduler=scheduler)
        for step in s.steps(steps, data):
            for batch in step:
                step.backward(squared_error(model, batch))
            step.update(opt, clip=1.0)
            if step.number == stop_after:
                raise RuntimeError("crash")
    return shelf.losses


def test_session_uninterrupted_learns_and_counts_steps() -> None:
    losses = train(Shelf(), 40)
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses[-1][1] < losses[0][1] / 2


def test_session_resumed_after_crash_has_the_losses_of_one_that_was_not() -> None:
    whole = dict(train(Shelf(), 16, dropout=0.3))
    shelf = Shelf()
    with pytest.raises(RuntimeError, match="crash"):
        train(shelf, 16, dropout=0.3, every=3, stop_after=8)
    first = dict(shelf.losses)
    shelf.losses.clear()
    second = dict(train(shelf, 16, dropout=0.3, every=3))
    assert min(second) == 7  # the snapshot of step 6 was the newest
    assert first == {step: whole[step] for step in first}
    assert second == {step: whole[step] for step in second}


def test_session_accumulated_batch_equals_batch_in_one_pass() -> None:
    whole, parts = train(Shelf(), 10), train(Shelf(), 10, micro=3)
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_session_update_is_that_of_the_mean_over_counts() -> None:
    shelf = Shelf()
    with open_session(shelf) as s:
        model = s.shard(lambda: nn.Linear(4, 1))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        data = s.samples(Regression(), global_batch=8, micro_batch=2)
        s.track(model=model, opt=opt)
        batches = list(data.micro_batches())
        for step in s.steps(1, data):
            for index, batch in enumerate(step):
                x, y = batch
                x, y = x[: 1 + index % 2], y[: 1 + index % 2]  # unequal counts: 1, 2, 1, 2
                step.backward(Loss(((model(x).squeeze(-1) - y) ** 2).sum(), len(y)))
            step.update(opt)
    reference = nn.Linear(4, 1)
    reference.load_state_dict(before)
    kept = [(x[: 1 + index % 2], y[: 1 + index % 2]) for index, (x, y) in enumerate(batches)]
    x, y = torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])
    loss = ((reference(x).squeeze(-1) - y) ** 2).mean()
    loss.backward()
    assert shelf.losses == [(1, pytest.approx(loss.item(), rel=1e-6))]
    for (name, value), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, expected - 0.1 * expected.grad, msg=name)


def test_session_clip_limits_the_step() -> None:
    def moved(clip: float | None) -> float:
        with open_session(Shelf()) as s:
            model = s.shard(lambda: nn.Linear(4, 1))
            before = model.weight.detach().clone()
            opt = torch.optim.SGD(model.parameters(), lr=1.0)
            data = s.samples(Regression(), global_batch=8)
            s.track(model=model, opt=opt)
            for step in s.steps(1, data):
                for batch in step:
                    step.backward(squared_error(nn.Sequential(model, nn.Flatten(0)), batch))
                step.update(opt, clip=clip)
                assert step.grad_norm is not None and step.grad_norm > 0.05
            return (model.weight.detach() - before).norm().item()

    assert moved(0.05) <= 0.05 + 1e-6 < moved(None)


def test_session_bare_tensor_is_a_mean_over_samples_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    with open_session(shelf) as s:
        model = s.shard(Net)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = s.samples(Regression(), global_batch=12, micro_batch=4)
        s.track(model=model, opt=opt)
        for step in s.steps(10, data):
            for batch in step:
                x, y = batch
                step.backward(((model(x) - y) ** 2).mean())
            step.update(opt, clip=1.0)
    counted = Shelf()
    with open_session(counted) as s:
        model = s.shard(Net)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = s.samples(Regression(), global_batch=12, micro_batch=4)
        s.track(model=model, opt=opt)
        for step in s.steps(10, data):
            for batch in step:
                step.backward(squared_error(model, batch))
            step.update(opt, clip=1.0)
    assert [loss for _, loss in shelf.losses] == pytest.approx([loss for _, loss in counted.losses], rel=1e-5)
    assert sum("bare tensor" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_session_loss_not_finite_raises_before_anything_changes(bad: float) -> None:
    shelf = Shelf()
    with pytest.raises(KtrainError, match=r"step 3: .*loss (nan|inf)"), open_session(shelf) as s:
        model = s.shard(Net)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = s.samples(Regression(), global_batch=12)
        s.track(model=model, opt=opt)
        for step in s.steps(5, data):
            for batch in step:
                loss = squared_error(model, batch)
                step.backward(Loss(loss.sum * (bad if step.number == 3 else 1.0), loss.count))
            before = [value.detach().clone() for value in model.parameters()]
            step.update(opt)
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))
    assert [step for step, _ in shelf.losses] == [1, 2]
    assert shelf.closed == [False]


def test_session_gradient_not_finite_raises_though_the_loss_is_finite() -> None:
    with pytest.raises(KtrainError, match=r"step 1: .*gradient norm (nan|inf)"), open_session(Shelf()) as s:
        weight = nn.Linear(1, 1, bias=False)
        model = s.shard(weight)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        data = s.samples([torch.zeros(1)] * 4, global_batch=4)
        s.track(model=model, opt=opt)
        for step in s.steps(1, data):
            for batch in step:
                step.backward(Loss(torch.sqrt(model(batch).abs()).sum(), len(batch)))
            step.update(opt)


def test_session_end_without_error_closes_with_success() -> None:
    shelf = Shelf()
    train(shelf, 2)
    assert shelf.closed == [True]


def test_session_run_that_is_complete_makes_no_step() -> None:
    shelf = Shelf()
    train(shelf, 4)
    shelf.losses.clear()
    assert train(shelf, 4) == []
    assert shelf.closed == [True, True]


def test_session_model_from_factory_depends_on_seed_alone() -> None:
    def weights(seed: int, draws: int) -> torch.Tensor:
        with open_session(Shelf(), seed=seed) as s:
            torch.rand(draws)
            return torch.cat([value.detach().flatten() for value in s.shard(Net).parameters()])

    assert torch.equal(weights(1, 0), weights(1, 5))
    assert not torch.equal(weights(1, 0), weights(2, 0))


def test_session_two_models_do_not_begin_alike() -> None:
    with open_session(Shelf()) as s:
        assert not torch.equal(s.shard(Net).layers[0].weight, s.shard(Net).layers[0].weight)


def test_session_bf16_computes_in_bfloat16_and_returns_float32() -> None:
    seen: list[torch.dtype] = []
    with open_session(Shelf(), precision="bf16") as s:
        model = s.shard(Net)
        model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        found = model(torch.ones(2, 4))
    assert seen == [torch.bfloat16]
    assert found.dtype is torch.float32
    assert all(value.dtype is torch.float32 for value in model.parameters())


def test_session_evaluation_is_logged_and_leaves_training_as_it_was() -> None:
    def losses(evaluate: bool) -> tuple[list[tuple[int, float]], list[dict[str, float]]]:
        shelf = Shelf()
        with open_session(shelf) as s:
            model = s.shard(lambda: Net(0.5))
            opt = torch.optim.AdamW(model.parameters(), lr=0.01)
            data = s.samples(Regression(), global_batch=8)
            s.track(model=model, opt=opt)
            if evaluate:
                s.evaluate(
                    lambda: (
                        torch.rand(3),
                        s.mean_loss(lambda b: squared_error(model, b), Regression(10), micro_batch=4),
                    )[1],
                    every=2,
                )
            for step in s.steps(5, data):
                for batch in step:
                    step.backward(squared_error(model, batch))
                step.update(opt)
            assert model.training
        return shelf.losses, shelf.values

    with_evaluation, values = losses(True)
    assert with_evaluation == losses(False)[0]
    assert len(values) == 3 and all(set(value) == {"eval_loss"} for value in values)  # steps 2, 4 and the last


def test_session_evaluates_a_module_that_is_marked_trainable_in_evaluation_mode() -> None:
    seen: list[bool] = []
    with open_session(Shelf(), every=100) as s:
        model = s.shard(Net)
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        data = s.samples(Regression(), global_batch=8)
        s.track(model=ktrain.trainable(model), opt=opt)
        s.evaluate(lambda: seen.append(model.training) or 0.0, every=1)
        for step in s.steps(1, data):
            for batch in step:
                step.backward(squared_error(model, batch))
            step.update(opt)
        assert model.training
    assert seen == [False]


def test_session_mean_loss_of_uneven_data_counts_each_sample_once() -> None:
    data = Regression(10)
    with open_session(Shelf()) as s:
        model = s.shard(Net)
        found = s.mean_loss(lambda batch: squared_error(model, batch), data, micro_batch=4)
        expected = ((model(data.x) - data.y) ** 2).mean().item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_session_mesh_that_is_unknown_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'fsdp', 'ddp', 'none', found 'tp'"):
        session("runs/x", mesh="tp")


def test_session_outside_its_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="with ktrain.session"):
        session("runs/x").shard(Net)


@pytest.mark.parametrize(
    "mistake", ["no update", "two updates", "no optimizer", "missing backward", "late track", "taken name"]
)
def test_session_used_wrongly_is_refused(mistake: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[mistake]), open_session(Shelf()) as s:
        model = s.shard(Net)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = s.samples(Regression(), global_batch=8, micro_batch=4)
        s.track(model=model, opt=opt)
        if mistake == "taken name":
            s.track(data=data)
        for step in s.steps(2, data):
            if mistake == "late track":
                s.track(other=model)
            for batch in step:
                step.backward(squared_error(model, batch))
                if mistake == "missing backward":
                    break
            if mistake != "no update":
                step.update(*([] if mistake == "no optimizer" else [opt]))
            if mistake == "two updates":
                step.update(opt)


MISTAKES = {
    "no update": "ended without update",
    "two updates": "called twice",
    "no optimizer": "needs the optimizer",
    "missing backward": r"expected 2 calls of backward\(\).*found 1",
    "late track": "too late",
    "taken name": "'data' is taken",
}
