"""All ranks' manifests as one text, for the head's word on a restore.

A node needs all of them, for any rank may have what its own want. They say the same names over and over: packed they
have little more than their digests, which nothing makes smaller.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping

from ktrain.errors import CorruptionError

_LEVEL = 1  # the next ones take three times as long for a twentieth less


def pack(texts: Mapping[int, str]) -> str:
    """Manifests by rank, each its own text, packed. A second or two for some hundred megabytes: hold no lock."""
    return base64.b64encode(zlib.compress(json.dumps(texts).encode(), _LEVEL)).decode()


def unpack(packed: str) -> dict[int, str]:
    """The opposite of `pack`.

    Raises:
        CorruptionError: it is torn or changed.
    """
    try:
        found = json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))
        return {int(rank): str(text) for rank, text in found.items()}
    except (ValueError, zlib.error, AttributeError) as error:
        raise CorruptionError(f"manifests of all ranks: expected what `pack` gives, found {error}") from error
