"""Which job is meant, by its name or by its run: JobSets say of which run they are, names do not."""

from __future__ import annotations

from ktrain.base.urls import require_public, without_slash
from ktrain.errors import ConfigError, NotFoundError
from ktrain.launcher.backends.kubernetes.client import Client, Object
from ktrain.launcher.backends.kubernetes.status import run_of
from ktrain.launcher.backends.kubernetes.view import list_jobsets


def is_url(job: str) -> bool:
    """Whether it is a run's URL, or a path on a volume; a job's name has no slash."""
    return "/" in job


def is_of_run(jobset: Object, run: str) -> bool:
    """Whether a job is of a run; a slash at the end is none of either."""
    found = run_of(jobset)
    return found is not None and without_slash(found) == without_slash(run)


def find_job(client: Client, namespace: str, job: str) -> str:
    """The name of a job that was given by its name, which is not looked up, or by its run's URL.

    Raises:
        NotFoundError: no job in the namespace is of that run.
        ConfigError: several are; they are named.
        ForbiddenError: JobSets may not be listed here.
    """
    if not is_url(job):
        return job
    name = try_find_job(client, namespace, job)
    if name is None:
        raise NotFoundError(
            f"namespace {namespace}: there is no job of run {job}; `ktrain list --namespace {namespace}` lists them"
        )
    return name


def try_find_job(client: Client, namespace: str, run: str) -> str | None:
    """The name of the job of a run; None where there is none. Raises ConfigError, ForbiddenError as `find_job`."""
    require_public(run)
    names = sorted(item["metadata"]["name"] for item in list_jobsets(client, namespace) if is_of_run(item, run))
    if len(names) > 1:
        raise ConfigError(f"run {run}: {len(names)} jobs are of it; name one of {', '.join(names)}")
    return names[0] if names else None
