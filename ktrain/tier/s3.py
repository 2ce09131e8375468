"""Large writes to S3: parts side by side, straight from the caller's memory, each proven on its way.

Requests go to the client that s3fs made, one by one: s3fs's own upload sends parts in rounds that each wait for their
slowest, and tries again below us without a common budget.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec.asyn

from ktrain import native
from ktrain.abc.proven import Chunks, Terms
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError, Retries
from ktrain.errors import (
    ConfigError,
    CorruptionError,
    DeadlineError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.tier.answers import translate, translate_write
from ktrain.tier.deadline import Call
from ktrain.tier.leftovers import Leftovers, PartPlan, find_leftovers
from ktrain.tier.parts import Part, PartBuffers, copy_proven, part_nbytes, sample_chunks, side_by_side

PART_NBYTES = 16 << 20
_LOG = logging.getLogger(__name__)
_NUM_PARTS_IN_FLIGHT = 8  # of one object; several objects share the node's budget
_MAX_NUM_PARTS = 9_000  # S3 takes 10,000
_SLOWEST_BYTES_PER_S = 1e6  # a request that is slower is sent again


class S3Requests:
    """Single requests to S3. Each is sent once; safe from any thread."""

    def __init__(self, filesystem: Any, call: Call, *, patience_s: float, deadline: Deadline) -> None:
        self._filesystem = filesystem
        self._patience_s = patience_s
        self._call = call
        self._deadline = deadline
        self._loop: asyncio.AbstractEventLoop = filesystem.loop

    def connect(self, bucket: str) -> None:
        """Makes the client, where it is not there yet."""
        fsspec.asyn.sync(self._loop, self._filesystem.set_session)
        self._client = fsspec.asyn.sync(self._loop, self._filesystem.get_s3, bucket)

    def ask(self, method: str, *, nbytes: int = 0, **fields: Any) -> dict[str, Any]:
        """The answer to one request with a body of `nbytes`.

        Raises:
            BusyError: none came within the patience that a request of this size gets.
            DeadlineError: none came before the deadline, or nobody waits any more.
            KtrainError: what else went wrong, as a tier says it.
        """
        request = getattr(self._client, method)
        fields = self._filesystem._get_s3_method_kwargs(request, **fields)
        answer: dict[str, Any] = self._wait(method, request(**fields), nbytes)
        return answer

    def read(self, begin: int, end: int, **place: str) -> bytes:
        """The bytes [begin, end) of an object, fewer where it ends before; errors as of `ask`."""

        async def fetch() -> bytes:
            fields = self._filesystem._get_s3_method_kwargs(self._client.get_object, **place)
            answer = await self._client.get_object(**fields, Range=f"bytes={begin}-{end - 1}")
            async with answer["Body"] as body:
                return bytes(await body.read())

        data: bytes = self._wait("get_object", fetch(), end - begin)
        return data

    def _wait(self, method: str, coroutine: Any, nbytes: int) -> Any:
        bound = self._deadline.sooner(self._patience_s + nbytes / _SLOWEST_BYTES_PER_S)
        try:
            self._call.check()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except (RuntimeError, DeadlineError) as error:
            coroutine.close()
            raise translate(error, self._call.what) from error
        try:
            return future.result(bound.remaining_s())
        except TimeoutError as error:
            if future.done():  # the client's own
                raise translate(error, self._call.what) from error
            future.cancel()
            late = f"{self._call.what}: {method}: no answer within {bound.total_s:g} s"
            raise (BusyError(late) if bound is not self._deadline else DeadlineError(late)) from error
        except Exception as error:  # noqa: BLE001 -- whatever a client library raises gets its meaning here
            raise translate(error, self._call.what) from error
        finally:
            del future  # it knows the error, which knows this frame


@dataclass(frozen=True, slots=True)
class Upload:
    """One large write: where to, on which terms, and with whose memory.

    Attributes:
        checked: the store is known to compare CRC-64/NVME digests that come with a request.
    """

    bucket: str
    key: str
    what: str
    terms: Terms | None
    retries: Retries
    buffers: PartBuffers
    deadline: Deadline
    checked: bool

    @property
    def _chunks(self) -> Chunks | None:
        return None if self.terms is None else self.terms.chunks

    def put(self, s3: S3Requests, view: memoryview) -> None:
        """Writes the object, in one piece or in parts; it is there whole, or not at all."""
        place: dict[str, Any] = {"Bucket": self.bucket, "Key": self.key}
        size = part_nbytes(view.nbytes, PART_NBYTES, _MAX_NUM_PARTS, self._chunks.chunk_nbytes if self._chunks else 1)
        if view.nbytes < 2 * size and self.terms is None:
            body = bytes(view)  # small: a record or a manifest, outside of the budget so that it waits for no payload
            self._try(lambda: s3.ask("put_object", nbytes=len(body), Body=body, **place))
            return
        if view.nbytes < 2 * size:
            self._put_piece(s3, view, (0, view.nbytes), "put_object", {})
            return
        parts = self._plan_parts(view.nbytes, size)
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
        if not self._sends_checksums or self.terms is None or not self.terms.is_taken_over:
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
        """Copies [begin, end) once, proves the copy, and sends that. A lost reply is sent again: it replaces itself."""
        begin, end = bounds
        part = self.buffers.take(end - begin, self.what, self.deadline)
        num_sent, answered = 0, False
        fields = {"Bucket": self.bucket, "Key": self.key, **fields, **self._checksum(begin, end)}

        def send() -> dict[str, Any]:
            nonlocal num_sent
            # A request that was given up may still be on its way out: from then on nobody writes to this memory, and
            # the next request has a place of its own in it.
            body = Part(part.getvalue()) if num_sent else part
            num_sent += 1
            if self.terms is not None:
                self.terms.pace.take(end - begin, deadline=self.deadline)  # what is sent again counts again
            return s3.ask(method, nbytes=end - begin, Body=body, **fields)

        try:
            with part.getbuffer() as target:
                copy_proven(target, view[begin:end], self._chunks, (begin, view.nbytes, self.what))
            part.seek(0)
            answer: dict[str, Any] = self._try(send)
            answered = True
        finally:
            self.buffers.give_back(part, unused=answered and num_sent == 1)
        if self.terms is not None:
            self.terms.sent(end - begin)
        return answer

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
            data = self._try(lambda: s3.read(begin, end, Bucket=self.bucket, Key=self.key))
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


def probe_checksums(s3: S3Requests, bucket: str, folder: str) -> bool:
    """Whether the store takes a right CRC-64/NVME digest and refuses a wrong one; many look at neither.

    Raises:
        UnavailableError, DeadlineError: it cannot be told now.
    """
    place: dict[str, Any] = {"Bucket": bucket, "Key": f"{folder}/.ktrain-probe-{ids.random_id()}"}
    body = b"ktrain"
    right = native.crc64(body)
    try:
        s3.ask("put_object", **place, Body=body, ChecksumCRC64NVME=checksum_text(right))
    except (ConfigError, UnavailableError) as error:
        if isinstance(error, BusyError | ForbiddenError):
            raise
        return False  # it does not take the header
    try:
        s3.ask("put_object", **place, Body=body, ChecksumCRC64NVME=checksum_text(right ^ 1))
    except UnavailableError as error:
        if isinstance(error, ForbiddenError) or (isinstance(error, BusyError) and "BadDigest" not in str(error)):
            raise
        return True
    finally:
        with contextlib.suppress(KtrainError):  # a bucket that forbids deletion keeps the probe
            s3.ask("delete_object", **place)
    return False
