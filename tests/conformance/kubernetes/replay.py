"""Replays a recorded transcript against a server and compares its answers with the recorded ones.

Placeholders of a transcript (`<uid-1>`, `<rv-2>`, `<time>`) stand for values that differ between servers. The first
answer that shows one binds it; requests that follow are sent with the bound value, and answers must go on using it.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ktrain.base.clock import Deadline
from ktrain.testing.fake_cluster import FakeCluster

PLACEHOLDER = re.compile(
    r"<(?:uid|rand|rv|ip|address|node)-\d+>|<time>|<microtime>|<continue>|<hex>|<uuid>|<git-commit>|<instance>"
)
_FORMS = {
    "uid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "rand": r"[a-z0-9]{5}",
    "rv": r"\d+",
    "address": r"[0-9.]+:\d+",
    "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "microtime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(?:Z|\+00:00)",
}
_SENT = {"<time>": "2026-01-02T03:04:05Z", "<continue>": "garbage"}
_REBOUND = ("rv", "time", "microtime", "continue", "address")  # not held to one value within a transcript
_OTHERS = ("kube-root-ca.crt", "openshift-service-ca.crt")  # made in every namespace by controllers that are not here
WAIT_S = 20.0
_WATCH_S = 1.0  # a recorded watch of several seconds is over sooner here


@dataclass(slots=True)
class Bindings:
    """What the placeholders of a transcript stand for."""

    values: dict[str, str] = field(default_factory=dict)
    num_times: int = 0

    def fill(self, value: Any, unknown: str = "1") -> Any:
        """The value with its placeholders replaced; `unknown` for a version that no answer has shown."""
        if isinstance(value, dict):
            return {self.fill(key): self.fill(entry, unknown) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.fill(entry, unknown) for entry in value]
        if not isinstance(value, str):
            return value
        return PLACEHOLDER.sub(lambda found: self._value(found[0], unknown), value)

    def _value(self, name: str, unknown: str) -> str:
        if name == "<microtime>":  # each its own: what is written again is to be a change
            self.num_times += 1
            return f"2026-01-02T03:04:05.{self.num_times:06d}Z"
        return self.values.get(name) or _SENT.get(name) or _unknown(name, unknown)

    def match(self, recorded: str, found: str) -> bool:
        """Whether a text is the recorded one; binds what it shows first."""
        pattern, names, last = "", [], 0
        for placeholder in PLACEHOLDER.finditer(recorded):
            kind = placeholder[0].strip("<>").partition("-")[0]
            pattern += re.escape(recorded[last : placeholder.start()]) + f"({_FORMS.get(kind, '.+')})"
            names.append((kind, placeholder[0]))
            last = placeholder.end()
        matched = re.fullmatch(pattern + re.escape(recorded[last:]), found, re.DOTALL)
        if matched is None:
            return False
        for (kind, name), value in zip(names, matched.groups(), strict=True):
            if kind not in _REBOUND and self.values.setdefault(name, value) != value:
                return False
            self.values[name] = value
        return True


def _unknown(placeholder: str, version: str) -> str:
    return {"rv": version, "uid": "00000000-0000-0000-0000-000000000000"}.get(placeholder[1:].partition("-")[0], "x")


_DIFF = re.compile(r"\n@@ .*", re.DOTALL)  # of two Go values
_PRINTED = re.compile(r"Invalid value: .+: (field is immutable|strict decoding error|parsing time)", re.DOTALL)


def differences(recorded: Any, found: Any, bindings: Bindings, path: str = "") -> Iterator[str]:
    """Yields where an answer differs from the recorded one; a null and an absent field are the same."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted({*recorded, *found}):
            yield from differences(recorded.get(key), found.get(key), bindings, f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for i, (left, right) in enumerate(zip(recorded, found, strict=True)):
            yield from differences(left, right, bindings, f"{path}[{i}]")
    elif isinstance(recorded, str) and isinstance(found, str):
        # Values are printed from Go structs, in the order of their fields: they are not compared.
        recorded, found = (_DIFF.sub("", _PRINTED.sub(r"Invalid value: ...: \1", text)) for text in (recorded, found))
        if not bindings.match(recorded, found):
            yield f"{path}: recorded {recorded!r}, found {found!r}"
    elif recorded != found:
        yield f"{path}: recorded {recorded!r}, found {found!r}"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any


class Client:
    """Sends requests as they were recorded, as an administrator unless they say otherwise."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._host = cluster.url.removeprefix("http://")

    def connect(self, request: Mapping[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, timeout=WAIT_S)
        body = request.get("body")
        data = None if body is None else body if isinstance(body, str) else json.dumps(body)
        headers = {"Authorization": "Bearer admin", "Accept": "application/json", "User-Agent": "python-urllib3/2"}
        if data is not None:
            headers["Content-Type"] = request.get("content_type", "application/json")
        headers |= request.get("headers") or {}
        query = f"?{urlencode(request['query'])}" if request.get("query") else ""
        connection.request(request.get("method", "GET"), request["path"] + query, data, headers)
        return connection, connection.getresponse()

    def send(self, request: Mapping[str, Any]) -> Answer:
        connection, response = self.connect(request)
        try:
            text = response.read()
            headers = {name: value for name, value in response.getheaders()}
            is_json = (response.getheader("Content-Type") or "").startswith("application/json")
            return Answer(response.status, headers, json.loads(text) if is_json else text.decode())
        finally:
            connection.close()


class Follower:
    """Reads a watch on a thread of its own, from its opening to `end`."""

    def __init__(self, client: Client, request: Mapping[str, Any]) -> None:
        self._connection, self._response = client.connect(request)
        self.status = self._response.status
        self._events: list[dict[str, Any]] = []  # guarded by _changed
        self._changed = threading.Condition()
        self._ended = False  # guarded by _changed
        self._thread = threading.Thread(target=self._read, name="follower")
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._response:
                with self._changed:
                    self._events.append(json.loads(line))
                    self._changed.notify_all()
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass  # closed by `end`
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def end(self, count: int) -> list[dict[str, Any]]:
        """Waits for so many events, or for the server's end, closes, and returns what came."""
        deadline = Deadline.after(WAIT_S)
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._events) >= count, deadline.remaining_s())
        sock = self._connection.sock
        if sock is not None:
            sock.shutdown(2)
        self._thread.join(WAIT_S)
        self._connection.close()
        return self._events


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]


def request_of(step: Mapping[str, Any], bindings: Bindings, unknown_version: str) -> dict[str, Any]:
    request = dict(bindings.fill(step["request"], unknown_version))
    if isinstance(step["request"].get("body"), str):
        request["body"] = bindings.fill(step["request"]["body"])
    return request


def watch_of(step: Mapping[str, Any], bindings: Bindings) -> dict[str, Any]:
    query = dict(bindings.fill(step["watch"]["query"]))
    if "timeoutSeconds" in query:
        query["timeoutSeconds"] = _WATCH_S
    return {"path": bindings.fill(step["watch"]["path"]), "query": query}


def compare_answer(step: Mapping[str, Any], answer: Answer, bindings: Bindings) -> list[str]:
    """Where an answer differs from the recorded one."""
    recorded = step["response"]
    if answer.status != recorded["status"]:
        return [f"status: recorded {recorded['status']}, found {answer.status}: {str(answer.body)[:300]}"]
    found = [
        f"header {name}: recorded {value!r}, found {answer.headers.get(name)!r}"
        for name, value in recorded["headers"].items()
        if answer.headers.get(name) != value
    ]
    return [*found, *differences(recorded["body"], without_owners(answer.body), bindings)]


def compare_events(recorded: list[Any], found: list[Any], bindings: Bindings, num: int | None = None) -> list[str]:
    """Where the events of a watch differ, the first `num` of them; bookmarks come at their own times."""
    bookmarks = [sum(event["type"] == "BOOKMARK" for event in events) for events in (recorded, found)]
    if bool(bookmarks[0]) != bool(bookmarks[1]):
        return [f"bookmarks: recorded {bookmarks[0]}, found {bookmarks[1]}"]
    left, right = ([event for event in events if _counts(event)][:num] for events in (recorded, found))
    if [event["type"] for event in left] != [event["type"] for event in right]:
        return [f"events: recorded {_short(left)}, found {_short(right)}"]
    return list(differences(left, [without_owners(event) for event in right], bindings))


def counted(events: list[Any]) -> int:
    return sum(_counts(event) for event in events)


def _counts(event: Mapping[str, Any]) -> bool:
    metadata = event["object"].get("metadata", {})
    if event["type"] == "BOOKMARK":
        return "annotations" in metadata  # the end of a streamed list has its place
    return metadata.get("name") not in _OTHERS


def served_alike(step: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """The step with its recorded discovery cut down to what this server serves too."""
    body = dict(step["response"]["body"]) if isinstance(step["response"]["body"], dict) else step["response"]["body"]
    for key, name in (("groups", _named("name")), ("resources", _named("name")), ("items", _group)):
        if isinstance(body, dict) and key in body and isinstance(answer.body, dict):
            there = {name(entry) for entry in answer.body.get(key, [])}
            body[key] = [_cut(entry, answer) for entry in body[key] if name(entry) in there]
    return {**step, "response": {**step["response"], "body": body}}


def _named(key: str) -> Any:
    return lambda entry: entry[key]


def _group(entry: Mapping[str, Any]) -> str:
    return str(entry["metadata"].get("name", ""))


def _cut(entry: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """A group of the aggregated discovery with the versions, resources and subresources that are served here."""
    if "metadata" not in entry:
        return entry
    mine = next(each for each in answer.body["items"] if _group(each) == _group(entry))
    resources = {v["version"]: {r["resource"]: r for r in v["resources"]} for v in mine["versions"]}
    versions = [
        {
            **v,
            "resources": [
                _cut_parts(r, resources[v["version"]])
                for r in v["resources"]
                if r["resource"] in resources[v["version"]]
            ],
        }
        for v in entry["versions"]
        if v["version"] in resources
    ]
    return {**entry, "versions": versions}


def _cut_parts(resource: dict[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    served = {part["subresource"] for part in mine[resource["resource"]].get("subresources", [])}
    parts = [part for part in resource.get("subresources", []) if part["subresource"] in served]
    rest = {key: value for key, value in resource.items() if key != "subresources"}
    return rest | ({"subresources": parts} if parts else {})


def _short(events: list[Any]) -> list[str]:
    return [f"{event['type']} {event['object'].get('metadata', {}).get('name')}" for event in events]


def without_owners(value: Any) -> Any:
    """A body without `managedFields`, which the transcripts leave out."""
    if isinstance(value, dict):
        return {key: without_owners(entry) for key, entry in value.items() if key != "managedFields"}
    return [without_owners(entry) for entry in value] if isinstance(value, list) else value
