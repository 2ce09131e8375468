"""A request as the server understands it: its path, its options, its body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.resources import NAMESPACE, Resource
from ktrain.testing.fake_cluster import strict_json
from ktrain.testing.fake_cluster.offer import Served
from ktrain.testing.fake_cluster.status import (
    UNSUPPORTED,
    FieldError,
    bad_request,
    invalid_options,
    no_such_resource,
)

Object = dict[str, Any]

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
STRICT, WARN, IGNORE = "Strict", "Warn", "Ignore"
NOT_FOUND_PAGE = "404 page not found\n"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `headers` are looked up by their usual spelling."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip()

    @property
    def writer(self) -> str:
        """Who is written down as owner of what the request changes."""
        named = self.query.get("fieldManager")
        return named or self.headers.get("User-Agent", "unknown").partition("/")[0][:128]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: an object, a text, or a stream of pieces that ends when the iterator does."""

    status: int
    body: Object | str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Iterator[bytes] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names: a collection, an object (`name`), or a part of one (`subresource`)."""

    resource: Resource
    namespace: str | None
    name: str | None
    subresource: str | None

    @property
    def what(self) -> str:
        """The name of the resource in rules of access: `pods`, `pods/log`."""
        return self.resource.plural + (f"/{self.subresource}" if self.subresource else "")


def parse_target(served: Served, path: str) -> Target | None:
    """Returns what a path names; None where its group is not served or it is no path of objects.

    Raises:
        Refusal: 404 in JSON, the group is served but not this version, or not this resource.
    """
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        api_version, rest = parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        api_version, rest = f"{parts[1]}/{parts[2]}", parts[3:]
        if not served.versions(parts[1]):
            return None
    else:
        return None
    namespace = None
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in NAMESPACE.subresources:
        namespace, rest = rest[1], rest[2:]
    resource = served.find(api_version, rest[0])
    if resource is None or len(rest) > 3:
        raise no_such_resource()
    name, subresource = (rest[1:] + [None, None])[:2]
    if subresource is not None and subresource not in resource.subresources:
        raise no_such_resource()
    return Target(resource, namespace, name, subresource)


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """The options of a request that writes."""

    dry_run: bool
    validation: str
    force: bool


def write_options(request: Request, kind: str) -> WriteOptions:
    """Raises:
    Refusal: 422, an option with a value that it may not have.
    """
    dry_run = request.query.get("dryRun", "")
    if dry_run not in ("", "All"):
        raise invalid_options(kind, FieldError(UNSUPPORTED, "dryRun", f'["{dry_run}"]', 'supported values: "All"'))
    validation = request.query.get("fieldValidation", WARN) or WARN
    if validation not in (STRICT, WARN, IGNORE):
        supported = 'supported values: "Ignore", "Warn", "Strict"'
        raise invalid_options(kind, FieldError(UNSUPPORTED, "fieldValidation", f'"{validation}"', supported))
    return WriteOptions(dry_run == "All", validation, request.query.get("force") in ("true", "1"))


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Returns a body that is JSON or YAML, and the fields that come twice.

    Raises:
        ConfigError: it is neither.
    """
    try:
        return strict_json.parse(text)
    except ConfigError:
        if not text.lstrip().startswith(("{", "[")):
            import yaml

            try:
                return yaml.safe_load(text), []
            except yaml.YAMLError as error:
                raise ConfigError(f"yaml: {error}") from error
        raise


def parse_options(request: Request) -> Object:
    """The DeleteOptions of a request: those of its body, else those of its query."""
    if request.body.strip():
        try:
            body, _ = parse_json(request.body.decode("utf-8", "replace"))
        except ConfigError as error:
            raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
        if isinstance(body, dict):
            return body
    options: Object = {}
    if "gracePeriodSeconds" in request.query:
        options["gracePeriodSeconds"] = int(request.query["gracePeriodSeconds"])
    if "propagationPolicy" in request.query:
        options["propagationPolicy"] = request.query["propagationPolicy"]
    return options
