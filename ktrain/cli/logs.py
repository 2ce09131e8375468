"""`ktrain logs`: what the ranks wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.job import WorkDir, canonical_url, local_path
from ktrain.cli.run_options import either_options
from ktrain.cli.status import live_status
from ktrain.errors import ConfigError, KtrainError, NotFoundError

_NAME = re.compile(r"attempt-(\d+)/rank-(\d+)\.log$")
_POLL_S = 0.3


@dataclass(slots=True)
class _Logs:
    """The log files of a run, wherever they lie; remembers how far each was read."""

    run: str
    offsets: dict[tuple[int, int], int] = field(default_factory=dict)

    def found(self) -> list[tuple[int, int]]:
        """(attempt, rank) of every log, in order."""
        path = local_path(self.run)
        folder = (path if path is not None else WorkDir.of_run(self.run).path) / contract.LOGS_DIR
        names = [str(file) for file in folder.glob("attempt-*/rank-*.log")]
        if path is None:  # attempts that have ended lie in the bucket, the live one on this machine
            from ktrain.tier.location import open_tier

            timeouts = settings.timeouts()
            tier = open_tier(self.run, timeouts=timeouts)
            stored = tier.list(f"{contract.LOGS_DIR}/", deadline=Deadline.after(timeouts.storage_s))
            names += [item.name for item in stored]
        matches = (_NAME.search(name) for name in names)
        return sorted({(int(match[1]), int(match[2])) for match in matches if match})

    def read_new(self, attempt: int, rank: int) -> str:
        """Text that was added to a log since the last call."""
        name = f"{contract.LOGS_DIR}/attempt-{attempt}/rank-{rank}.log"
        offset = self.offsets.get((attempt, rank), 0)
        path = local_path(self.run) or WorkDir.of_run(self.run).path
        try:
            with open(path / name, "rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            from ktrain.tier.location import open_tier

            timeouts = settings.timeouts()
            tier = open_tier(self.run, timeouts=timeouts)
            data = tier.read(name, deadline=Deadline.after(timeouts.storage_s))[offset:]
        self.offsets[attempt, rank] = offset + len(data)
        return data.decode(errors="replace")


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
    store = _Logs(canonical_url(run))
    shown = attempt
    while True:
        live = follow and live_status(store.run) is not None
        found = store.found()
        attempts = sorted({number for number, _ in found})
        if not found and not live:
            raise NotFoundError(f"run {store.run}: there are no logs here; check the name")
        if attempt is not None and attempt not in attempts and not live:
            raise NotFoundError(f"run {store.run}: no logs of attempt {attempt}; there are {attempts}")
        newest = attempt if attempt is not None else max(attempts, default=0)
        shown = newest if shown is None else shown
        wanted = [item for item in found if shown <= item[0] <= newest and rank in (None, item[1])]
        if not wanted and not live:
            raise NotFoundError(f"run {store.run}: no log of rank {rank} in attempt {newest}")
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
    from ktrain.launcher.backends.kubernetes.view import look

    if attempt is not None:
        raise ConfigError(
            "--attempt: a cluster keeps a pod's last container and, with --previous, the one before; the run has its "
            "earlier attempts: `ktrain logs --attempt N RUN` with the run's URL"
        )
    if (given["head"] and rank is not None) or (follow and given["previous"]):
        raise ConfigError("--head and --rank, --follow and --previous: each excludes the other; leave one out")
    client, name, namespace = cluster_run.client_of(given), cluster_run.job_name(run), given["namespace"]
    choose = kept.head if given["head"] else kept.workers if rank is None else kept.of_rank(rank)
    if follow:
        deadline = cluster_run.deadline_of(client, None)
        for source, line in kept.follow(client, namespace, name, choose, deadline=deadline):
            _echo(f"[{source.pod}] ", line)
        return contract.EXIT_OK
    sources = choose(look(client, namespace, name))
    if not sources:
        raise NotFoundError(f"job {name}: no container has started; `ktrain status` says what it waits for")
    missing: KtrainError | None = None
    for source in sources:
        try:
            for line in kept.read(client, namespace, source, previous=given["previous"]):
                _echo("" if len(sources) == 1 else f"[{source.pod}] ", line)
        except (ConfigError, NotFoundError) as error:  # gone meanwhile, or never started again: the others are shown
            missing = error
            click.echo(f"ktrain: {error}", err=True)
    return contract.EXIT_OK if missing is None else contract.EXIT_USAGE


def _echo(prefix: str, line: bytes) -> None:
    text = line.decode(errors="replace")
    click.echo(prefix + text, nl=not text.endswith("\n"))
