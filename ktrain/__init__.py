"""ktrain: training that survives failures.

The public names are loaded on first use, so that `import ktrain` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrain.checkpoint.checkpointer import Checkpointer as Checkpointer
    from ktrain.jobs.job import Job as Job
    from ktrain.jobs.start import attach as attach
    from ktrain.jobs.start import launch as launch
    from ktrain.launcher.places import Kubernetes as Kubernetes
    from ktrain.launcher.places import Local as Local
    from ktrain.state.train_state import per_rank as per_rank
    from ktrain.state.train_state import trainable as trainable
    from ktrain.train.loss import Loss as Loss
    from ktrain.train.report import Report as Report
    from ktrain.train.session import session as session
    from ktrain.train.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Checkpointer": "ktrain.checkpoint.checkpointer",
    "attach": "ktrain.jobs.start",
    "Job": "ktrain.jobs.job",
    "Kubernetes": "ktrain.launcher.places",
    "launch": "ktrain.jobs.start",
    "Local": "ktrain.launcher.places",
    "per_rank": "ktrain.state.train_state",
    "Loss": "ktrain.train.loss",
    "Report": "ktrain.train.report",
    "session": "ktrain.train.session",
    "trainable": "ktrain.state.train_state",
    "Trainer": "ktrain.train.trainer",
}
__all__ = [
    "Checkpointer", "Job", "Kubernetes", "Local", "Loss", "Report", "Trainer", "__version__", "attach", "launch",
    "per_rank", "session", "trainable",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ktrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
