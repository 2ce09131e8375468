"""`ktrain launch`: run a script on several nodes and keep it running."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.job import LaunchSpec, WorkDir, local_path
from ktrain.base.settings import Timeouts
from ktrain.cli.cluster_options import LaunchCommand, cluster_options, refuse_cluster_options
from ktrain.errors import ConfigError, KtrainError, UnavailableError
from ktrain.launcher.backends.local import LocalLaunch, wait_for_head
from ktrain.launcher.job import Wish, plan_job


@click.command(cls=LaunchCommand, context_settings={"ignore_unknown_options": False})
@click.argument("script", required=False)
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED, metavar="-- SCRIPT ARGS")
@click.option("--nodes", type=int, help="Number of nodes. [default: 1]")
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
    4 the run is live elsewhere, 5 storage or cluster out of reach, 6 --wait was over first, 130 stopped on request.
    """
    if backend == "kubernetes":
        from ktrain.cli.cluster import launch_on_cluster

        return launch_on_cluster(() if script is None else (script, *script_args), given)
    refuse_cluster_options(given)
    if script is None:
        raise ConfigError("launch: no script was named; give the path of a Python file")
    typed = {name: given[name] for name in ("nodes", "workers_per_node", "max_restarts") if given[name] is not None}
    wish = Wish(
        script=script, args=script_args, run=given["run"], patience_s=given["patience"], faults=given["faults"], **typed
    )
    spec = plan_job(wish)
    return _detach(spec) if given["detach"] else _run(spec)


def _run(spec: LaunchSpec) -> int:
    from ktrain.cli.progress import Progress

    logging.basicConfig(level=logging.WARNING, format="ktrain: %(message)s")
    progress = Progress(spec)
    outcome = LocalLaunch(spec, observe=progress.update).run()
    progress.finish(outcome)
    return outcome.exit_code


def _detach(spec: LaunchSpec) -> int:
    """Starts this very command again as a process of its own, and returns once its head answers."""
    work = WorkDir.of_run(spec.run)
    arguments = [item for item in sys.argv[1:] if item != "--detach"]
    folder = Path(spec.log_dir) if local_path(spec.run) is not None else work.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "launcher.log"
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ktrain.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=settings.child_environment({}),
        )
    try:
        wait_for_head(work, launcher=process, timeouts=Timeouts(spec.patience_s))
    except UnavailableError as error:
        said = log.read_text(errors="replace").strip().splitlines()
        click.echo(f"ktrain: {said[-1] if said else error}", err=True)
        return process.returncode or contract.EXIT_FAILED
    except KtrainError:
        process.terminate()
        raise
    click.echo(f"{spec.run}: started, process {process.pid}; follow it with `ktrain status` and `ktrain logs --follow`")
    return contract.EXIT_OK
