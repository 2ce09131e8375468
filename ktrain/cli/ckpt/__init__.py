"""`ktrain ckpt`: what is committed where, whether it is proven, and what may go. One file per verb.

A verb loads nothing at import that needs torch, Ray or fsspec.
"""

from __future__ import annotations

import click

from ktrain.cli.ckpt.ls import list_checkpoints
from ktrain.cli.ckpt.rm import remove
from ktrain.cli.ckpt.verify import verify


@click.group()
def ckpt() -> None:
    """List, verify and remove checkpoints."""


ckpt.add_command(list_checkpoints)
ckpt.add_command(verify)
ckpt.add_command(remove)
