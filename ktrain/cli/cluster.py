"""`ktrain launch --backend kubernetes`: from options to a JobSpec, and what is shown of it."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.cluster_options import refuse_local_options
from ktrain.errors import ConfigError
from ktrain.launcher import spec_file
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.code.ways import choose_way
from ktrain.launcher.explain import Plan, Recovery, explain
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.quantity import show_bytes
from ktrain.launcher.render import code
from ktrain.launcher.render.access import shown, token_secret
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.render.text import to_yaml
from ktrain.launcher.spec import JobSpec, default_name

# Option -> the field of the job that it sets.
_FIELDS = {
    "name": "name",
    "namespace": "namespace",
    "image": "image",
    "run": "run",
    "nodes": "nodes",
    "workers_per_node": "workers_per_node",
    "accelerator": "accelerator",
    "tpu": "tpu",
    "slices": "slices",
    "state": "memory.state",
    "memory_scope": "memory.scope",
    "spares": "spares",
    "queue": "placement.queue",
    "gang": "placement.gang",
    "max_restarts": "limits.max_restarts",
    "patience": "limits.patience_s",
}


def launch_on_cluster(command: tuple[str, ...], given: Mapping[str, Any]) -> int:
    """Sends a job, or prints what would be sent, or what it would survive. `given` has the options that were typed.

    Raises:
        ConfigError: the job cannot be, or the cluster refuses it.
        ConflictError: a job of that name is there.
    """
    refuse_local_options(given)
    stays = [name for name in ("wait", "follow", "detach") if given.get(name)]
    if len(stays) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in stays)}: each says how long to stay; leave one")
    spec, archive = job_with_code(command, given)
    code.config_maps(spec, None if archive is None else archive.data)  # refused here for what is only shown, too
    facts = _read_facts(given["facts"]) if given.get("facts") else None
    if given.get("dry_run") != "server" and (given.get("dry_run") or given.get("explain")):
        return _show_job(spec, facts or ClusterFacts(), given, archive)
    from ktrain.cli import cluster_run

    client = cluster_run.client_of(given)
    data = None if archive is None else archive.data
    tried = cluster_run.try_job(client, spec, data, facts)
    for line in tried.warnings:
        _say(line)
    if given.get("dry_run") or given.get("explain"):
        return _show_job(spec, tried.facts, given, archive)
    _say_gang(tried.rendered)
    bring_code(spec, archive)
    stay = cluster_run.Stay(stays[0]) if stays and stays[0] != "detach" else cluster_run.Stay.NOT
    return cluster_run.send(client, tried, data, stay=stay, given=given)


def bring_code(spec: JobSpec, archive: CodeArchive | None) -> None:
    """Before the job is created, its code is where its pods look for it, unless objects of the job carry it."""
    if spec.code.is_in_bucket:
        from ktrain.run.code import send_code  # loads the package of the store

        _say(send_code(spec, archive))


def _show_job(spec: JobSpec, facts: ClusterFacts, given: Mapping[str, Any], archive: CodeArchive | None) -> int:
    rendered = render(spec, facts)
    plan = explain(spec, facts, rendered)
    objects = _printed(spec, rendered, archive) if given.get("dry_run") else None
    if given.get("output") == "json":
        click.echo(json.dumps(_report(spec, rendered, plan, objects), indent=2))
        return contract.EXIT_OK
    if objects is not None:
        click.echo(to_yaml(objects), nl=False)
    if given.get("explain"):
        _show(plan)
    else:
        _say_gang(rendered)
    return contract.EXIT_OK


def _say(line: str) -> None:
    click.echo(f"ktrain: {line}", err=True)


def _say_gang(rendered: Rendered) -> None:
    _say(f"gang {rendered.gang.kind.value}: {rendered.gang.reason}")
    if rendered.gang.warning is not None:
        _say(rendered.gang.warning)


# Options to a job


def job_from_options(command: tuple[str, ...], given: Mapping[str, Any]) -> JobSpec:
    """The job of a file with the options that were typed on top; a directory of code is not looked at.

    Raises:
        ConfigError: something in it cannot be.
    """
    value = spec_file.read_toml(given["job"]) if given.get("job") else {}
    if command:
        value["command"] = list(command)
    for name, path in _FIELDS.items():
        if given.get(name) is not None:
            spec_file.put(value, path, given[name])
    for text in given.get("env", ()):
        name, item = _split(text, "=", "--env NAME=VALUE")
        spec_file.put(value, f"env.{name}", item)
    _add(value, "secrets", [_secret(text) for text in given.get("secrets", ())])
    _add(value, "volumes", [_volume(text) for text in given.get("volumes", ())])
    for text in given.get("settings", ()):
        name, item = _split(text, "=", "--set FIELD=VALUE")
        spec_file.put(value, name, _toml_value(item))
    if not isinstance(value.get("run"), str):
        raise ConfigError("run: it is missing; say where the run lives, such as s3://bucket/net-a (--run)")
    value.setdefault("name", default_name(value["run"]))
    if given.get("code"):
        value["code"] = _code(value.get("code", {}), given["code"])
    return spec_file.from_value(value)


_GIT, _IMAGE = "git+", "image:"


def _code(known: Any, text: str) -> dict[str, Any]:
    """The table of code: what was typed takes the place of the source that the job file names."""
    if not isinstance(known, dict):
        raise ConfigError(f"code: expected a table, found {known!r}")
    if text.startswith(_GIT):
        return {"git": text, **{name: known[name] for name in ("git_secret", "env") if name in known}}
    if text.startswith(_IMAGE):
        return {"image": text.removeprefix(_IMAGE)}
    return {name: known[name] for name in ("way", "env") if name in known}


def _pack(text: str | None) -> CodeArchive | None:
    if not text or text.startswith((_GIT, _IMAGE)):
        return None
    archive = pack_code(Path(text))
    for line in archive.warnings:
        _say(line)
    return archive


def _with_code(spec: JobSpec, archive: CodeArchive, folder: str) -> JobSpec:
    """The job with the way that its code goes, which is said with its reason."""
    if spec.command[0] not in archive.names:
        raise ConfigError(
            f"code {folder}: it does not have the script {spec.command[0]!r}; give its path in that directory"
        )
    chosen = choose_way(archive, spec.run, spec.code)
    _say(f"code: {len(archive.names)} files, {chosen.reason}")
    return replace(spec, code=chosen.code)


def job_with_code(command: tuple[str, ...], given: Mapping[str, Any]) -> tuple[JobSpec, CodeArchive | None]:
    """The job as `job_from_options` makes it, and the packed code where a directory is sent, which sets the way.

    Raises:
        ConfigError: something in it cannot be.
    """
    return _and_code(job_from_options(command, given), given)


def _and_code(spec: JobSpec, given: Mapping[str, Any]) -> tuple[JobSpec, CodeArchive | None]:
    archive = _pack(given.get("code"))
    return (spec if archive is None else _with_code(spec, archive, given["code"])), archive


def job_from_value(value: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[JobSpec, CodeArchive | None]:
    """A job that was sent before, with the options that were typed on top, and the code where a directory is sent.

    Raises:
        ConfigError: something in it cannot be.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(value))
    if given.get("code"):
        changed.get("code", {}).pop("way", None)  # it is chosen anew, unless it is typed
    for name, path in _FIELDS.items():
        if name in given and given[name] is not None:
            spec_file.put(changed, path, given[name])
    for text in given.get("settings", ()):
        name, item = _split(text, "=", "--set FIELD=VALUE")
        spec_file.put(changed, name, _toml_value(item))
    if given.get("code"):
        changed["code"] = _code(changed.get("code", {}), given["code"])
    return _and_code(spec_file.from_value(changed), given)


def _add(value: dict[str, Any], name: str, items: list[dict[str, Any]]) -> None:
    known = value.get(name, [])
    if not isinstance(known, list):
        raise ConfigError(f"{name}: expected a list, found {known!r}")
    value[name] = [*known, *items]


def _split(text: str, mark: str, form: str) -> tuple[str, str]:
    name, found, rest = text.partition(mark)
    if not found or not name:
        raise ConfigError(f"{form}: found no {mark!r} behind a name")  # nor is it shown: it may be a secret
    return name, rest


def _secret(text: str) -> dict[str, str]:
    form = "--secret NAME=SECRET:KEY"
    name, source = _split(text, "=", form)
    secret, key = _split(source, ":", form)
    return {"env": name, "secret": secret, "key": key}


def _volume(text: str) -> dict[str, Any]:
    claim, rest = _split(text, ":", "--volume CLAIM:/PATH[:ro]")
    path, _, mode = rest.partition(":")
    if mode not in ("", "ro"):
        raise ConfigError(f"--volume CLAIM:/PATH[:ro]: found {text!r}")
    return {"claim": claim, "path": path, **({"read_only": True} if mode else {})}


def _toml_value(text: str) -> Any:
    """A value as TOML reads it; what it does not read is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read_facts(path: Path) -> ClusterFacts:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--facts {path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--facts {path}: expected a JSON object, found {type(value).__name__}")
    return ClusterFacts.from_value(value)


# What is shown


def _printed(spec: JobSpec, rendered: Rendered, archive: CodeArchive | None) -> list[dict[str, Any]]:
    """All objects in the order of sending, the secret without its value."""
    carried = code.config_maps(spec, None if archive is None else archive.data)
    return [shown(item) for item in (rendered.jobset, token_secret(spec, ""), *carried, *rendered.owned)]


def _report(spec: JobSpec, rendered: Rendered, plan: Plan, objects: list[dict[str, Any]] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"job": spec.name, "gang": asdict(rendered.gang), "released_by": rendered.released_by}
    return {**found, "plan": asdict(plan), **({} if objects is None else {"objects": objects})}


def _show(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="When this fails", title_justify="left")
    for column in ("failure", "starts again", "from", "steps lost", "back after", ""):
        table.add_column(column, overflow="fold")
    for item in plan.recoveries:
        table.add_row(item.failure, item.restart.value, item.tier or "", _steps(item), _seconds(item), item.note)
    memory = plan.memory
    console = Console(width=140, highlight=False)
    console.print(table)
    console.print(f"gang        {plan.gang}")
    console.print(f"volume of   {plan.scope}")
    console.print(
        f"memory      {show_bytes(memory.total)} a node: volume {show_bytes(memory.volume)} "
        f"(own {show_bytes(memory.own)}, {plan.replicas} copies {show_bytes(memory.kept)}), script "
        f"{show_bytes(memory.trainer)}, /dev/shm {show_bytes(memory.shm)}, in flight {show_bytes(memory.in_flight)}"
    )
    console.print(f"bucket      {show_bytes(plan.bucket_bytes)}")
    console.print(f"grace       {plan.grace_s} s from SIGTERM to SIGKILL")
    for missing in plan.missing:
        console.print(f"{'missing' if missing.is_known else 'not known'}   {missing.feature}: {missing.cost}")
    for text in plan.assumed:
        console.print(f"assumed     {text}")


def _steps(item: Recovery) -> str:
    return "?" if item.steps_lost is None else f"<= {item.steps_lost}" if item.steps_lost else "0"


def _seconds(item: Recovery) -> str:
    return "?" if item.seconds is None else f"{item.seconds:.0f} s"
