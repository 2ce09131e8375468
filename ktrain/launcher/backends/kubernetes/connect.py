"""The way to a cluster's API server: the only module that knows the package `kubernetes`, and not its models.

That package reads kubeconfig files, runs credential plugins and sets up TLS; requests are sent through its pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError
from ktrain.launcher.backends.kubernetes.refusals import refusal

_T = TypeVar("_T")
Words = Sequence[tuple[str, str]]  # of a query; a name may come twice

STDIN, STDOUT, STDERR, ERROR = 0, 1, 2, 3  # channels of a command that runs in a container
_FRAME_S = 60.0  # for the rest of a frame that has begun, and for one of ours to be taken
DATA, PROBLEM = 0, 1  # channels of a port; each begins with the port's number, two bytes


class Reply(Protocol):
    """An answer of which only the head has been read. The caller closes it."""

    status: int
    headers: Mapping[str, str]

    def read(self) -> bytes:
        """The body. Raises BusyError where the connection breaks."""

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises BusyError where the connection breaks or is silent for too long."""

    def close(self) -> None:
        """Gives the connection up."""


class Channels(Protocol):
    """Numbered channels to a command in a container or to a port of a pod. One thread uses and closes them."""

    def fileno(self) -> int:
        """For `select`: readable where `read` has something."""

    @property
    def is_open(self) -> bool:
        """False once the other end has closed; what came before can still be read."""

    def read(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """What came within the time, by channel. Raises BusyError where the connection breaks."""

    def write(self, channel: int, data: bytes) -> None:
        """Sends bytes. Raises BusyError where the connection breaks."""

    def finish(self, channel: int) -> None:
        """Says that no more bytes come, where the server knows how to hear that (v5.channel.k8s.io)."""

    def close(self) -> None:
        """Gives the connection up."""


class Door(Protocol):
    """One user's way into one cluster."""

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        """Sends a request. Raises BusyError where no answer came: whether it took effect is then unknown."""

    def attach(self, path: str, query: Words, timeout_s: float) -> Channels:
        """Opens channels. Raises as `send`, and what a refusal means."""


def connect(kubeconfig: Path | None = None, context: str | None = None) -> Door:
    """The way that a kubeconfig names; without one, the user's own, or that of the pod that this runs in.

    Raises:
        ConfigError: the package is not there, or the kubeconfig cannot be used.
    """
    try:
        from kubernetes import client as api
        from kubernetes import config
        from kubernetes.config.config_exception import ConfigException
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--backend kubernetes: the package {error.name} is not there; pip install 'ktrain[kubernetes]'"
        ) from error
    settings = api.Configuration()
    settings.retries = False  # nothing below `Client` may ask again by itself (ADR 0013)
    try:
        if kubeconfig is None and context is None:
            config.load_config(client_configuration=settings)
        else:
            name = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(name, context, client_configuration=settings, persist_config=False)
    except (ConfigException, OSError, ValueError, TypeError, KeyError) as error:
        where = "the kubeconfig" if kubeconfig is None else f"kubeconfig {kubeconfig}"
        raise ConfigError(f"{where}: it cannot be used: {error}; name one with --kubeconfig and --context") from error
    return _Pool(settings, api.ApiClient(settings).rest_client.pool_manager)


class _Pool:
    """A door through the connections of urllib3."""

    def __init__(self, settings: Any, pool: Any) -> None:
        self._settings = settings
        self._pool = pool

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        import urllib3

        try:
            answer = self._pool.request(
                method,
                self._settings.host + path,
                headers={**headers, **self._credentials()},
                body=body,
                timeout=urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s),
                preload_content=False,
                redirect=False,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise BusyError(f"{method} {path.partition('?')[0]}: no answer: {error}") from error
        return _Reply(answer)

    def attach(self, path: str, query: Words, timeout_s: float) -> Channels:
        from kubernetes.stream.ws_client import WSClient, get_websocket_url

        url = get_websocket_url(self._settings.host + path, list(query))
        headers = self._credentials()
        made = _shake_hands(lambda: WSClient(self._settings, url, headers, False, binary=True), path, timeout_s)
        return _Channels(made)

    def _credentials(self) -> dict[str, str]:
        return {
            item["key"]: item["value"] for item in self._settings.auth_settings().values() if item["in"] == "header"
        }


def _shake_hands(open_socket: Callable[[], _T], path: str, timeout_s: float) -> _T:
    """A connection that is upgraded. The package knows no timeout here, so that a thread waits in our place."""
    import websocket

    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(open_socket())
        except Exception as error:  # noqa: BLE001 -- handed to whoever waits
            failed.append(error)

    thread = threading.Thread(target=run, name="ktrain-handshake", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if found:
        return found[0]
    if not failed:
        raise BusyError(f"GET {path}: no answer within {timeout_s:g} s")
    error = failed[0]
    if isinstance(error, websocket.WebSocketBadStatusException):
        raise refusal(
            int(error.status_code), error.resp_headers or {}, error.resp_body or b"", what=f"GET {path}"
        ) from None
    if isinstance(error, websocket.WebSocketException | OSError):
        raise BusyError(f"GET {path}: no answer: {error}") from error
    raise error


class _Channels:
    """Channels of the package's own client."""

    def __init__(self, client: Any) -> None:
        client.sock.settimeout(_FRAME_S)
        self._client = client
        self._is_broken = False

    def fileno(self) -> int:
        return int(self._client.sock.sock.fileno())

    @property
    def is_open(self) -> bool:
        return not self._is_broken and bool(self._client.is_open())

    def read(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """What came whole before the connection broke is not lost: who says a last word may close at once."""
        broke: BusyError | None = None
        try:
            if not self._is_broken:
                self._try(lambda: self._client.update(timeout=timeout_s))
        except BusyError as error:
            broke, self._is_broken = error, True
        pieces = [(channel, self._buffered(channel)) for channel in range(ERROR + 1)]
        found = [(channel, data) for channel, data in pieces if data]
        if broke is not None and not found:
            raise broke
        return found

    def _buffered(self, channel: int) -> bytes:
        try:
            return bytes(self._try(lambda: self._client.read_channel(channel)))
        except BusyError:  # it looks at the connection again where it has nothing
            self._is_broken = True
            return b""

    def write(self, channel: int, data: bytes) -> None:
        self._try(lambda: self._client.write_channel(channel, data))

    def finish(self, channel: int) -> None:
        self._try(lambda: self._client.close_channel(channel))

    def close(self) -> None:
        self._client.sock.shutdown()  # at once: `close` waits seconds for the other end

    def _try(self, call: Callable[[], _T]) -> _T:
        import websocket

        try:
            return call()
        except (websocket.WebSocketException, OSError) as error:
            raise BusyError(f"the connection to the container broke: {error}") from error


class _Reply:
    """An answer of urllib3."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.status: int = answer.status
        self.headers: Mapping[str, str] = answer.headers

    def read(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        import urllib3

        try:
            yield from self._answer.stream(1 << 16)
        except urllib3.exceptions.HTTPError as error:
            raise BusyError(f"the answer broke off: {error}") from error

    def close(self) -> None:
        self._answer.close()
