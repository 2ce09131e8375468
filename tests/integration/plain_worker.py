"""A small training with a Checkpointer in plain python or under torchrun; tests start it. Arguments: a JSON object."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist

import ktrain
from ktrain.base import settings
from ktrain.base.exits import exit_code
from ktrain.errors import ConfigError, KtrainError


class Training:
    """A network with dropout, so that generators matter, and a running mean, so that buffers do."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(11)
        torch.set_num_threads(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)

    def step(self) -> torch.Tensor:
        batch = torch.randn(8, 4)
        loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        if dist.is_initialized():
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        return loss

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def await_commit(ckpt: ktrain.Checkpointer, tier: str, step: int) -> None:
    deadline = ktrain.base.clock.Deadline.after(settings.timeouts().drain_s)
    while ckpt.committed.get(tier, 0) < step:
        deadline.check(f"commit step {step} in {tier}")
        threading.Event().wait(0.02)


def train(args: dict[str, Any]) -> None:
    training = Training(args["width"])
    before = [value.clone() for value in training.model.state_dict().values()]
    policies = {name: args[name] for name in ("every", "keep", "gate")}
    ckpt = ktrain.Checkpointer(args["run"], state=training.state(), **policies)
    try:
        start = ckpt.restore()
    except ConfigError:
        after = training.model.state_dict().values()
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "the model was changed"
        raise
    say(restored=start)
    if args["spoil"]:
        with torch.no_grad():
            training.model[0].weight.mul_(1.5)  # as if something had gone wrong that no digest sees
    for step in range(start + 1, args["steps"] + 1):
        if step == args["fail_at"]:
            raise ValueError(f"step {step} fails")
        ckpt.step(step, loss=training.step())
        for tier in ("bucket", "disk"):
            if step in args[f"await_{tier}"]:
                await_commit(ckpt, tier, step)
        if step == args["hold_at"]:
            say(held=step)
            sys.stdin.read()  # until the test closes it
        if args["linger_s"]:
            threading.Event().wait(args["linger_s"])
    ckpt.close()


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> int:
    args = json.loads(sys.argv[1])
    if settings.worker_settings().world_size > 1:
        dist.init_process_group("gloo")
    try:
        train(args)
    except KtrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    import ktrain.base.clock  # the package's names are lazy

    sys.exit(main())
