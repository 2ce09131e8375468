"""What a store meant: its clients' exceptions as not found, forbidden, unavailable, no space.

Clients blur these (s3fs says "file not found" for a missing bucket, and an input/output error for a throttled
one), so the status that the store sent is looked for first, then the operating system's number. What nobody
understands is "could not tell", never "no".
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from ktrain.base.retry import BusyError
from ktrain.base.urls import public_url
from ktrain.errors import (
    CapacityError,
    ConfigError,
    ConflictError,
    CorruptionError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)

_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
}
_CODES: dict[str, type[KtrainError]] = {  # S3 codes that say more than their status
    "NoSuchBucket": UnavailableError,  # the store is missing, which says nothing about its objects
    "ExpiredToken": ForbiddenError,
    "InvalidToken": ForbiddenError,
    "TokenRefreshRequired": ForbiddenError,
    "AuthorizationHeaderMalformed": ForbiddenError,
    "RequestTimeout": BusyError,
    "IncompleteBody": BusyError,  # the connection broke in mid body
    "BadDigest": BusyError,  # the body was damaged on its way
    "XAmzContentSHA256Mismatch": BusyError,
    "SlowDown": BusyError,
    "XMinioStorageFull": CapacityError,
    "QuotaExceeded": CapacityError,
}
_STATUS: dict[int, type[KtrainError]] = {
    401: ForbiddenError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    412: ConflictError,
    416: CorruptionError,
    429: BusyError,
    500: BusyError,
    501: ConfigError,  # the store does not know this kind of request
    502: BusyError,
    503: BusyError,
    504: BusyError,
    507: CapacityError,
}
_ERRNO: dict[int, type[KtrainError]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.EISDIR: NotFoundError,  # a folder is no object
    errno.EEXIST: ConflictError,
    errno.EACCES: ForbiddenError,
    errno.EPERM: ForbiddenError,
    errno.EROFS: ForbiddenError,
    errno.ENOSPC: CapacityError,
    errno.EDQUOT: CapacityError,
    errno.EFBIG: CapacityError,
    errno.ECONNREFUSED: BusyError,
    errno.ECONNRESET: BusyError,
    errno.ECONNABORTED: BusyError,
    errno.EPIPE: BusyError,
    errno.ETIMEDOUT: BusyError,
    errno.EHOSTUNREACH: BusyError,
    errno.ENETUNREACH: BusyError,
}
_BROKEN = {  # names of what clients raise when a connection cannot be made, breaks or stalls
    "ConnectionError",
    "TimeoutError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "IncompleteRead",
    "IncompleteReadError",
    "FSTimeoutError",
}


@dataclass(frozen=True, slots=True)
class _Said:
    """What the store itself answered."""

    code: str
    status: int
    retry_after_s: float = 0.0


def showable(error: BaseException) -> BaseException | None:
    """The error as the cause of ours; None where its words hold what must not be shown: tracebacks print causes."""
    seen: BaseException | None = error
    for _ in range(8):  # chains are short; a cycle must not hold us
        if seen is None:
            return error
        if public_url(str(seen)) != str(seen):
            return None
        seen = seen.__cause__ or seen.__context__
    return None


def translate(error: Exception, what: str) -> KtrainError:
    """The error of ours that says what `error` means for the caller; raise it from `error`."""
    if isinstance(error, KtrainError):
        return error
    if isinstance(error, ImportError):
        return ConfigError(f"{what}: {error}; install the package for this kind of URL (s3: pip install 's3fs')")
    said = _said(error)
    text = public_url(f"{type(error).__name__}: {error}")
    if said is not None:
        text = f"{text} [{said.code or 'status'} {said.status}]"
    cls = _class_of(error, said)
    message = f"{what}: {_WORDS.get(cls, 'failed')} ({text}){_advice(said)}"
    if cls is BusyError:
        return BusyError(message, said.retry_after_s if said is not None else 0.0, answered=said is not None)
    return cls(message)


def translate_write(error: Exception, what: str) -> KtrainError:
    """Like `translate`, for calls that put an object there: nothing is "not found" by these, they just
    failed.
    """
    meant = translate(error, what)
    return UnavailableError(f"{what}: failed ({public_url(str(error))})") if isinstance(meant, NotFoundError) else meant


_WORDS: dict[type[KtrainError], str] = {
    NotFoundError: "there is no such object",
    ForbiddenError: "the store refused",
    UnavailableError: "the store could not be asked",
    BusyError: "the store could not answer now",
    ConflictError: "the object is there already",
    CorruptionError: "the object is shorter than the range asked for",
    CapacityError: "no space is left",
    ConfigError: "the store does not know this request",
}


def _class_of(error: Exception, said: _Said | None) -> type[KtrainError]:
    if said is not None:
        if said.code in _CODES:
            return _CODES[said.code]
        if said.status in _STATUS:
            return _STATUS[said.status]
        return UnavailableError
    if type(error).__name__ in _NO_CREDENTIALS:
        return ForbiddenError
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):  # clients leave the errno out
        return NotFoundError
    if isinstance(error, PermissionError):
        return ForbiddenError
    if isinstance(error, FileExistsError):
        return ConflictError
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO.get(error.errno, UnavailableError)
    if any(cls.__name__ in _BROKEN for cls in type(error).__mro__):
        return BusyError
    return UnavailableError


def _said(error: BaseException) -> _Said | None:
    """The store's own answer, from the error or from what caused it; None where no store answered."""
    seen: BaseException | None = error
    for _ in range(8):  # chains are short; a cycle must not hold us
        if seen is None:
            return None
        response = getattr(seen, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            about = response.get("ResponseMetadata", {})
            status, wait = about.get("HTTPStatusCode"), _seconds(about.get("HTTPHeaders", {}).get("retry-after"))
            return _Said(code, status if isinstance(status, int) else int(code) if code.isdigit() else 0, wait)
        for attribute in ("status", "code"):  # aiohttp; gcsfs
            status = getattr(seen, attribute, None)
            if isinstance(status, int) and 400 <= status < 600:
                return _Said("", status)
        seen = seen.__cause__
    return None


def _seconds(text: object) -> float:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3); a date counts as none: clocks of hosts are not compared."""
    return float(text) if isinstance(text, str) and text.isascii() and text.isdecimal() else 0.0


def _advice(said: _Said | None) -> str:
    if said is not None and said.code == "NoSuchBucket":
        return "; the bucket does not exist: create it or correct the URL"
    return ""
