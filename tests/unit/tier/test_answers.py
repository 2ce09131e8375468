"""What exceptions of stores' clients mean."""

from __future__ import annotations

import errno

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from ktrain.base.retry import BusyError
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
from ktrain.tier.answers import public_url, translate


def _said(code: str, status: int) -> ClientError:
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "GetObject")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_said("NoSuchKey", 404), NotFoundError),
        (_said("404", 404), NotFoundError),
        (_said("NoSuchBucket", 404), UnavailableError),
        (_said("AccessDenied", 403), ForbiddenError),
        (_said("SignatureDoesNotMatch", 403), ForbiddenError),
        (_said("ExpiredToken", 400), ForbiddenError),
        (_said("SlowDown", 503), BusyError),
        (_said("TooManyRequests", 429), BusyError),
        (_said("InternalError", 500), BusyError),
        (_said("RequestTimeout", 400), BusyError),
        (_said("PreconditionFailed", 412), ConflictError),
        (_said("ConditionalRequestConflict", 409), ConflictError),
        (_said("BadDigest", 400), BusyError),
        (_said("InvalidRequest", 400), UnavailableError),
        (ConnectionResetError(errno.ECONNRESET, "k"), BusyError),
        (_said("InvalidRange", 416), CorruptionError),
        (_said("InsufficientStorage", 507), CapacityError),
        (_said("XMinioStorageFull", 507), CapacityError),
        (_said("NotImplemented", 501), ConfigError),
        (FileNotFoundError("k"), NotFoundError),
        (FileNotFoundError(errno.ENOENT, "k"), NotFoundError),
        (IsADirectoryError(errno.EISDIR, "k"), NotFoundError),
        (PermissionError("k"), ForbiddenError),
        (OSError(errno.EROFS, "k"), ForbiddenError),
        (OSError(errno.ENOSPC, "k"), CapacityError),
        (OSError(errno.EDQUOT, "k"), CapacityError),
        (OSError(errno.EIO, "k"), UnavailableError),
        (OSError(errno.ESTALE, "k"), UnavailableError),
        (ConnectionRefusedError(errno.ECONNREFUSED, "k"), BusyError),
        (TimeoutError(), BusyError),
        (EndpointConnectionError(endpoint_url="http://x"), BusyError),
        (ReadTimeoutError(endpoint_url="http://x"), BusyError),
        (NoCredentialsError(), ForbiddenError),
        (ModuleNotFoundError("No module named 's3fs'"), ConfigError),
        (RuntimeError("nobody knows"), UnavailableError),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else value.__name__,
)
def test_translate_answer_of_a_store_means(error: Exception, expected: type[KtrainError]) -> None:
    meant = translate(error, "bucket tier s3://b: read x")
    assert type(meant) is expected
    assert str(meant).startswith("bucket tier s3://b: read x: ")


def test_translate_file_not_found_caused_by_a_lost_bucket_is_not_not_found() -> None:
    error = FileNotFoundError("The specified bucket does not exist")
    error.__cause__ = _said("NoSuchBucket", 404)
    meant = translate(error, "read x")
    assert type(meant) is UnavailableError
    assert "create it or correct the URL" in str(meant)


def test_translate_error_of_ours_stays_itself() -> None:
    error = CorruptionError("x")
    assert translate(error, "read x") is error


def test_translate_message_with_credentials_hides_them() -> None:
    error = RuntimeError("GET https://me:geheim@store/key?X-Amz-Signature=abc failed")
    message = str(translate(error, "read x"))
    assert "https://store/key failed" in message
    assert "geheim" not in message
    assert "abc" not in message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("https://host/run?token=abc&x=1", "https://host/run"),
        ("sftp://user@host:22/a@b", "sftp://host:22/a@b"),
        ("ftp://me:pa@ss@host/run", "ftp://host/run"),
        ("/home/me/runs/a", "/home/me/runs/a"),
    ],
)
def test_public_url_keeps_the_place_alone(url: str, expected: str) -> None:
    assert public_url(url) == expected


@pytest.mark.parametrize(("header", "expected"), [("7", 7.0), ("Wed, 25 Nov 2026 12:00:00 GMT", 0.0), ("-1", 0.0)])
def test_translate_busy_answer_keeps_the_seconds_that_it_asks_for(header: str, expected: float) -> None:
    error = _said("SlowDown", 503)
    error.response["ResponseMetadata"]["HTTPHeaders"] = {"retry-after": header}
    meant = translate(error, "write x")
    assert isinstance(meant, BusyError) and meant.answered
    assert meant.retry_after_s == expected
