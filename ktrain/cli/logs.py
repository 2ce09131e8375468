"""`ktrain logs`: what the ranks wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ktrain.abc.tier import Tier
from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.job import WorkDir, canonical_url, local_path
from ktrain.cli.run_options import either_options
from ktrain.cli.status import live_status
from ktrain.errors import ConfigError, KtrainError, NotFoundError
from ktrain.run.attempt_logs import Part, parts_of, read_from

_NAME = re.compile(r"attempt-(\d+)/rank-(\d+)\.log$")
_POLL_S = 0.3


@dataclass(slots=True)
class _Logs:
    """The output of a run's ranks, wherever it lies; remembers how far each was read.

    A run that is a directory has it there. Of another the live attempts lie on this machine, where it was launched
    here, and what the agents brought lies in the run.
    """

    run: str
    offsets: dict[tuple[int, int], int] = field(default_factory=dict)
    _tier: Tier | None = None
    _sizes: dict[Part, int] = field(default_factory=dict)

    def found(self) -> list[tuple[int, int]]:
        """(attempt, rank) of every log, in order."""
        matches = [_NAME.search(str(file)) for file in self._here().glob("attempt-*/rank-*.log")]
        found = {(int(match[1]), int(match[2])) for match in matches if match}
        if local_path(self.run) is None:
            stored = self._store().list(f"{contract.LOGS_DIR}/", deadline=_deadline())
            self._sizes = parts_of(stored)
            found |= {(part.attempt, part.rank) for part in self._sizes}
        return sorted(found)

    def read_new(self, attempt: int, rank: int) -> str:
        """Text that was added to a log since the last call; `found` says what there is."""
        offset = self.offsets.get((attempt, rank), 0)
        try:
            with open(self._here() / f"attempt-{attempt}" / f"rank-{rank}.log", "rb") as file:
                file.seek(offset)
                data = file.read()
            self.offsets[attempt, rank] = offset + len(data)
        except FileNotFoundError:
            data = b"" if local_path(self.run) is not None else self._read_stored(attempt, rank, offset)
        return data.decode(errors="replace")

    def _read_stored(self, attempt: int, rank: int, offset: int) -> bytes:
        data = b""
        for begin, piece in read_from(self._store(), self._sizes, attempt, rank, offset, deadline=_deadline()):
            if begin > offset:
                data += f"\n[ktrain: {begin - offset} bytes are not kept]\n".encode()
            data, offset = data + piece, begin + len(piece)
        self.offsets[attempt, rank] = offset
        return data

    def _here(self) -> Path:
        path = local_path(self.run)
        return (path if path is not None else WorkDir.of_run(self.run).path) / contract.LOGS_DIR

    def _store(self) -> Tier:
        if self._tier is None:
            from ktrain.tier.location import open_tier

            self._tier = open_tier(self.run, timeouts=settings.timeouts())
        return self._tier


def _deadline() -> Deadline:
    return Deadline.after(settings.timeouts().storage_s)


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
    store = _Logs(run)
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
    from ktrain.launcher.backends.kubernetes.status import run_of
    from ktrain.launcher.backends.kubernetes.view import look

    if (given["head"] and rank is not None) or (follow and given["previous"]):
        raise ConfigError("--head and --rank, --follow and --previous: each excludes the other; leave one out")
    if attempt is not None and (follow or given["previous"] or given["head"]):
        raise ConfigError("--attempt: it stands for itself; leave --follow, --previous and --head out")
    if attempt is not None and "/" in run:  # nobody is asked: the job may be long gone
        return _show_kept(canonical_url(run), rank, attempt, follow=False)
    client, name, namespace = cluster_run.client_of(given), cluster_run.job_name(run), given["namespace"]
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
