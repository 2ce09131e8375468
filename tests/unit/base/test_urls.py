"""URLs of fsspec's file systems: which may be a run's, and what is shown of them."""

from __future__ import annotations

import pytest

from ktrain.base.urls import masked, public_url, require_public
from ktrain.errors import ConfigError

PUBLIC = [
    "runs/net-a",
    "/data/user@host/net-a",
    "file:///data/net-a",
    "memory://net-a",
    "s3://bucket/net-a",
    "s3://bucket/who@where/net-a",
    "gs://bucket/net-a",
    "abfs://container@account.dfs.core.windows.net/net-a",
    "abfss://container@account.dfs.core.windows.net/net-a",
    "ABFS://container@account.dfs.core.windows.net/net-a",
    "az://container@account.blob.core.windows.net/net-a",
    "wasbs://$root@account.blob.core.windows.net/net-a",
    "oci://bucket@namespace/net-a",
    "hf://datasets/user/repo@revision/net-a",
    "webhdfs://host:9870/net-a",
    "https://host/net-a",
]
NAMED = {
    "sftp://user@host:22/net-a": "sftp://host:22/net-a",
    "ssh://user@host/net-a": "ssh://host/net-a",
    "ftp://user@host/net-a": "ftp://host/net-a",
    "smb://domain;user@host/share/net-a": "smb://host/share/net-a",
    "hdfs://user@namenode:8020/net-a": "hdfs://namenode:8020/net-a",
}
SECRET = {
    "https://TOKEN@host/net-a": "https://host/net-a",
    "HTTPS://TOKEN@host/net-a": "HTTPS://host/net-a",
    "http://user:SECRET@host/net-a": "http://host/net-a",
    "webdavs://TOKEN@host/net-a": "webdavs://host/net-a",
    "s3://TOKEN@bucket/net-a": "s3://bucket/net-a",
    "s3://KEY:SECRET@bucket/net-a": "s3://bucket/net-a",
    "gs://TOKEN@bucket/net-a": "gs://bucket/net-a",
    "other+store://TOKEN@host/net-a": "other+store://host/net-a",
    "sftp://user:SECRET@host/net-a": "sftp://host/net-a",
    "sftp://user%3ASECRET@host/net-a": "sftp://host/net-a",
    "ftp://user:SEC@RET@host/net-a": "ftp://host/net-a",
    "ftp://:SECRET@host/net-a": "ftp://host/net-a",
    "smb://domain;user:SECRET@host/share": "smb://host/share",
    "abfs://container:SECRET@account.dfs.core.windows.net/net-a": "abfs://account.dfs.core.windows.net/net-a",
    "abfs://container@account.dfs.core.windows.net/net-a?sig=SECRET": (
        "abfs://container@account.dfs.core.windows.net/net-a"
    ),
    "https://host/net-a?token=SECRET": "https://host/net-a",
    "pelican://host/net-a?authz=SECRET": "pelican://host/net-a",
    "https://user:what?SECRET@host/net-a": "https://host/net-a",
}


@pytest.mark.parametrize("url", PUBLIC)
def test_url_without_a_secret_is_taken_and_shown_whole(url: str) -> None:
    assert require_public(url) == url == public_url(url)


@pytest.mark.parametrize("url", NAMED)
def test_url_with_the_name_of_an_account_is_taken_and_shown_without(url: str) -> None:
    assert require_public(url) == url
    assert public_url(url) == NAMED[url]


@pytest.mark.parametrize("url", SECRET)
def test_url_with_what_may_be_a_secret_is_refused_and_never_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a URL without password, token and query") as caught:
        require_public(url)
    assert f"run {SECRET[url]}:" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("TOKEN", "SECRET", "SEC@RET"))
    assert public_url(f"cannot open {url!r}, {url} is away") == f"cannot open {SECRET[url]!r}, {SECRET[url]} is away"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"to s3://jo:word@host/a?sig=1 \xff", b"to s3://*******@host/a?***** \xff"),
        (b"see https://host/a and what? is x@y", b"see https://host/a and what? is x@y"),
        (b"abfs://box@account.dfs/a", b"abfs://box@account.dfs/a"),
        (b"the token is hush-hush!", b"the token is *********!"),
    ],
)
def test_masked_text_has_stars_in_place_of_secrets_and_its_length(text: bytes, shown: bytes) -> None:
    assert masked(text, [b"hush-hush", b""]) == shown
