"""`ktrain logs`: what the ranks wrote."""

from __future__ import annotations

from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.job import canonical_url
from ktrain.cli.run_options import either_options
from ktrain.cli.status import live_status
from ktrain.errors import ConfigError, KtrainError, NotFoundError

_POLL_S = 0.3


@click.command()
@click.argument("run")
@click.option("--rank", type=int, help="Only this rank.")
@click.option("--attempt", type=int, help="This attempt. [default: the last]")
@click.option("--follow", is_flag=True, help="Go on while the run is live, through new attempts.")
@click.option("--previous", is_flag=True, help="On a cluster: the containers before the last.")
@click.option("--head", "head", is_flag=True, help="On a cluster: the head instead of the ranks.")
@either_options
def logs(run: str, rank: int | None, attempt: int | None, follow: bool, backend: str, **given: Any) -> int:
    """Print what RUN's ranks wrote."""
    if backend == "kubernetes":
        return _on_cluster(run, rank, attempt, follow, given)
    wrong = next((name for name in ("previous", "head") if given[name]), None)
    if wrong is not None:
        raise ConfigError(f"--{wrong}: only --backend kubernetes has it; leave it out")
    return _show_kept(canonical_url(run), rank, attempt, follow=follow)


def _show_kept(run: str, rank: int | None, attempt: int | None, *, follow: bool) -> int:
    """Prints what lies in the run, and on this machine."""
    from ktrain.jobs.run_logs import RunLogs  # with the stores' package

    store = RunLogs(run, timeouts=settings.timeouts())
    shown = attempt
    while True:
        live = follow and live_status(run) is not None
        found = store.found()
        attempts = sorted({number for number, _ in found})
        if not found and not live:
            raise NotFoundError(f"run {run}: there are no logs here; check the name")
        if attempt is not None and attempt not in attempts and not live:
            raise NotFoundError(f"run {run}: no logs of attempt {attempt}; there are {attempts}")
        newest = attempt if attempt is not None else max(attempts, default=0)
        shown = newest if shown is None else shown
        wanted = [item for item in found if shown <= item[0] <= newest and rank in (None, item[1])]
        if not wanted and not live:
            raise NotFoundError(f"run {run}: no log of rank {rank} in attempt {newest}")
        for number, one in wanted:
            text = store.read_new(number, one)
            prefix = "" if rank is not None else f"[{number}:{one}] "
            if text:
                click.echo(
                    "".join(prefix + line for line in text.splitlines(keepends=True)), nl=not text.endswith("\n")
                )
        if not live:
            return 0
        SYSTEM_CLOCK.sleep(_POLL_S)


def _on_cluster(run: str, rank: int | None, attempt: int | None, follow: bool, given: dict[str, Any]) -> int:
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import logs as kept
    from ktrain.launcher.backends.kubernetes.status import run_of
    from ktrain.launcher.backends.kubernetes.view import look

    if (given["head"] and rank is not None) or (follow and given["previous"]):
        raise ConfigError("--head and --rank, --follow and --previous: each excludes the other; leave one out")
    if attempt is not None and (follow or given["previous"] or given["head"]):
        raise ConfigError("--attempt: it stands for itself; leave --follow, --previous and --head out")
    if attempt is not None and "/" in run:  # nobody is asked: the job may be long gone
        return _show_kept(canonical_url(run), rank, attempt, follow=False)
    namespace = given["namespace"]
    client, name = cluster_run.job_of(run, namespace, given)
    if attempt is not None:
        url = run_of(look(client, namespace, name).jobset)
        if url is None:
            raise NotFoundError(f"job {name}: it does not say which run it is of; name the run's URL")
        return _show_kept(canonical_url(url), rank, attempt, follow=False)
    choose = kept.head if given["head"] else kept.workers if rank is None else kept.of_rank(rank)
    if follow:
        deadline = cluster_run.deadline_of(client, None)
        for source, line in kept.follow(client, namespace, name, choose, deadline=deadline):
            cluster_run.echo_line(f"[{source.pod}] ", line)
        return contract.EXIT_OK
    sources = choose(look(client, namespace, name))
    if not sources:
        raise NotFoundError(f"job {name}: no container has started; `ktrain status` says what it waits for")
    missing: KtrainError | None = None
    for source in sources:
        try:
            for line in kept.read(client, namespace, source, previous=given["previous"]):
                cluster_run.echo_line("" if len(sources) == 1 else f"[{source.pod}] ", line)
        except (ConfigError, NotFoundError) as error:  # gone meanwhile, or never started again: the others are shown
            missing = error
            click.echo(f"ktrain: {error}", err=True)
    return contract.EXIT_OK if missing is None else contract.EXIT_USAGE
