"""URLs and secrets: what may be shown of a URL, and which URLs are refused because they would be shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ktrain.errors import ConfigError

_USERINFO = re.compile(r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):)?//(?P<user>[^/\s'\"]*)@")
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]*")
_CONTAINERS = frozenset({"abfs", "abfss", "adl", "az", "wasb", "wasbs", "oci"})
"""Here `CONTAINER@ACCOUNT` and `BUCKET@NAMESPACE` are where things lie, not who looks."""
_USERS = frozenset({"ftp", "ftps", "hdfs", "sftp", "smb", "ssh", "webhdfs"})
"""Here what stands before the `@` is the name of an account, since the protocol has a password or a key besides."""
_NAME = re.compile(r"[A-Za-z0-9._$;-]+")  # `;` of smb://DOMAIN;USER@HOST; no ":", written out or as %3A


def public_url(url: str) -> str:
    """The URL, or a text with URLs in it, without user, password and query: fit for messages and events."""
    return _QUERY.sub("", _USERINFO.sub(_shown, url))


_ANY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def masked(data: bytes, secrets: Iterable[bytes] = ()) -> bytes:
    """Text with as many stars in place of secrets: those given, and user, password and query of URLs. Same length."""
    for secret in secrets:
        if secret:
            data = data.replace(secret, b"*" * len(secret))
    if b"://" not in data:
        return data
    return _ANY_URL.sub(_stars, data.decode("latin-1")).encode("latin-1")  # a character for each byte


def _stars(url: re.Match[str]) -> str:
    text = _USERINFO.sub(_without_user, url[0])
    return _QUERY.sub(lambda query: "?" + "*" * (len(query[0]) - 1), text)


def _without_user(match: re.Match[str]) -> str:
    if _is_name(match, _CONTAINERS):
        return match[0]
    begin = "//" if match["scheme"] is None else f"{match['scheme']}://"
    return f"{begin}{'*' * len(match['user'])}@"


def _shown(match: re.Match[str]) -> str:
    if _is_name(match, _CONTAINERS):
        return match[0]
    return "//" if match["scheme"] is None else f"{match['scheme']}://"


def _is_name(match: re.Match[str], schemes: frozenset[str]) -> bool:
    return (match["scheme"] or "").lower() in schemes and _NAME.fullmatch(match["user"]) is not None


def local_path(url: str) -> Path | None:
    """The absolute path that a run URL names on this machine, or None for any other store."""
    if url.startswith("file://"):
        return Path(os.path.abspath(url.removeprefix("file://")))
    if "://" in url or "::" in url:
        return None
    return Path(os.path.abspath(os.path.expanduser(url)))


def without_slash(url: str) -> str:
    """The URL of a run without slashes at its end: with them it is the same run. A root stays what it is."""
    found = url.rstrip("/")
    return url if found == "" or found.endswith(":") else found


def require_public(url: str) -> str:
    """The URL of a run, when nothing in it can be secret.

    A run's URL stands in process lists, in the environment of workers and in the records of nodes' volumes.

    Raises:
        ConfigError: it has a query (a signature, a token), or something before an `@` that is not known to be a name (a
            password, a token); the message shows neither.
    """
    user = _USERINFO.match(url)
    if "://" in url and ("?" in url or (user is not None and not _is_name(user, _CONTAINERS | _USERS))):
        raise ConfigError(
            f"run {public_url(url)}: expected a URL without password, token and query, found one that may have them; "
            "process lists and files would show it; put credentials where the store's own tools look: its environment "
            "variables or configuration"
        )
    return url
