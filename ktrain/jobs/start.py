"""`ktrain.launch` and `ktrain.attach`: from what a person has in hand to a job, and back to it from anywhere.

What only one kind of launch needs is imported where that begins: a notebook waits for `import ktrain; ktrain.launch`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from ktrain.base import settings
from ktrain.errors import ConfigError, NotFoundError
from ktrain.jobs.job import Job
from ktrain.launcher.places import Kubernetes, Local, Place

if TYPE_CHECKING:
    from ktrain.launcher.code.function import ShippedFunction


@runtime_checkable
class Trains(Protocol):
    """What is launched whole, such as a `ktrain.Trainer`: its pieces are shipped, and `fit` is called there."""

    @property
    def run(self) -> str: ...

    def fit(self) -> object: ...


What = str | Path | Sequence[str] | Callable[..., object] | Trains


def launch(what: What, *, on: Place, run: str | None = None, args: Sequence[object] = ()) -> Job:
    """Starts a job, and returns once it is accepted: the run is its own, or the cluster has taken it.

    Args:
        what: a script's path, or a list of that and its arguments; a function; or a Trainer that was not run yet.
        on: `ktrain.Local(...)` or `ktrain.Kubernetes(...)`.
        run: where the run lives. A Trainer names its own. On this machine the default is runs/NAME, by the name of the
            script or function, and the same launch again continues a run that has ended. On a cluster the job that
            ended stays and keeps its name: `Job.resume` lets it go on, and after `ktrain delete` a launch continues.
        args: for the script or the function.

    A function is shipped by value with all that it names, and what it returns is dropped: what it makes belongs into
    its run.

    Raises:
        ConfigError: it cannot be launched; nothing was started. For a function the message names each thing that cannot
            be shipped.
        ConflictError: the run is live already; or a job of its name is on the cluster, live or ended.
        UnavailableError: the cluster does not answer.

    Warns of files that look private, before they are sent.
    """
    if isinstance(on, Local):
        return _launch_here(what, on, run, tuple(args))
    if isinstance(on, Kubernetes):
        return _launch_on_cluster(what, on, run, tuple(args))
    raise ConfigError(f"on: expected ktrain.Local(...) or ktrain.Kubernetes(...), found {type(on).__name__}")


def attach(job: str, *, on: Place | None = None) -> Job:
    """The job that was launched as the given run, from any process; or, on a cluster, the job of the given name.

    Without `on` the run's own record says where its job is. A name (no URL, no path of a run that is here) is looked
    for in the namespace `default` of the current cluster.

    Raises:
        NotFoundError: there is no such job.
        ConfigError: the cluster cannot be reached as `on` says, or several jobs there are of the run.
    """
    if isinstance(on, Kubernetes):
        return _attach_on_cluster(job, on)
    from ktrain.base.job import canonical_url
    from ktrain.jobs import on_local
    from ktrain.jobs import record as records

    try:
        found = records.read(canonical_url(job), timeouts=settings.timeouts())
    except NotFoundError:
        if on is not None or "/" in job:
            raise
        return _attach_on_cluster(job, Kubernetes())
    if found.kubernetes is None:
        return Job(on_local.LocalHost(job, found))
    if on is not None:
        raise NotFoundError(
            f"run {job}: its last launch is a job on Kubernetes, not one of this machine; leave on= out"
        )
    place = found.kubernetes
    return _attach_on_cluster(place.name, Kubernetes(namespace=place.namespace, context=place.context), run=job)


# What is launched


def _command(what: What, args: tuple[object, ...]) -> tuple[str, ...] | None:
    """Of a script; None of anything else."""
    if isinstance(what, str | os.PathLike):
        what = [os.fspath(what)]
    elif not isinstance(what, list | tuple):
        return None
    words = [*what, *args]
    wrong = next((word for word in words if not isinstance(word, str)), None)
    if wrong is not None or not words:
        raise ConfigError(f"launch: expected a script's path and arguments as text, found {wrong!r}; use str(...)")
    return tuple(cast(list[str], words))


def _packed(
    what: What, args: tuple[object, ...], run: str | None, code: Path | None
) -> tuple[ShippedFunction, str | None]:
    """A function or a trainer, and the run that it names."""
    from ktrain.launcher.code.function import pack_function

    if isinstance(what, Trains):
        if args or run not in (None, what.run):
            raise ConfigError(f"launch: a Trainer has its arguments and its run ({what.run}); leave args= and run= out")
        return pack_function(what.fit, code=code), what.run
    if not callable(what):
        raise ConfigError(f"launch: expected a script's path, a function or a Trainer, found {type(what).__name__}")
    return pack_function(what, args, code=code), run


# On this machine


def _launch_here(what: What, on: Local, run: str | None, args: tuple[object, ...]) -> Job:
    from ktrain.base.job import canonical_url
    from ktrain.jobs import on_local
    from ktrain.launcher.job import default_run, plan_job

    command = _command(what, args)
    if command is None:
        function, run = _packed(what, args, run, on.code_folder)
        run = canonical_url(run or default_run(function.plain_name))
        script = on_local.put_function(function, run)
        command = (str(script), *function.command[1:], str(on.code_folder))
    spec = plan_job(on.wish(command, run))
    return Job(on_local.LocalHost(spec.run, on_local.start(spec)))


# On a cluster


def _launch_on_cluster(what: What, on: Kubernetes, run: str | None, args: tuple[object, ...]) -> Job:
    from ktrain.jobs import on_cluster
    from ktrain.jobs import record as records
    from ktrain.launcher.code.archive import add_files, pack_code

    code = None if on.code is None else Path(on.code)
    command, function = _command(what, args), None
    if command is None:
        function, run = _packed(what, args, run, code)
        command = function.command
    archive = None if code is None else pack_code(code)
    if function is not None:
        archive = add_files(archive, function.files)
    spec = on.spec(command, run, archive)
    if archive is not None and spec.command[0] not in archive.names:
        raise ConfigError(f"code {on.code}: it does not have the script {spec.command[0]!r}; give its path in there")
    for text in () if archive is None else archive.warnings:
        warnings.warn(text, stacklevel=3)  # where `launch` was called; once it is sent, it is too late
    host, said = on_cluster.send(on_cluster.client_of(on), spec, archive)
    place = records.ClusterPlace(spec.namespace, spec.name, on.context)
    return Job(host, warnings=(*said, *records.record_on_cluster(spec.run, place)))


def _attach_on_cluster(job: str, on: Kubernetes, *, run: str | None = None) -> Job:
    from ktrain.jobs import on_cluster

    return Job(on_cluster.find(on_cluster.client_of(on), job, on.namespace, run=run))
