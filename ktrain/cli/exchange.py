"""`ktrain ckpt export` and `ktrain ckpt import`: to and from the files of other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import click

from ktrain.base import contract
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT
from ktrain.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MAX_LISTED = 5


def size_nbytes(text: str) -> int:
    """Bytes of a size with its unit: `5GB`, `512MiB`, `1000`.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ConfigError(
            f"size {text!r}: expected a number above 0 with B, KB, MB, GB, TB, KiB, MiB or GiB, as in 5GB"
        )
    return int(match[1]) * _UNITS[match[2].upper()]


@click.command("export")
@click.argument("run")
@click.argument("out", type=click.Path())
@click.option("--to", "form", type=click.Choice(["safetensors", "hf", "dcp"]), required=True, help="What to write.")
@click.option("--step", type=int, help="Which step. [default: the newest]")
@click.option("--part", help="Which part of the state. [default: model, or the only module; for dcp all]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="hf: bytes of tensors in one file.")
@DRY_RUN
@OUTPUT
def export_command(  # noqa: PLR0913 -- one per option of the command
    run: str,
    out: str,
    *,
    form: str,
    step: int | None,
    part: str | None,
    max_shard_size: str,
    dry_run: bool,
    output: str,
) -> int:
    """Write the tensors of a checkpoint of RUN to OUT, proven byte by byte. OUT must not be there yet."""
    from ktrain.exchange.export import export_run, plan_export

    export_or_plan = plan_export if dry_run else export_run
    done = export_or_plan(run, out, form=form, step=step, part=part, max_shard_nbytes=size_nbytes(max_shard_size))
    if output == "json":
        click.echo(json.dumps({"dry_run": dry_run, **done.to_json()}, indent=1))
    else:
        would = "would export " if dry_run else ""
        where = f"to {out}" if dry_run else f"in {len(done.files)} files: {out}"
        click.echo(f"{would}step {done.step}: {done.num_tensors} tensors, {done.nbytes} bytes {where}")
        _say_left_out(done.left_out)
    return contract.EXIT_OK


@click.command("import")
@click.argument("source", type=click.Path())
@click.argument("run")
@click.option(
    "--from", "form", type=click.Choice(["dcp", "pt", "safetensors", "hf"]), required=True, help="What it is."
)
@click.option("--part", default="model", show_default=True, help="The part of the state that the tensors become.")
@click.option("--step", type=int, default=0, show_default=True, help="The step that training goes on from.")
@click.option("--key", help="Take only what lies below this name of SOURCE, and take the name off.")
@click.option("--exclude", multiple=True, help="A name, or its beginning up to a dot, that is not taken.")
@click.option("--tie", "ties", multiple=True, metavar="NAME=STORED", help="NAME is the same tensor as STORED.")
@DRY_RUN
@OUTPUT
def import_command(  # noqa: PLR0913 -- one per option of the command
    source: str,
    run: str,
    *,
    form: str,
    part: str,
    step: int,
    key: str | None,
    exclude: tuple[str, ...],
    ties: tuple[str, ...],
    dry_run: bool,
    output: str,
) -> int:
    """Make the tensors of SOURCE the first checkpoint of RUN, which must be new."""
    from ktrain.exchange.importing import Selection, import_checkpoint, plan_import

    selection = Selection(key, exclude, dict(_tie(text) for text in ties))
    import_or_plan = plan_import if dry_run else import_checkpoint
    done = import_or_plan(source, run, form=form, part=part, step=step, selection=selection)
    if output == "json":
        click.echo(json.dumps({"dry_run": dry_run, **done.to_json()}, indent=1))
    else:
        would = "would import " if dry_run else ""
        what = f"part {done.part}, {done.num_tensors} tensors, {done.nbytes} bytes"
        click.echo(f"{would}step {done.step} of {run}: {what}")
        _say_left_out(done.left_out)
    return contract.EXIT_OK


def _tie(text: str) -> tuple[str, str]:
    name, sign, stored = text.partition("=")
    if not (name and sign and stored):
        raise ConfigError(f"--tie {text!r}: expected NAME=STORED, two names of tensors")
    return name, stored


def _say_left_out(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        click.echo(f"left out: {', '.join(names[:_MAX_LISTED])}{more}", err=True)
