"""botocore's own client for what is large: it sends from and reads into memory of ours, on the thread that asks.

s3fs's client carries a body through an event loop in pieces of 64 KiB: 128 MiB took 105 ms of a processor where this
one took 25; to hash it for the signature took another 75 (2026-11-27, 2 cores). s3fs still says what the options are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ktrain.errors import KtrainError
from ktrain.tier.answers import translate
from ktrain.tier.body import ProvenBody
from ktrain.tier.deadline import Call

_NUM_CONNECTIONS = 64  # kept open: of several payloads, each in parts
_OF_ASYNC_CLIENTS = ("connector_args", "http_session_cls")  # options that botocore's own client does not know
_SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def new_client(filesystem: Any, *, signs_payloads: bool) -> Any:
    """A client with the options of an s3fs filesystem. Safe from any thread.

    Args:
        signs_payloads: the signature covers the body, which is hashed for it (SHA-256) before it is sent; where the
            options say so themselves they decide.
    """
    import botocore
    import botocore.config
    import botocore.session

    config = {name: value for name, value in filesystem.config_kwargs.items() if name not in _OF_ASYNC_CLIENTS}
    config.setdefault("max_pool_connections", _NUM_CONNECTIONS)
    config["s3"] = {"payload_signing_enabled": signs_payloads, **(config.get("s3") or {})}
    about = {
        "aws_access_key_id": filesystem.key,
        "aws_secret_access_key": filesystem.secret,
        "aws_session_token": filesystem.token,
        "endpoint_url": filesystem.endpoint_url,
        "use_ssl": filesystem.use_ssl,
        **filesystem.client_kwargs,
    }
    if filesystem.anon:
        about = {name: value for name, value in about.items() if name not in _SECRETS}
        config["signature_version"] = botocore.UNSIGNED
    session = botocore.session.Session(**filesystem.kwargs)
    client = session.create_client("s3", config=botocore.config.Config(**config), **about)
    client.meta.events.register("before-send.s3", _send_pieces)
    return client


def _send_pieces(request: Any, **_: Any) -> None:
    """Has a body of ours sent in its own pieces, instead of being read as a file in pieces of 16 KiB."""
    if isinstance(request.body, ProvenBody):
        request.body = request.body.pieces()


class S3Requests:
    """Single requests to S3 for one call of a tier. Each is sent once; safe from any thread.

    Args:
        extra: fields for every request that takes them (encryption, who pays).
    """

    def __init__(self, client: Any, extra: Mapping[str, Any], call: Call) -> None:
        self._client = client
        self._extra = extra
        self._call = call

    def ask(self, method: str, *, body: ProvenBody | None = None, **fields: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            BusyError: the store cannot answer now, or the connection broke or stalled.
            KtrainError: what else went wrong, as a tier says it, or why the body ended early.
        """
        self._call.check()
        if body is not None:
            body.rewind()
            fields["Body"] = body
        failure: Exception | None
        try:
            answer: dict[str, Any] = getattr(self._client, method)(**self._fields(method), **fields)
            return answer
        except Exception as error:  # noqa: BLE001 -- whatever a client library raises gets its meaning here
            failure = None if body is None else body.take_failure()
            if failure is None:
                raise translate(error, self._call.what) from error
        try:  # outside of the block above: the client's error knows this one, and must not be its context
            raise translate(failure, self._call.what)
        finally:
            del failure  # it knows this frame

    @contextlib.contextmanager
    def opened(self, begin: int, end: int, **place: Any) -> Iterator[Callable[[memoryview], int]]:
        """The bytes [begin, end) of an object as they arrive: called with memory, it says how many it put there.

        0 says that the object ends. A range that is left before its end costs its connection. Errors as of `ask`.
        """
        body = self.ask("get_object", Range=f"bytes={begin}-{end - 1}", **place)["Body"]

        def read_into(memory: memoryview) -> int:
            try:
                return int(body.readinto(memory))
            except Exception as error:  # noqa: BLE001 -- as in `ask`
                raise translate(error, self._call.what) from error

        try:
            yield read_into
        finally:
            body.close()

    def read(self, begin: int, end: int, **place: Any) -> bytes:
        """The bytes [begin, end) of an object, fewer where it ends before; errors as of `ask`."""
        memory = memoryview(bytearray(end - begin))
        done = 0
        with self.opened(begin, end, **place) as read_into:
            while done < memory.nbytes and (count := read_into(memory[done:])):
                done += count
        return bytes(memory[:done])

    def _fields(self, method: str) -> dict[str, Any]:
        operation = self._client.meta.method_to_api_mapping[method]
        known = self._client.meta.service_model.operation_model(operation).input_shape.members
        return {name: value for name, value in self._extra.items() if name in known and value is not None}


def extra_fields(filesystem: Any) -> dict[str, Any]:
    """What s3fs adds to requests by its options."""
    return {**filesystem.s3_additional_kwargs, **filesystem.req_kw}


def takes_wrong_hash(filesystem: Any, place: Mapping[str, Any]) -> bool:
    """Whether the store surely takes a body other than its signature covers: then to hash bodies proves nothing."""

    def swap(request: Any, **_: Any) -> None:
        request.body = b"other"

    client = new_client(filesystem, signs_payloads=True)
    client.meta.events.register("before-send.s3.PutObject", swap)
    requests = S3Requests(client, {}, Call("probe of the signature"))
    try:
        requests.ask("put_object", **place, Body=b"bytes")
    except KtrainError:
        return False  # refused; or it cannot be told, and then bodies are hashed
    finally:
        with contextlib.suppress(KtrainError):  # a bucket that forbids deletion keeps the probe
            requests.ask("delete_object", **place)
        client.close()
    return True
