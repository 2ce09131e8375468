"""The options by which a verb is told that its run is on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_BACKEND = click.option(
    "--backend", type=click.Choice(["local", "kubernetes"]), default="local", show_default=True, help="Where RUN runs."
)
CLUSTER = (
    click.option("--kubeconfig", type=click.Path(path_type=Path), metavar="FILE", help="How the cluster is reached."),
    click.option("--context", help="Context of the kubeconfig."),
)
_NAMESPACE = click.option("--namespace", default="default", show_default=True, help="Namespace of the cluster.")


def either_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a verb for runs on this machine and on a cluster."""
    return _BACKEND(only_cluster_options(command))


def only_cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a verb for runs on a cluster."""
    for option in reversed((_NAMESPACE, *CLUSTER)):
        command = option(command)
    return command


def any_namespace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a verb that names its namespace otherwise."""
    for option in reversed(CLUSTER):
        command = option(command)
    return command


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a verb that goes into one pod of a run on a cluster."""
    for option in reversed(
        (
            click.option("--rank", type=int, help="The pod at this rank's place. [default: 0]"),
            click.option("--head", "head", is_flag=True, help="The head's pod instead."),
        )
    ):
        command = option(command)
    return command
