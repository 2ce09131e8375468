"""URLs and secrets: what may be shown of a URL, and which URLs are refused because they would be shown."""

from __future__ import annotations

import re

from ktrain.errors import ConfigError

_USERINFO = re.compile(r"(?<=//)[^/\s'\"]*@")
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]*")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s]*:[^/\s]*@")


def public_url(url: str) -> str:
    """The URL, or a text with URLs in it, without user, password and query: fit for messages and events."""
    return _QUERY.sub("", _USERINFO.sub("", url))


def require_public(url: str) -> str:
    """The URL of a run, when nothing in it is secret.

    A run's URL stands in process lists, in the environment of workers and in the records of nodes' volumes.

    Raises:
        ConfigError: it has a password or a query (a signature, a token); the message shows neither.
    """
    if "://" in url and (_PASSWORD.match(url) or "?" in url):
        raise ConfigError(
            f"run {public_url(url)}: expected a URL without password and query, found one with; process lists and "
            "files would show it; put credentials where the store's own tools look: its environment variables or "
            "configuration"
        )
    return url
