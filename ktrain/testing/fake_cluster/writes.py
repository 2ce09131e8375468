"""Requests that change objects: create, replace, patch, apply, delete."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ktrain.errors import ConfigError, ConflictError, NotFoundError
from ktrain.launcher.cluster.resources import (
    NAMESPACE,
    NODE,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SERVICE,
    SERVICE_ACCOUNT,
    Resource,
)
from ktrain.launcher.cluster.store import AlreadyExistsError, Preconditions, Store
from ktrain.testing.fake_cluster import apply, bodies, patches
from ktrain.testing.fake_cluster.offer import Served
from ktrain.testing.fake_cluster.requests import (
    APPLY,
    STRICT,
    Request,
    Response,
    Target,
    WriteOptions,
    parse_json,
    parse_options,
    write_options,
)
from ktrain.testing.fake_cluster.schemas import Schema
from ktrain.testing.fake_cluster.status import (
    REQUIRED,
    UNSUPPORTED,
    FieldError,
    Refusal,
    bad_request,
    invalid_options,
    invalid_patch,
    named,
    not_found,
    success,
    unsupported_media_type,
)
from ktrain.testing.fake_cluster.structural import decode_error

Object = dict[str, Any]

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
_PATCHES = (JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY)
_CUSTOM_PATCHES = (JSON_PATCH, MERGE_PATCH, APPLY)
_POLICIES = ("Foreground", "Background", "Orphan")
_RETURNED_WHEN_DELETED = (NAMESPACE, POD, SERVICE, SERVICE_ACCOUNT, PERSISTENT_VOLUME_CLAIM)
_MAX_TRIES = 20


class Writes:
    """Answers the requests that write. Safe from any thread."""

    def __init__(self, store: Store, served: Callable[[], Served]) -> None:
        self._store = store
        self._served = served

    def create(self, target: Target, request: Request) -> Response:
        options = write_options(request, "CreateOptions")
        obj, twice = bodies.decode(request, target.resource)
        bodies.check_place(target, obj)
        self._check_namespace(target)
        schema = self._served().schema(target.resource)
        warnings = bodies.tidy(target.resource, schema, obj, twice, options.validation)
        try:
            stored = self._create(target, obj, self._owner(target, request, apply.UPDATE), options)
        except Refusal as refusal:
            raise _with_warnings(refusal, warnings) from refusal
        return Response(201, stored, warnings=warnings)

    def replace(self, target: Target, request: Request) -> Response:
        options = write_options(request, "UpdateOptions")
        obj, twice = bodies.decode(request, target.resource)
        bodies.check_place(target, obj)
        schema = self._served().schema(target.resource)
        warnings = bodies.tidy(target.resource, schema, obj, twice, options.validation)
        live = self._live(target)
        _check_uid(target, live, obj)
        new = apply.updated(schema, live, obj, self._owner(target, request, apply.UPDATE))
        return Response(200, self._update(target, live, new, options), warnings=warnings)

    def patch(self, target: Target, request: Request) -> Response:
        options = write_options(request, "PatchOptions")
        accepted = _CUSTOM_PATCHES if target.resource.is_custom else _PATCHES
        if request.content_type not in accepted:
            raise unsupported_media_type(accepted)
        attempt = self._apply if request.content_type == APPLY else self._patch
        for tries in range(1, _MAX_TRIES + 1):
            try:
                return attempt(target, request, options)
            except _StaleError:
                if tries == _MAX_TRIES:
                    raise
        raise AssertionError("unreachable")

    def _patch(self, target: Target, request: Request, options: WriteOptions) -> Response:
        schema = self._served().schema(target.resource)
        live = self._live(target)
        patched = _patched(request, schema, live)
        names_version = _names_version(live, patched)
        warnings = self._check_patched(target.resource, schema, patched, options)
        bodies.check_place(target, patched)
        new = apply.updated(schema, live, patched, self._owner(target, request, apply.UPDATE))
        stored = self._update_unless_stale(target, live, new, options, names_version=names_version)
        return Response(200, stored, warnings=warnings)

    def _check_patched(
        self, resource: Resource, schema: Schema | None, patched: Object, options: WriteOptions
    ) -> tuple[str, ...]:
        before = copy.deepcopy(patched)
        if schema is not None and not resource.is_custom:
            wrong = decode_error(schema, patched)
            if wrong is not None:
                raise invalid_patch(before, wrong)
        found = bodies.strict_errors(schema, patched, [])
        if found and options.validation == STRICT:
            raise invalid_patch(before, f"strict decoding error: {', '.join(found)}")
        return () if options.validation == "Ignore" else tuple(found)

    def _apply(self, target: Target, request: Request, options: WriteOptions) -> Response:
        if not request.query.get("fieldManager"):
            error = FieldError(REQUIRED, "fieldManager", "", "is required for apply patch")
            raise invalid_options("PatchOptions", error)
        wanted = _parsed(request)
        name, namespace = wanted.get("metadata", {}).get("name", ""), wanted.get("metadata", {}).get("namespace", "")
        bodies.check_place(target, wanted)
        schema = self._served().schema(target.resource)
        unknown = bodies.strict_errors(schema, copy.deepcopy(wanted), [])
        if unknown:
            path = unknown[0].partition('"')[2].rstrip('"')
            kind = f"{target.resource.api_version}, Kind={target.resource.kind}"
            what = f"failed to create typed patch object ({namespace}/{name}; {kind})"
            raise Refusal(500, f"{what}: .{path}: field not declared in schema")
        owner = self._owner(target, request, apply.APPLY)
        try:
            live = self._live(target)
        except Refusal:
            self._check_namespace(target)
            empty = {"metadata": {"name": target.name, "namespace": target.namespace}}
            created = apply.apply(schema, empty, wanted, owner, force=True)
            try:
                return Response(201, self._create(target, created, None, options))
            except Refusal as refusal:
                if refusal.reason == "AlreadyExists":
                    raise _StaleError(refusal) from refusal
                raise
        _check_uid(target, live, wanted)
        new = apply.apply(schema, live, wanted, owner, force=options.force)
        names_version = bool(wanted["metadata"].get("resourceVersion"))
        return Response(200, self._update_unless_stale(target, live, new, options, names_version=names_version))

    def delete(self, target: Target, request: Request) -> Response:
        options = parse_options(request)
        dry_run = write_options(request, "DeleteOptions").dry_run or bool(options.get("dryRun"))
        _check_policy(options)
        live = self._live(target)
        gone = self._delete(target, live, options, dry_run=dry_run)
        metadata = gone["metadata"]
        is_held = bool(metadata.get("finalizers") or metadata.get("deletionGracePeriodSeconds"))
        if is_held or target.resource.storage in {each.storage for each in _RETURNED_WHEN_DELETED}:
            return Response(200, gone)
        details = {**named(target.resource, target.name), "uid": metadata["uid"]}
        return Response(200, success(details))

    def delete_collection(self, target: Target, request: Request) -> Response:
        options = parse_options(request)
        _check_policy(options)
        query, resource = request.query, target.resource
        try:
            listed = self._store.list(
                resource, target.namespace, labels=query.get("labelSelector"), fields=query.get("fieldSelector")
            )
        except ConfigError as error:
            raise bad_request(str(error)) from error
        dry_run = write_options(request, "DeleteOptions").dry_run
        for obj in listed.items:
            one = Target(resource, obj["metadata"].get("namespace"), obj["metadata"]["name"], None)
            try:
                self._delete(one, obj, options, dry_run=dry_run)
            except Refusal as refusal:
                if refusal.code != 404:  # somebody else was faster
                    raise
        items = listed.items if resource.is_custom else [bodies.plain(obj) for obj in listed.items]
        kind = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return Response(200, {**kind, "metadata": {"resourceVersion": listed.version}, "items": items})

    # ------------------------------------------------------------------ the store's answers in the server's words

    def _owner(self, target: Target, request: Request, operation: str) -> apply.Owner:
        part = target.subresource or ""
        version = target.resource.api_version
        return apply.Owner(request.writer, operation, version, part, self._store.now(), frozenset())

    def _live(self, target: Target) -> Object:
        assert target.name is not None
        try:
            return self._store.get(target.resource, target.namespace, target.name)
        except NotFoundError as error:
            raise not_found(target.resource, target.name) from error

    def _check_namespace(self, target: Target) -> None:
        if target.namespace is None:
            return
        try:
            namespace = self._store.get(NAMESPACE, None, target.namespace)
        except NotFoundError as error:
            raise not_found(NAMESPACE, target.namespace) from error
        if namespace["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {target.namespace} because it is being terminated"
            message = f"{target.resource.qualified} is forbidden: {why}"
            raise Refusal(403, message, "Forbidden", named(target.resource, None))

    def _create(self, target: Target, obj: Object, owner: apply.Owner | None, options: WriteOptions) -> Object:
        resource = target.resource
        if "status" in resource.subresources and resource.storage != NODE.storage:
            obj.pop("status", None)
        if owner is not None:
            obj["metadata"].pop("managedFields", None)
            obj = apply.updated(self._served().schema(resource), {"metadata": {}}, obj, owner)
        try:
            return self._store.plan_create(resource, obj) if options.dry_run else self._store.create(resource, obj)
        except Refusal:
            raise
        except AlreadyExistsError as error:
            details = named(resource, obj["metadata"].get("name"))
            raise Refusal(409, str(error), "AlreadyExists", details) from error
        except ConfigError as error:
            required = FieldError(REQUIRED, "metadata.name", "", "name or generateName is required")
            message = f'{resource.qualified_kind} "" is invalid: metadata.name: {required.text}'
            details = {**named(resource, None, kind=resource.kind), "causes": [required.cause()]}
            raise Refusal(422, message, "Invalid", details) from error

    def _update(self, target: Target, live: Object, new: Object, options: WriteOptions) -> Object:
        is_status = target.subresource == "status"
        if _same_but_times(live, new):
            new = {**new, "metadata": {**new["metadata"], "managedFields": live["metadata"].get("managedFields")}}
            if new["metadata"]["managedFields"] is None:
                del new["metadata"]["managedFields"]
        write = self._store.plan_update if options.dry_run else self._store.update
        try:
            return write(target.resource, new, status=is_status)
        except NotFoundError as error:
            raise not_found(target.resource, str(target.name)) from error
        except ConflictError as error:
            raise Refusal(409, str(error), "Conflict", named(target.resource, target.name)) from error

    def _update_unless_stale(
        self, target: Target, live: Object, new: Object, options: WriteOptions, *, names_version: bool
    ) -> Object:
        """Updates; where somebody wrote in between, a request that names no version is to be tried again."""
        try:
            return self._update(target, live, new, options)
        except Refusal as refusal:
            if refusal.reason == "Conflict" and not names_version:
                raise _StaleError(refusal) from refusal
            raise

    def _delete(self, target: Target, live: Object, options: Object, *, dry_run: bool) -> Object:
        wanted = options.get("preconditions") or {}
        preconditions = Preconditions(wanted.get("uid"), wanted.get("resourceVersion"))
        if dry_run:
            return live
        assert target.name is not None
        propagation = options.get("propagationPolicy") or "Background"
        if options.get("orphanDependents"):
            propagation = "Orphan"
        try:
            return self._store.delete(
                target.resource,
                target.namespace,
                target.name,
                grace_s=options.get("gracePeriodSeconds"),
                propagation=propagation,
                preconditions=preconditions,
            )
        except NotFoundError as error:
            raise not_found(target.resource, target.name) from error
        except ConflictError as error:
            details = named(target.resource, target.name, kind=target.resource.kind)
            raise Refusal(409, str(error), "Conflict", details) from error


class _StaleError(Refusal):
    """Somebody wrote between the reading and the writing of a request that does not care."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code, refusal.message, refusal.reason, refusal.details)


def _parsed(request: Request) -> Any:
    try:
        return parse_json(request.body.decode("utf-8", "replace"))[0]
    except ConfigError as error:
        raise bad_request(f"error decoding patch: {error}") from error


def _patched(request: Request, schema: Schema | None, live: Object) -> Object:
    patch = _parsed(request)
    if request.content_type == JSON_PATCH:
        try:
            return dict(patches.json_patch(live, patch))
        except ConfigError as error:
            message = "the server rejected our request due to an error in our request"
            raise Refusal(422, message, "Invalid", {}) from error
    if request.content_type == STRATEGIC_PATCH:
        return dict(patches.strategic_merge(schema, live, patch))
    return dict(patches.merge(live, patch))


def _names_version(live: Object, patched: Object) -> bool:
    return bool(patched["metadata"].get("resourceVersion") != live["metadata"]["resourceVersion"])


def _check_uid(target: Target, live: Object, new: Object) -> None:
    wanted, found = new["metadata"].get("uid"), live["metadata"]["uid"]
    if wanted and wanted != found:
        group = f"{target.resource.group}/" if target.resource.is_custom else ""
        key = f"/registry/{group}{target.resource.plural}/{target.namespace}/{target.name}"
        why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
        storage = f"StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: {why}"
        message = f'Operation cannot be fulfilled on {target.resource.qualified} "{target.name}": {storage}'
        raise Refusal(409, message, "Conflict", named(target.resource, target.name))


def _check_policy(options: Object) -> None:
    policy = options.get("propagationPolicy")
    if policy is not None and policy not in _POLICIES:
        supported = ", ".join(f'"{each}"' for each in (*_POLICIES, "nil"))
        error = FieldError(UNSUPPORTED, "propagationPolicy", f'"{policy}"', f"supported values: {supported}")
        raise invalid_options("DeleteOptions", error)


def _same_but_times(live: Object, new: Object) -> bool:
    """Whether a write changes nothing but the times at which fields were written."""
    return _timeless(live) == _timeless(new)


def _timeless(obj: Object) -> Object:
    metadata = dict(obj["metadata"])
    entries = metadata.pop("managedFields", None) or []
    metadata.pop("resourceVersion", None)
    timeless = [{key: value for key, value in entry.items() if key != "time"} for entry in entries]
    order = sorted(timeless, key=lambda entry: (entry["manager"], entry["operation"], entry.get("subresource", "")))
    rest = {key: value for key, value in obj.items() if key not in ("metadata", "apiVersion", "kind")}
    return {"rest": rest, "metadata": metadata, "owners": order}


def _with_warnings(refusal: Refusal, warnings: tuple[str, ...]) -> Refusal:
    refusal.warnings = warnings
    return refusal
