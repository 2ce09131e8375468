"""`ktrain history`: the submissions and attempts of a run, from the cluster and from what the run has kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import either_options


@click.command()
@click.argument("run")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@either_options
def history(run: str, output: str, backend: str, namespace: str, **given: Any) -> int:
    """Show what was sent of RUN to clusters, and each attempt: where it continued from, what was lost, how it ended.

    Without a cluster RUN is a path or URL, and what the run has kept is shown. With --backend kubernetes it may also be
    the name of a job, and what the cluster knows is joined with that.
    """
    from ktrain.cli import cluster_history

    if backend == "kubernetes":
        found = cluster_history.of_cluster(run, namespace, given)
    else:
        found = cluster_history.of_run(run)
    if output == "json":
        click.echo(json.dumps(found, indent=1))
        return contract.EXIT_OK
    for line in _lines(found):
        click.echo(line)
    return contract.EXIT_OK


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{found['run'] or 'run not known'}:"]
    for item in found["submissions"]:
        lines += _submission_lines(item)
    if found["attempts"]:
        lines.append("not from a cluster" if not found["submissions"] else "of no submission that is known")
        lines += [f"  {_attempt_line(item)}" for item in found["attempts"]]
    if not found["submissions"] and not found["attempts"]:
        lines.append("nothing was sent to a cluster, and no attempt was made")
    return [*lines, *(f"not known: {text}" for text in found["unknown"])]


def _submission_lines(item: Mapping[str, Any]) -> list[str]:
    about = [f"Kubernetes {item['kubernetes'] or '?'}", f"gang {item['gang'] or '?'}", f"{_count(item['nodes'])}"]
    code = "" if item["exit_code"] is None else f" (exit code {item['exit_code']})"
    again = f", all pods made anew {item['restarts']} times" if item["restarts"] else ""
    head = f"submission {item['number']}  {_time(item['time'])}  {', '.join(about)}"
    lines = [f"{head}: {item['outcome'] or 'its end is not known'}{code}{again}"]
    lines += [f"  changed: {text}" for text in item["changes"]]
    return [*lines, *(f"  {_attempt_line(attempt)}" for attempt in item["attempts"])]


def _attempt_line(item: Mapping[str, Any]) -> str:
    begin = (
        "from the beginning" if item["restored_from"] is None else f"from step {item['step']} ({item['restored_from']})"
    )
    lost = f", {item['steps_lost']} steps lost" if item["steps_lost"] else ""
    nodes = f", {_count(item['nodes'])}" if item["nodes"] is not None else ""
    return f"attempt {item['attempt']}  {_time(item['time'])}  {begin}{lost}{nodes}: {item['ended'] or 'it runs'}"


def _count(nodes: int | None) -> str:
    return "? nodes" if nodes is None else "1 node" if nodes == 1 else f"{nodes} nodes"


def _time(seconds: float | None) -> str:
    """Of the sender's or the head's clock, as UTC."""
    if not seconds:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def join(
    submissions: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each submission with its attempts, told by the launch that both name; then the attempts of none. Pure."""
    by_launch: dict[Any, list[dict[str, Any]]] = {item["launch"]: [] for item in submissions if item["launch"]}
    others: list[dict[str, Any]] = []
    for attempt in attempts:
        by_launch.get(attempt["launch"], others).append(_plain(attempt))
    return [{**_plain(item), "attempts": by_launch.get(item["launch"], [])} for item in submissions], others


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "launch"}
