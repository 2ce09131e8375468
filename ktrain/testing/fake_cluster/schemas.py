"""Schemas of what a cluster serves: of Kubernetes' own kinds by version, of custom resources from their CRDs.

Kubernetes' own come from the package `kubernetes-validate`, which ships the OpenAPI definitions of each minor version.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.resources import Resource

Node = Mapping[str, Any]

_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_KEEPS_UNKNOWN = "x-kubernetes-preserve-unknown-fields"


@dataclass(frozen=True, slots=True)
class Schema:
    """One node of a schema, references resolved. `go_type` is the name of the struct that it describes, if any."""

    node: Node
    definitions: Mapping[str, Node] = field(default_factory=dict)
    go_type: str = ""

    @property
    def type(self) -> str:
        """`object`, `array`, `string`, `integer`, `number`, `boolean`; empty where several are right."""
        if self.is_int_or_string:
            return ""
        found = self.node.get("type", "")
        kinds = [found] if isinstance(found, str) else [kind for kind in found if kind != "null"]
        if not kinds and ("properties" in self.node or "additionalProperties" in self.node):
            return "object"
        return kinds[0] if len(kinds) == 1 else ""

    @property
    def is_int_or_string(self) -> bool:
        return bool(self.node.get("x-kubernetes-int-or-string")) or self.go_type in ("IntOrString", "Quantity")

    @property
    def keeps_unknown(self) -> bool:
        """Whether fields that the schema does not name are kept as they are."""
        shapeless = not (self.node.get("properties") or self.node.get("additionalProperties"))
        # A Go type without fields that is written as an object holds what it likes; CRDs say it of theirs.
        is_free_form = bool(self.go_type) and shapeless and self.type == "object"
        return bool(self.node.get(_KEEPS_UNKNOWN)) or is_free_form

    @property
    def is_map(self) -> bool:
        """Whether the keys of the object are the user's."""
        return bool(self.node.get("additionalProperties"))

    @property
    def list_keys(self) -> tuple[str, ...]:
        """The fields that tell the items of a list apart; empty for a list that is one value."""
        return tuple(self.node.get("x-kubernetes-list-map-keys") or ())

    @property
    def merge_key(self) -> str:
        """The field by which a strategic merge patch tells items apart; empty where the list is replaced."""
        merges = "merge" in self.node.get("x-kubernetes-patch-strategy", "")
        return str(self.node.get("x-kubernetes-patch-merge-key", "")) if merges else ""

    @property
    def is_set(self) -> bool:
        return self.node.get("x-kubernetes-list-type") == "set"

    @property
    def is_atomic(self) -> bool:
        """Whether an object is owned as one value."""
        return self.node.get("x-kubernetes-map-type") == "atomic"

    @property
    def properties(self) -> Iterator[tuple[str, Schema]]:
        return ((key, self._resolved(node)) for key, node in (self.node.get("properties") or {}).items())

    def child(self, key: str) -> Schema | None:
        """The schema of a field; None for one that the schema does not know."""
        node = (self.node.get("properties") or {}).get(key)
        if node is None and isinstance(self.node.get("additionalProperties"), Mapping):
            node = self.node["additionalProperties"]
        return None if node is None else self._resolved(node)

    def item(self) -> Schema | None:
        node = self.node.get("items")
        return None if node is None else self._resolved(node)

    def _resolved(self, node: Node) -> Schema:
        reference = node.get("$ref")
        if reference is None:
            return Schema(node, self.definitions)
        name = reference.rpartition("/")[2]
        own = {key: value for key, value in node.items() if key != "$ref"}
        return Schema({**self.definitions[name], **own}, self.definitions, name.rpartition(".")[2])


def core_schema(minor: int, resource: Resource) -> Schema | None:
    """The schema of one of Kubernetes' own kinds; None where that version has no such kind.

    Raises:
        ConfigError: `kubernetes-validate` is not installed, or does not know the version.
    """
    definitions = _core_definitions(minor)
    package = resource.group.partition(".")[0] or "core"
    name = f"io.k8s.api.{package}.{resource.version}.{resource.kind}"
    node = definitions.get(name)
    return None if node is None else Schema(node, definitions, resource.kind)


def metadata_schema(minor: int) -> Schema:
    """The schema of every object's metadata."""
    definitions = _core_definitions(minor)
    return Schema(definitions[_META], definitions, "ObjectMeta")


@lru_cache(maxsize=16)
def _core_definitions(minor: int) -> Mapping[str, Node]:
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or package.origin is None:
        raise ConfigError("fake cluster: it needs the schemas of kubernetes-validate; pip install 'ktrain[test]'")
    folder = Path(package.origin).parent / "kubernetes-json-schema"
    path = folder / f"v1.{minor}.0-local" / "_definitions.json"
    if not path.is_file():
        found = sorted(entry.name for entry in folder.glob("v1.*-local"))
        raise ConfigError(f"fake cluster: kubernetes-validate has no schemas of 1.{minor}; it has {', '.join(found)}")
    definitions: Mapping[str, Node] = json.loads(path.read_text("utf-8"))["$defs"]
    return definitions


@dataclass(frozen=True, slots=True)
class Definition:
    """A custom resource definition: the object, and the resources and schemas of the versions that it serves."""

    obj: Mapping[str, Any]
    resources: tuple[Resource, ...]
    schemas: Mapping[str, Schema]  # by version


def read_definition(path: Path) -> Definition:
    """Reads a CRD from its file.

    Raises:
        ConfigError: there is no such file, or it holds no CRD.
    """
    if not path.is_file():
        raise ConfigError(f"fake cluster: no CRD {path}; give the folder of the CRDs, or a version that is there")
    return _read_definition(path)


@lru_cache(maxsize=64)
def _read_definition(path: Path) -> Definition:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    obj = yaml.load(path.read_text("utf-8"), Loader=loader)
    if obj.get("kind") != "CustomResourceDefinition":
        raise ConfigError(f"fake cluster: {path} holds {obj.get('kind')}, expected a CustomResourceDefinition")
    served = [version for version in obj["spec"]["versions"] if version["served"]]
    schemas = {version["name"]: Schema(version["schema"]["openAPIV3Schema"]) for version in served}
    return Definition(obj, tuple(_resource(obj["spec"], version) for version in served), schemas)


def _resource(spec: Mapping[str, Any], version: Mapping[str, Any]) -> Resource:
    names = spec["names"]
    return Resource(
        spec["group"],
        version["name"],
        names["plural"],
        names["kind"],
        spec["scope"] == "Namespaced",
        tuple(version.get("subresources") or ()),
        tuple(names.get("shortNames") or ()),
        tuple(names.get("categories") or ()),
        counts_generation=True,
    )
