"""Names of variables whose values are for few eyes."""

from __future__ import annotations

import re

_SECRET_WORDS = re.compile(  # whole words of a name: TOKENIZERS_PARALLELISM and MAX_TOKENS are no secrets
    r"(^|_)(SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE)_?KEY)(_|$)|(^|_)TOKEN$", re.IGNORECASE
)


def reads_like_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is for few eyes."""
    return _SECRET_WORDS.search(name) is not None
