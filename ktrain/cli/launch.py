"""`ktrain launch`: run a script on several nodes and keep it running."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

import click

from ktrain.base import contract
from ktrain.base.job import LaunchSpec, WorkDir
from ktrain.base.settings import Timeouts
from ktrain.cli.cluster_options import LaunchCommand, cluster_options, refuse_cluster_options
from ktrain.errors import ConfigError, KtrainError, UnavailableError
from ktrain.jobs.record import LaunchRecord, Recorder, of_this_process
from ktrain.launcher.backends.local import LocalLaunch, Outcome, wait_for_head
from ktrain.launcher.job import Wish, plan_job


@click.command(cls=LaunchCommand, context_settings={"ignore_unknown_options": False})
@click.argument("script", required=False)
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED, metavar="-- SCRIPT ARGS")
@click.option("--nodes", type=int, help="Number of nodes. [default: 1]")
@click.option("--spares", type=int, help="Nodes more than that, to take a lost one's place. [default: 0]")
@click.option("--workers-per-node", type=int, help="Worker processes on each node. [default: 1]")
@click.option(
    "--run", "run", metavar="URI", help="Where the run lives: a directory or any fsspec URL. [default: runs/SCRIPT]"
)
@click.option(
    "--backend",
    type=click.Choice(["local", "kubernetes"]),
    default="local",
    show_default=True,
    help="Where the nodes are.",
)
@click.option(
    "--fault", "faults", multiple=True, metavar="SPEC", help="Break something, e.g. kill-worker@step=30,rank=1."
)
@click.option("--max-restarts", type=int, help="Restarts per cause of failure. [default: 3]")
@click.option(
    "--patience",
    type=float,
    metavar="SECONDS",
    help="Silence a healthy job may show; all timeouts follow. [default: 60]",
)
@click.option("--detach", is_flag=True, help="Return once the job has started; it goes on by itself.")
@cluster_options
def launch(script: str | None, script_args: tuple[str, ...], backend: str, **given: Any) -> int:
    """Run SCRIPT on NODES x WORKERS_PER_NODE processes, through failures, until it is done.

    The same command again continues the run. Exit code: 0 done, 1 failed, 2 bad input, 3 no good copy left,
    4 the run is live elsewhere, 5 storage or cluster out of reach, 6 --wait or --follow was over
    first, 130 stopped on request.
    """
    if backend == "kubernetes":
        from ktrain.cli.cluster import launch_on_cluster

        return launch_on_cluster(() if script is None else (script, *script_args), given)
    refuse_cluster_options(given)
    if script is None:
        raise ConfigError("launch: no script was named; give the path of a Python file")
    typed = {
        name: given[name] for name in ("nodes", "spares", "workers_per_node", "max_restarts") if given[name] is not None
    }
    wish = Wish(
        script=script, args=script_args, run=given["run"], patience_s=given["patience"], faults=given["faults"], **typed
    )
    spec = plan_job(wish)
    return _detach(spec) if given["detach"] else run_here(spec, of_this_process(spec))


def run_here(spec: LaunchSpec, record: LaunchRecord, *, begun: Callable[[], None] = lambda: None) -> int:
    """Follows a launch in this process to its end, and shows it; `begun` is called once the run is this launch's."""
    from ktrain.cli.progress import Progress

    logging.basicConfig(level=logging.WARNING, format="ktrain: %(message)s")
    progress, recorder = Progress(spec), Recorder(spec, record)

    def keep(outcome: Outcome | None) -> None:
        recorder(outcome)
        if outcome is None:
            begun()

    outcome = LocalLaunch(spec, observe=progress.update, record=keep).run()
    progress.finish(outcome)
    return outcome.exit_code


def _detach(spec: LaunchSpec) -> int:
    """Starts the launch as a process of its own, and returns once its head answers."""
    from ktrain.jobs import on_local

    record = on_local.start(spec)
    assert record.local is not None
    try:
        wait_for_head(WorkDir.of_run(spec.run), launcher=record.local.process, timeouts=Timeouts(spec.patience_s))
    except UnavailableError:
        look = on_local.LocalHost(spec.run, record).look()
        click.echo(f"ktrain: {look.message}", err=True)
        return contract.EXIT_FAILED if look.exit_code is None else look.exit_code
    except KtrainError:
        record.local.process.signal(signal.SIGTERM)
        raise
    where = f"process {record.local.pid}"
    click.echo(f"{spec.run}: started, {where}; follow it with `ktrain status` and `ktrain logs --follow`")
    return contract.EXIT_OK
