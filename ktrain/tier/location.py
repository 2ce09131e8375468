"""From a URL to the tier there. A local path needs no fsspec, so that a checkpoint can be read without it.

A scheme that another package has registered (entry point group `ktrain.tiers`) is opened by that package, ADR 0014.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from ktrain.abc.tier import Tier
from ktrain.base.settings import Timeouts
from ktrain.base.urls import public_url, require_public
from ktrain.errors import ConfigError, KtrainError
from ktrain.tier.files import FileTier

ENTRY_POINTS = "ktrain.tiers"  # name: the URL's scheme; value: `(url, *, kind, timeouts) -> Tier`

_LOCAL = re.compile(r"(?:file|local):(?://)?")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")


def open_tier(url: str, *, kind: str = "bucket", timeouts: Timeouts | None = None) -> Tier:
    """The tier at a path or at any URL that an installed package or fsspec knows; asks the store nothing yet.

    Endpoint, keys and region come from where the store's own tools look (`AWS_*`, `~/.aws`, fsspec's
    configuration).

    Raises:
        ConfigError: no such kind of URL, the package for it is not installed or does not work, or the URL holds a
            secret.
    """
    require_public(url)
    if "::" in url:
        raise ConfigError(f"{public_url(url)}: expected one store, found a chain of them ('::'); name the store alone")
    protocol = _PROTOCOL.match(url)
    if protocol is None or _LOCAL.match(url):
        return FileTier(Path(_LOCAL.sub("", url, count=1)).expanduser().absolute(), kind=kind)
    foreign = _registered(url, protocol[0])
    if foreign is not None:
        return _open_foreign(foreign, url, kind, timeouts or Timeouts())
    try:
        from ktrain.tier.bucket import open_bucket
    except ImportError as error:
        raise ConfigError(f"{public_url(url)}: {error}; install fsspec, or name a local path") from error
    return open_bucket(url, protocol[0], kind=kind, timeouts=timeouts or Timeouts())


def _registered(url: str, scheme: str) -> importlib.metadata.EntryPoint | None:
    """What another package registered for a scheme; None where there is no such.

    Raises:
        ConfigError: two packages registered it.
    """
    found = [point for point in importlib.metadata.entry_points(group=ENTRY_POINTS) if point.name == scheme.lower()]
    if len({point.value for point in found}) > 1:
        owners = sorted(_owner(point) for point in found)
        raise ConfigError(
            f"{public_url(url)}: expected one package for {scheme}://, found {owners}; uninstall all but one"
        )
    return found[0] if found else None


def _open_foreign(point: importlib.metadata.EntryPoint, url: str, kind: str, timeouts: Timeouts) -> Tier:
    try:
        tier: Any = point.load()(url, kind=kind, timeouts=timeouts)
    except KtrainError:
        raise
    except Exception as error:  # noqa: BLE001 -- code of another package; whatever it raises, the tier is not to be had
        raise ConfigError(
            f"{public_url(url)}: {_owner(point)} failed to open it ({type(error).__name__}: {public_url(str(error))}); "
            "correct the URL or that package"
        ) from error
    lacking = [name for name in _MEMBERS if not hasattr(tier, name)]
    if lacking:
        raise ConfigError(f"{public_url(url)}: what {_owner(point)} opened is no tier: it lacks {', '.join(lacking)}")
    made: Tier = tier
    return made


_MEMBERS = ("kind", "url", "supports_create", "write", "create", "read", "read_range", "list", "delete", "close")


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
