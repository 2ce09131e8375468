"""How far this machine's clock is from a server's: the header Date of an answer, between its request and its reply."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from ktrain.base import settings
from ktrain.base.clock import Clock
from ktrain.launcher.backends.kubernetes.connect import Door
from ktrain.launcher.doctor.finding import Finding, Outcome

_GRAIN_S = 1.0  # a Date has whole seconds
_WARN_S = 5.0
_TIMEOUT_S = 15.0
_SERVICES = {
    "s3": "https://s3.amazonaws.com",
    "gs": "https://storage.googleapis.com",
    "gcs": "https://storage.googleapis.com",
}


def look_at_clock(who: str, ask: Callable[[], str | None], clock: Clock) -> Iterator[Finding]:
    """How far the clocks are apart, given a way to get a Date; what the request took is no skew."""
    before = clock.wall()
    date = ask()
    after = clock.wall()
    check = f"clock of {who}"
    if date is None:
        yield Finding(check, Outcome.UNKNOWN, "no answer with a Date")
        return
    theirs = parsedate_to_datetime(date).timestamp()
    ahead = theirs - after if theirs > after else min(0.0, theirs + _GRAIN_S - before)
    if abs(ahead) < _WARN_S:
        yield Finding(check, Outcome.OK, f"within {max(1.0, abs(ahead) + after - before):.0f} s of this machine's")
        return
    evidence = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    remedy = "set both by NTP; `timedatectl` shows whether this machine's is"
    cost = "times of logs and events do not line up; 15 minutes and more, and object stores refuse signed requests"
    yield Finding(check, Outcome.WARNING, evidence, cost, remedy)


def date_of_server(door: Door) -> str | None:
    """The Date of the API server."""
    with contextlib.closing(door.send("GET", "/version", {}, None, _TIMEOUT_S)) as reply:
        reply.read()
        return {key.lower(): value for key, value in reply.headers.items()}.get("date")


def date_of_store(scheme: str) -> str | None:
    """The Date of the service behind a scheme, asked without credentials; None where none is known or none answers.

    Any answer will do, a refusal as well: it bears the service's time.
    """
    own = settings.env("AWS_ENDPOINT_URL_S3") or settings.env("AWS_ENDPOINT_URL")
    url = own if own is not None and scheme == "s3" else _SERVICES.get(scheme)
    if url is None:
        return None
    found = urlsplit(url)
    kind = http.client.HTTPSConnection if found.scheme == "https" else http.client.HTTPConnection
    try:
        with contextlib.closing(kind(found.netloc, timeout=_TIMEOUT_S)) as connection:
            connection.request("HEAD", "/")
            return connection.getresponse().headers.get("Date")
    except (OSError, http.client.HTTPException):
        return None
