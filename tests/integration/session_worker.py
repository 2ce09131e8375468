"""One rank of a small training by a session; `test_session_ranks.py` starts it. Arguments: a JSON object."""

from __future__ import annotations

import json
import os
import sys

import torch

import ktrain
from tests.unit.train.fakes import Net, Regression, squared_error


def main() -> None:
    args = json.loads(sys.argv[1])
    with ktrain.session(args["run"], mesh=args["mesh"], seed=3, every=2, precision=args["precision"]) as s:
        model = s.shard(lambda: Net(args["dropout"]))
        opt = torch.optim.AdamW(model.parameters(), lr=0.05)
        data = s.samples(Regression(), global_batch=16, micro_batch=args["micro_batch"])
        s.track(model=model, opt=opt)
        for step in s.steps(args["steps"], data):
            for batch in step:
                loss = squared_error(model, batch)
                bad = step.number == args["bad_step"] and s.rank == s.world_size - 1
                step.backward(ktrain.Loss(loss.sum * float("nan") if bad else loss.sum, loss.count))
            step.update(opt, clip=args["clip"])
            if step.number == args["crash_step"]:
                os._exit(41)
        held_out = s.mean_loss(lambda batch: squared_error(model, batch), Regression(21), micro_batch=2)
    if s.rank == 0:
        print(json.dumps({"held_out": held_out, "restored": s.restored_step}))


if __name__ == "__main__":
    main()
