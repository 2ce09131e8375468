"""`ktrain ckpt`: what is committed where, whether it is proven, and what may go. One file per verb.

A verb loads nothing at import that needs torch, Ray or fsspec.
"""

from __future__ import annotations

import click

from ktrain.cli.ckpt.diff import diff
from ktrain.cli.ckpt.gc import collect_garbage
from ktrain.cli.ckpt.ls import list_checkpoints
from ktrain.cli.ckpt.pin import pin
from ktrain.cli.ckpt.repair import repair
from ktrain.cli.ckpt.rm import remove
from ktrain.cli.ckpt.show import show
from ktrain.cli.ckpt.verify import verify


@click.group()
def ckpt() -> None:
    """List, show, prove, pin and remove checkpoints."""


for _verb in (list_checkpoints, show, verify, diff, repair, pin, remove, collect_garbage):
    ckpt.add_command(_verb)
