"""`ktrain gc`: what ktrain left on a cluster and nobody needs. Of a run's bucket: `ktrain ckpt gc`."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import any_namespace_options
from ktrain.errors import ConfigError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("gc")
@click.option("--namespace", help="Only this namespace. [default: all]")
@click.option(
    "--older-than", default="7d", show_default=True, metavar="AGE", help="Leave what is younger: 90s, 12h, 7d."
)
@click.option("--confirm", is_flag=True, help="Remove it; without this it is only shown.")
@click.option("--dry-run", is_flag=True, help="Only show it, also with --confirm.")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@any_namespace_options
def collect(namespace: str | None, older_than: str, confirm: bool, dry_run: bool, output: str, **given: Any) -> int:
    """Show, or remove, finished jobs of ktrain on a cluster and objects whose job is gone.

    Nothing that ktrain did not make, nothing of which something cannot be told; a job that failed or was cancelled goes
    only when its run has the record from which it is resumed. Exit code: 0; 5 where JobSets may not be listed.
    """
    from ktrain.cli import cluster_run
    from ktrain.jobs import run_records
    from ktrain.launcher.backends.kubernetes.collect import carry_out, plan_collection

    client = cluster_run.client_of(given)
    plan = plan_collection(client, namespace, older_s=_age_s(older_than), has_record=run_records.has)
    is_only_shown = dry_run or not confirm
    gone, failed = (list(plan.removals), []) if is_only_shown else carry_out(client, plan.removals)
    if output == "json":
        value = {
            "dry_run": is_only_shown,
            "removed": [item.to_value() for item in gone],
            "failed": [{**item.to_value(), "error": str(error)} for item, error in failed],
            "spared": [{"what": what, "why": why} for what, why in plan.spared],
            "unknown": list(plan.unknown),
        }
        click.echo(json.dumps(value, indent=1))
    else:
        _tell(gone, plan.spared, plan.unknown, is_only_shown=is_only_shown)
    if failed:
        raise failed[0][1]
    return contract.EXIT_OK


def _tell(gone: list[Any], spared: Any, unknown: Any, *, is_only_shown: bool) -> None:
    for text in unknown:
        click.echo(f"not known: {text}", err=True)
    for what, why in spared:
        click.echo(f"stays: {what}: {why}")
    for item in gone:
        click.echo(f"{'would remove' if is_only_shown else 'removed'}: {item}")
    if not gone:
        click.echo("nothing to remove")
    elif is_only_shown:
        click.echo("remove it with --confirm")


def _age_s(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise ConfigError(f"--older-than: expected a number with s, m, h or d, such as 12h, found {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]
