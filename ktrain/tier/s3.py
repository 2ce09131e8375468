"""Large writes to S3: one request, or parts side by side, straight from the caller's memory, proven on their way.

s3fs's own upload sends parts in rounds that each wait for their slowest, and tries again below us without a common
budget.
"""

from __future__ import annotations

import base64
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ktrain.abc.proven import BadBytes, Chunks, Terms
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.retry import BusyError, Retries
from ktrain.errors import (
    CorruptionError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.tier.answers import translate_write
from ktrain.tier.body import ProvenBody
from ktrain.tier.deadline import Call
from ktrain.tier.leftovers import Leftovers, PartPlan, find_leftovers
from ktrain.tier.parts import copy_proven, part_nbytes, sample_chunks, side_by_side
from ktrain.tier.s3_client import S3Requests
from ktrain.tier.shapes import Shape, Shapes

PART_NBYTES = 16 << 20
ONE_REQUEST_NBYTES = 256 << 20
"""A payload of no more may go as one request; what an upload that died has sent of a larger one is never sent again."""
_LOG = logging.getLogger(__name__)
_NUM_PARTS_IN_FLIGHT = 8  # of one object
_MAX_NUM_PARTS = 9_000  # S3 takes 10,000
_SLOWEST_BYTES_PER_S = 1e6  # a request that is slower is sent again


@dataclass(frozen=True, slots=True)
class Upload:
    """One large write: where to, on which terms, and what is known of the store.

    Attributes:
        checked: the store is known to compare CRC-64/NVME digests that come with a request.
        patience_s: what a request may take, on top of what its bytes need at the slowest rate.
    """

    bucket: str
    key: str
    call: Call
    terms: Terms | None
    retries: Retries
    shapes: Shapes
    deadline: Deadline
    checked: bool
    patience_s: float

    @property
    def what(self) -> str:
        return self.call.what

    @property
    def _chunks(self) -> Chunks | None:
        return None if self.terms is None else self.terms.chunks

    def put(self, s3: S3Requests, view: memoryview) -> None:
        """Writes the object, in one piece or in parts; it is there whole, or not at all."""
        place: dict[str, Any] = {"Bucket": self.bucket, "Key": self.key}
        size = part_nbytes(view.nbytes, PART_NBYTES, _MAX_NUM_PARTS, self._chunks.chunk_nbytes if self._chunks else 1)
        if view.nbytes < 2 * size and self.terms is None:
            body = bytes(view)  # small: a record or a manifest
            self._try(lambda: s3.ask("put_object", Body=body, **place))
            return
        if view.nbytes < 2 * size:
            self._put_piece(s3, view, (0, view.nbytes), "put_object", {})
        elif view.nbytes > ONE_REQUEST_NBYTES or self._takes_over or self._has_rate:
            self._put_side_by_side(s3, view, self._plan_parts(view.nbytes, size))
        else:
            self._put_as_is_faster(s3, view, self._plan_parts(view.nbytes, size))

    def _put_as_is_faster(self, s3: S3Requests, view: memoryview, parts: list[PartPlan]) -> None:
        """In parts or as one request, as the store takes it faster. One that refuses one request gets parts."""
        started_s, shape = SYSTEM_CLOCK.monotonic(), self.shapes.choose()
        if shape is Shape.ONE:
            try:
                self._put_piece(s3, view, (0, view.nbytes), "put_object", {})
            except BadBytes:
                raise
            except KtrainError as error:
                self.shapes.failed(Shape.ONE)
                if not isinstance(error, UnavailableError) or isinstance(error, BusyError | ForbiddenError):
                    raise
                _LOG.debug("%s: not taken as one request: %s", self.what, error)
                shape = Shape.PARTS
        if shape is Shape.PARTS:
            self._put_side_by_side(s3, view, parts)
        self.shapes.took(shape, view.nbytes, SYSTEM_CLOCK.monotonic() - started_s)

    def _put_side_by_side(self, s3: S3Requests, view: memoryview, parts: list[PartPlan]) -> None:
        place: dict[str, Any] = {"Bucket": self.bucket, "Key": self.key}
        left = self._find_leftovers(s3, parts)
        if left.best is None or not self._goes_on(s3, view, parts, left):
            self._put_anew(s3, view, parts, place)
        for upload_id in left.upload_ids:
            if upload_id != left.best:  # that one is complete, or its writer lives
                _abort(s3, {**place, "UploadId": upload_id})

    def _put_anew(self, s3: S3Requests, view: memoryview, parts: list[PartPlan], place: dict[str, Any]) -> None:
        about: dict[str, Any] = {}
        if self._sends_checksums:
            about = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        begun = self._try(lambda: s3.ask("create_multipart_upload", **place, **about))
        upload = {**place, "UploadId": str(begun["UploadId"])}
        try:
            self._put_parts(s3, view, parts, upload, {})
        except BaseException:
            _abort(s3, upload)
            raise

    def _find_leftovers(self, s3: S3Requests, parts: list[PartPlan]) -> Leftovers:
        if not self._takes_over:
            return Leftovers()

        def ask(method: str, **fields: Any) -> dict[str, Any]:
            answer: dict[str, Any] = self._try(lambda: s3.ask(method, **fields))
            return answer

        try:
            return find_leftovers(ask, self.bucket, self.key, parts)
        except KtrainError as error:  # often a store or a permission without listings; the payload is sent anew
            _LOG.debug("%s: what another one left cannot be told: %s", self.what, error)
            return Leftovers()

    def _goes_on(self, s3: S3Requests, view: memoryview, parts: list[PartPlan], left: Leftovers) -> bool:
        """Ends an upload that another process began; false where it ended or changed meanwhile: its writer lives."""
        upload = {"Bucket": self.bucket, "Key": self.key, "UploadId": left.best}
        try:
            self._put_parts(s3, view, parts, upload, left.tags)
        except (NotFoundError, UnavailableError) as error:
            if isinstance(error, BusyError | ForbiddenError):
                raise
            _LOG.debug("%s: the upload that was taken over is gone: %s", self.what, error)
            return False
        return True

    @property
    def _sends_checksums(self) -> bool:
        return self.checked and self._chunks is not None

    @property
    def _has_rate(self) -> bool:
        """Whether requests wait for their bytes: a rate is kept by small ones."""
        return self.terms is not None and self.terms.pace.bytes_per_s is not None

    @property
    def _takes_over(self) -> bool:
        """Whether what another process left of this object may be proven, so that it need not be sent again."""
        return self._sends_checksums and self.terms is not None and self.terms.is_taken_over

    def _plan_parts(self, nbytes: int, size: int) -> list[PartPlan]:
        bounds = [(begin, min(begin + size, nbytes)) for begin in range(0, nbytes, size)]
        return [PartPlan(k, begin, end, self._checksum(begin, end)) for k, (begin, end) in enumerate(bounds, start=1)]

    def _put_parts(
        self,
        s3: S3Requests,
        view: memoryview,
        parts: list[PartPlan],
        upload: dict[str, Any],
        there: Mapping[int, str],
    ) -> None:
        """Sends all parts but those that are there, given as number -> tag, and makes the object of them."""
        tags = dict(there)
        if there and self.terms is not None:
            self.terms.sent(sum(part.nbytes for part in parts if part.number in there))

        def send(part: PartPlan) -> None:
            fields = {**upload, "PartNumber": part.number}
            tags[part.number] = str(self._put_piece(s3, view, (part.begin, part.end), "upload_part", fields)["ETag"])

        missing = [part for part in parts if part.number not in there]
        side_by_side(send, missing, num_threads=min(_NUM_PARTS_IN_FLIGHT, len(parts)), name=f"ktrain-tier: {self.what}")
        said = [{"PartNumber": part.number, "ETag": tags[part.number], **part.checksum} for part in parts]
        self._complete(s3, view.nbytes, upload, said)

    def _put_piece(
        self, s3: S3Requests, view: memoryview, bounds: tuple[int, int], method: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        """Sends [begin, end), copied and proven piece by piece. A lost reply is sent again: it replaces itself."""
        begin, end = bounds
        fields = {"Bucket": self.bucket, "Key": self.key, **fields, **self._checksum(begin, end)}

        def send() -> dict[str, Any]:
            if self.terms is not None:
                self.terms.pace.take(end - begin, deadline=self.deadline)  # what is sent again counts again
            bound = self.deadline.sooner(self.patience_s + (end - begin) / _SLOWEST_BYTES_PER_S)
            body = self._body(view, bounds, bound)
            try:
                return s3.ask(method, body=body, **fields)
            finally:
                body.close()

        answer: dict[str, Any] = self._try(send)
        if self.terms is not None:
            self.terms.sent(end - begin)
        return answer

    def _body(self, view: memoryview, bounds: tuple[int, int], bound: Deadline) -> ProvenBody:
        def check() -> None:
            self.call.check()
            self.deadline.check(self.what)
            if bound.expired():
                raise BusyError(f"{self.what}: not sent within {bound.total_s:g} s")

        copy = partial(copy_proven, chunks=self._chunks, of=(view.nbytes, self.what))
        unit_nbytes = self._chunks.chunk_nbytes if self._chunks else 1
        return ProvenBody(view, bounds, copy=copy, unit_nbytes=unit_nbytes, check=check)

    def _checksum(self, begin: int, end: int) -> dict[str, str]:
        chunks = self._chunks
        if not self.checked or chunks is None:
            return {}
        return {"ChecksumCRC64NVME": checksum_text(chunks.digest(begin, end))}

    def _complete(self, s3: S3Requests, nbytes: int, upload: dict[str, Any], tags: list[dict[str, Any]]) -> None:
        """Makes the object of its parts. A reply that was lost is settled by asking again and looking."""
        whole: dict[str, Any] = {}
        if self._sends_checksums:
            whole = {"ChecksumType": "FULL_OBJECT", **self._checksum(0, nbytes)}
        num_asked = 0

        def complete() -> None:
            nonlocal num_asked
            num_asked += 1
            try:
                s3.ask("complete_multipart_upload", **upload, MultipartUpload={"Parts": tags}, **whole)
            except NotFoundError as error:
                # No such upload. After a reply that was lost: it is complete, if the object is there and as long.
                if num_asked == 1:
                    raise translate_write(error, self.what) from error
                found = s3.ask("head_object", Bucket=self.bucket, Key=self.key)
                if int(found["ContentLength"]) != nbytes:
                    raise CorruptionError(
                        f"{self.what}: expected {nbytes} bytes after a lost reply, found {found['ContentLength']}"
                    ) from error

        self._try(complete)

    def read_back(self, s3: S3Requests, nbytes: int) -> None:
        """Compares a sample of what the store has now: the first and the last chunk, and some between by chance.

        It finds a store that mixes up, cuts or recodes what it gets, not a single bit (ADR 0013).

        Raises:
            CorruptionError: the store has other bytes than were sent.
        """
        assert self.terms is not None
        terms, size = self.terms, self.terms.chunks.chunk_nbytes

        def check(index: int) -> None:
            begin, end = index * size, min((index + 1) * size, nbytes)
            terms.pace.take(end - begin, deadline=self.deadline)
            place = {"Bucket": self.bucket, "Key": self.key}
            data = self._try(lambda: s3.read(begin, end, **place))
            terms.chunks.check_stored(data, begin, nbytes, self.what)

        chosen = sample_chunks(nbytes, size)
        side_by_side(check, chosen, num_threads=max(1, len(chosen)), name=f"ktrain-tier: read back {self.key}")

    def _try(self, work: Callable[[], Any]) -> Any:
        return self.retries.run(work, deadline=self.deadline)


def _abort(s3: S3Requests, upload: dict[str, Any]) -> None:
    with contextlib.suppress(KtrainError):  # what stays is invisible, and paid for: a lifecycle rule ends it
        s3.ask("abort_multipart_upload", **upload)


def checksum_text(digest: int) -> str:
    """A CRC-64/NVME digest as S3 writes it: base 64 of 8 bytes, highest first."""
    return base64.b64encode(digest.to_bytes(8, "big")).decode("ascii")
