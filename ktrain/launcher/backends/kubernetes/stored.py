"""What a cluster keeps of a job's submission: beside the job, and in a ticket while the job is replaced (ADR 0040).

The ConfigMap of a job goes with its JobSet. So before a JobSet is deleted for its successor, the successor's submission
(and the code, where it is carried) is written into ConfigMaps that nothing owns: the ticket. Whoever finds a ticket and
no job goes on from there.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from ktrain.base import contract
from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.refusals import AlreadyExistsError
from ktrain.launcher.backends.kubernetes.submission import Submission
from ktrain.launcher.render import code
from ktrain.launcher.render.common import metadata
from ktrain.launcher.spec import JobSpec

TICKET_SUFFIX = "-resume"
_JOB_KEY = contract.POD_JOB_FILE.rpartition("/")[2]


def config_map_path(namespace: str, name: str) -> str:
    return path_of("v1", "configmaps", namespace, name)


def with_submission(obj: Object, submission: Submission) -> Object:
    """The job's ConfigMap with its submission beside the specification; any other object as it is."""
    if obj["kind"] != "ConfigMap" or _JOB_KEY not in (obj.get("data") or {}):
        return obj
    text = json.dumps(submission.to_value(), indent=1, sort_keys=True) + "\n"
    return {**obj, "data": {**obj["data"], contract.SUBMISSION_FILE: text}}


def stamp_of(obj: Object) -> str | None:
    """The id of the submission that made an object; None: ktrain did not."""
    stamp = (obj["metadata"].get("annotations") or {}).get(contract.ANNOTATION_SUBMISSION)
    return None if stamp is None else str(stamp)


def stamps(submission: Submission) -> dict[str, str]:
    """Annotations of every object of a submission."""
    return {
        contract.ANNOTATION_SUBMISSION: submission.id,
        contract.ANNOTATION_RUN: str(submission.spec["run"]),
        contract.ANNOTATION_NUMBER: str(submission.number),
    }


def try_read_submission(client: Client, jobset: Object) -> Submission | None:
    """The submission that lies beside a job; None where the job was sent without, or was cut off before it was there.

    Raises:
        ConfigError: it cannot be read by this version.
        ForbiddenError: ConfigMaps may not be read here.
    """
    about = jobset["metadata"]
    found = client.try_get(config_map_path(about["namespace"], about["name"]))
    data = {} if found is None else found.get("data") or {}
    if contract.SUBMISSION_FILE in data:
        return _parse(data[contract.SUBMISSION_FILE], f"ConfigMap {about['name']}")
    if _JOB_KEY not in data:
        return None
    spec = _json(data[_JOB_KEY], f"ConfigMap {about['name']}")
    number = (about.get("annotations") or {}).get(contract.ANNOTATION_NUMBER, "1")
    return Submission(id=stamp_of(jobset) or "", number=int(number) if number.isdecimal() else 1, time=0.0, spec=spec)


def try_read_code(client: Client, namespace: str, job: JobSpec) -> bytes | None:
    """The code that the job carries, from beside the job or from its ticket; None where it is in neither."""
    for of_job in (str, partial(_in_ticket, job)):
        found = [_try_read_part(client, namespace, of_job(name), key) for name, key in code.parts(job)]
        if None not in found:
            return b"".join(part for part in found if part is not None)
    return None


def carried_code(client: Client, job: JobSpec) -> bytes | None:
    """The code that goes on with a job that is sent again; None where no ConfigMap carries it.

    Raises:
        ConfigError: it is gone.
    """
    if job.code.archive is None or job.code.is_in_bucket:
        return None
    data = try_read_code(client, job.namespace, job)
    if data is None:
        raise ConfigError(
            f"job {job.name}: the code that was sent with it is gone with the job; give it again: --code DIR"
        )
    return data


def _try_read_part(client: Client, namespace: str, name: str, key: str) -> bytes | None:
    found = client.try_get(config_map_path(namespace, name))
    text = None if found is None else (found.get("binaryData") or {}).get(key)
    try:
        return None if text is None else base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ConfigError(f"ConfigMap {name}: its code is no base64; send the code again: --code DIR") from error


# Tickets


def try_read_ticket(client: Client, namespace: str, name: str) -> Submission | None:
    """The submission that was begun by a resume; None where there is none. Raises ConfigError, ForbiddenError."""
    found = client.try_get(config_map_path(namespace, name + TICKET_SUFFIX))
    if found is None:
        return None
    text = (found.get("data") or {}).get(contract.SUBMISSION_FILE)
    if stamp_of(found) is None or text is None:
        raise ConfigError(f"ConfigMap {name}{TICKET_SUFFIX}: ktrain did not make it; rename or remove it")
    return _parse(text, f"ConfigMap {name}{TICKET_SUFFIX}")


def write_ticket(client: Client, job: JobSpec, submission: Submission, archive: bytes | None) -> None:
    """Writes the ticket of a job that is to be replaced, in one write over an older one; the code before it.

    Raises:
        ConflictError: a ConfigMap of that name is there, and ktrain did not make it.
    """
    for carrier in code.config_maps(job, archive):
        name = _in_ticket(job, carrier["metadata"]["name"])
        _create(client, {**carrier, "metadata": metadata(job, name)}, submission)
    data = {contract.SUBMISSION_FILE: json.dumps(submission.to_value(), indent=1, sort_keys=True) + "\n"}
    about = metadata(job, job.name + TICKET_SUFFIX)
    if not _create(client, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}, submission):
        client.patch(
            config_map_path(job.namespace, about["name"]),
            {"metadata": {"annotations": stamps(submission)}, "data": data},
        )


def drop_ticket(client: Client, namespace: str, name: str) -> None:
    """Removes a ticket that is no longer needed, its code before it: whoever finds the ticket finds what is left."""
    path = config_map_path(namespace, name + TICKET_SUFFIX)
    found = client.try_get(path)
    if found is None or stamp_of(found) is None:
        return
    for listed in client.list(path_of("v1", "configmaps", namespace), labels=f"{contract.LABEL_RUN}={name}").items:
        about = listed["metadata"]
        if about["name"].startswith(f"{name}{TICKET_SUFFIX}-code-") and stamp_of(listed) is not None:
            client.delete(config_map_path(namespace, about["name"]), about["uid"])
    client.delete(path, found["metadata"]["uid"])


def _in_ticket(job: JobSpec, carrier: str) -> str:
    """Name of what carries the code beside a ticket, by the name of what does beside the job."""
    return f"{job.name}{TICKET_SUFFIX}{carrier.removeprefix(job.name)}"


def _create(client: Client, obj: Object, submission: Submission) -> bool:
    """Creates a ConfigMap; false where one that ktrain made is there, perhaps by this very call.

    Raises:
        ConflictError: one that ktrain did not make is there.
    """
    about = obj["metadata"]
    stamped = {**obj, "metadata": {**about, "annotations": stamps(submission)}}
    try:
        client.create(path_of("v1", "configmaps", about["namespace"]), stamped)
    except (AlreadyExistsError, BusyError):
        there = client.try_get(config_map_path(about["namespace"], about["name"]))
        if there is None or stamp_of(there) is None:
            raise
        return False
    return True


def _parse(text: str, where: str) -> Submission:
    try:
        return Submission.from_value(_json(text, where))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _json(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
