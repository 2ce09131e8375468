"""From a URL to the tier there. A local path needs no fsspec, so that a checkpoint can be read without it."""

from __future__ import annotations

import re
from pathlib import Path

from ktrain.abc.tier import Tier
from ktrain.base.settings import Timeouts
from ktrain.base.urls import public_url, require_public
from ktrain.errors import ConfigError
from ktrain.tier.files import FileTier

_LOCAL = re.compile(r"(?:file|local):(?://)?")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")


def open_tier(url: str, *, kind: str = "bucket", timeouts: Timeouts | None = None) -> Tier:
    """The tier at a path or at any URL that fsspec knows; asks the store nothing yet.

    Endpoint, keys and region come from where the store's own tools look (`AWS_*`, `~/.aws`, fsspec's
    configuration).

    Raises:
        ConfigError: no such kind of URL, the package for it is not installed, or the URL holds a secret.
    """
    require_public(url)
    if "::" in url:
        raise ConfigError(f"{public_url(url)}: expected one store, found a chain of them ('::'); name the store alone")
    protocol = _PROTOCOL.match(url)
    if protocol is None or _LOCAL.match(url):
        return FileTier(Path(_LOCAL.sub("", url, count=1)).expanduser().absolute(), kind=kind)
    try:
        from ktrain.tier.bucket import open_bucket
    except ImportError as error:
        raise ConfigError(f"{public_url(url)}: {error}; install fsspec, or name a local path") from error
    return open_bucket(url, protocol[0], kind=kind, timeouts=timeouts or Timeouts())
