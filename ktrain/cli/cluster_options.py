"""The options of `ktrain launch` that are for clusters, apart from what they do: every verb pays for these imports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ktrain.cli.run_options import CLUSTER
from ktrain.errors import ConfigError

_JOB = (
    click.option("--job", type=click.Path(path_type=Path), metavar="FILE", help="TOML file of the job; options win."),
    click.option("--name", help="Name of the job. [default: from the run]"),
    click.option("--namespace", help="Namespace of the cluster."),
    click.option("--image", help="Image that has Python, torch and ktrain."),
    click.option("--accelerator", metavar="MODEL:N", help="Devices of each node, e.g. h100:8; h200:8,h100:8 also."),
    click.option("--tpu", metavar="GEN:TOPOLOGY", help="TPU slice, e.g. v6e:4x4."),
    click.option("--slices", type=int, help="Number of TPU slices. [default: 1]"),
    click.option("--state", metavar="BYTES", help="State that one node holds, e.g. 40Gi: sizes the memory tier."),
    click.option(
        "--memory-scope", metavar="SCOPE", help="auto, pod, node or mtc: whose the memory tier is. [default: pod]"
    ),
    click.option("--queue", help="Queue of the cluster's scheduler."),
    click.option("--gang", metavar="MECHANISM", help="How pods are admitted whole or not at all. [default: auto]"),
    click.option("--env", "env", multiple=True, metavar="NAME=VALUE", help="Environment of the script; no secrets."),
    click.option("--secret", "secrets", multiple=True, metavar="NAME=SECRET:KEY", help="Environment from a Secret."),
    click.option("--volume", "volumes", multiple=True, metavar="CLAIM:/PATH[:ro]", help="Mounts a volume claim."),
    click.option("--code", metavar="WHAT", help="Code: a directory, git+https://HOST/REPO@COMMIT, or image:REF."),
    click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any other field of the job file."),
)
_SENDING = (
    click.option("--facts", type=click.Path(path_type=Path), metavar="FILE", help="JSON of what the cluster has."),
    click.option(
        "--dry-run",
        type=click.Choice(["client", "server"]),
        metavar="[=server]",
        help="Print the manifests, with =server as this cluster would take them; create nothing.",
    ),
    click.option("--explain", is_flag=True, help="Print what each kind of failure would cost; send nothing."),
    click.option("--output", type=click.Choice(["yaml", "json"]), help="Form of --dry-run. [default: yaml]"),
    click.option("--wait", is_flag=True, help="Return when the job has ended, with its exit code."),
    click.option("--follow", is_flag=True, help="The same, and print what its ranks write."),
    click.option("--timeout", type=float, metavar="SECONDS", help="With these: at most so long. [default: 30 days]"),
    *CLUSTER,
)
_ONLY_LOCAL = ("faults",)
_ONLY_CLUSTER = (
    "job", "name", "namespace", "image", "accelerator", "tpu", "slices", "state", "memory_scope", "queue", "gang",
    "env", "secrets", "volumes", "code", "settings", "facts", "dry_run", "explain", "output",
    "wait", "follow", "timeout", "kubeconfig", "context",
)  # fmt: skip


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that only a cluster has."""
    for option in reversed((*_JOB, *_SENDING)):
        command = option(command)
    return command


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say what a job is, and how its cluster is reached."""
    for option in reversed((*_JOB, *CLUSTER)):
        command = option(command)
    return command


class LaunchCommand(click.Command):
    """A command whose `--dry-run` may stand alone: click would take the word after it for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ours = ["--dry-run=client" if item == "--dry-run" else item for item in args[:end]]
        return super().parse_args(ctx, [*ours, *args[end:]])


def refuse_local_options(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where a cluster was given what only a local launch has."""
    _refuse(given, _ONLY_LOCAL, "local")


def refuse_cluster_options(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where a local launch was given what only a cluster has."""
    _refuse(given, _ONLY_CLUSTER, "kubernetes")


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], backend: str) -> None:
    wrong = next((name for name in names if given.get(name)), None)
    if wrong is not None:
        option = {"faults": "fault", "secrets": "secret", "volumes": "volume", "settings": "set"}.get(wrong, wrong)
        raise ConfigError(f"--{option.replace('_', '-')}: only --backend {backend} has it; leave it out")
