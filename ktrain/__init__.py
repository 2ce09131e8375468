"""ktrain: training that survives failures.

The public names are loaded on first use, so that `import ktrain` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrain.checkpoint.checkpointer import Checkpointer as Checkpointer
    from ktrain.state.train_state import per_rank as per_rank
    from ktrain.state.train_state import trainable as trainable
    from ktrain.train.loss import Loss as Loss
    from ktrain.train.report import Report as Report
    from ktrain.train.session import session as session
    from ktrain.train.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Checkpointer": "ktrain.checkpoint.checkpointer",
    "per_rank": "ktrain.state.train_state",
    "Loss": "ktrain.train.loss",
    "Report": "ktrain.train.report",
    "session": "ktrain.train.session",
    "trainable": "ktrain.state.train_state",
    "Trainer": "ktrain.train.trainer",
}
__all__ = ["Checkpointer", "Loss", "Report", "Trainer", "__version__", "per_rank", "session", "trainable"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ktrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
