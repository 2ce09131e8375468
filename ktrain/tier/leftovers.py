"""Parts that a dead process left in an unfinished upload, proven by the store's own digests (ADR 0013).

Invariant: a part counts only when the store names its size and its CRC-64/NVME digest, and both are those of the
snapshot. What cannot be told is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MAX_LISTED = 10  # pages of 1,000 parts each; S3 has at most 10,000 parts

Ask = Callable[..., Mapping[str, Any]]
"""One request to S3: the client's method and its fields."""


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part of an upload: the bytes [begin, end) of the object, and what requests say of their digest."""

    number: int
    begin: int
    end: int
    checksum: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Leftovers:
    """The unfinished uploads of one object.

    Attributes:
        upload_ids: all of them.
        best: the one with the most proven bytes; None where nothing is proven.
        tags: of its proven parts, by number.
    """

    upload_ids: tuple[str, ...] = ()
    best: str | None = None
    tags: Mapping[int, str] = field(default_factory=dict)


def find_leftovers(ask: Ask, bucket: str, key: str, parts: Sequence[PartPlan]) -> Leftovers:
    """What others left of this very object. Errors are those of `ask`."""
    answer = ask("list_multipart_uploads", Bucket=bucket, Prefix=key)  # of one name there are few: one page
    found = tuple(str(upload["UploadId"]) for upload in answer.get("Uploads", ()) if upload["Key"] == key)
    planned = {part.number: part for part in parts}
    best, tags, most_nbytes = None, dict[int, str](), 0
    for upload_id in found:
        proven = {
            listed["PartNumber"]: str(listed["ETag"])
            for listed in _parts(ask, Bucket=bucket, Key=key, UploadId=upload_id)
            if _is_proven(listed, planned.get(listed["PartNumber"]))
        }
        nbytes = sum(planned[number].nbytes for number in proven)
        if nbytes > most_nbytes:
            best, tags, most_nbytes = upload_id, proven, nbytes
    return Leftovers(found, best, tags)


def _is_proven(listed: Mapping[str, Any], planned: PartPlan | None) -> bool:
    if planned is None or not planned.checksum or listed.get("Size") != planned.nbytes:
        return False
    return all(listed.get(name) == value for name, value in planned.checksum.items())


def _parts(ask: Ask, **upload: str) -> Iterator[Mapping[str, Any]]:
    marker = 0
    for _ in range(_MAX_LISTED):
        answer = ask("list_parts", **upload, PartNumberMarker=marker)
        yield from answer.get("Parts", ())
        following = int(answer.get("NextPartNumberMarker") or 0)
        if not answer.get("IsTruncated") or following <= marker:
            return
        marker = following
