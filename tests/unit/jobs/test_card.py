"""A status as text and as a card: what is known is there, what others wrote is text, and nothing else is in it."""

from __future__ import annotations

import html.parser
import math

from ktrain.base.events import Event
from ktrain.jobs.card import card, curve
from ktrain.jobs.look import Node, State
from ktrain.jobs.picture import Picture
from ktrain.jobs.screen import CardScreen, TextScreen
from ktrain.jobs.status import JobStatus

HOSTILE = '<img src=x onerror="alert(1)">&amp;</td>\x1b[31m'


class Parsed(html.parser.HTMLParser):
    """Tags that are closed in their order, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def status(**changes: object) -> JobStatus:
    known: dict[str, object] = {
        "name": "net", "run": "s3://bucket/net", "where": "on Kubernetes, namespace ml", "state": State.RECOVERING,
        "reasons": ("quota: 8 of 16 GPUs are free",), "attempt": 2, "step": 12, "losses": ((11, 1.5), (12, 1.25)),
        "restored": ("peer", 10), "committed": {"bucket": 5, "memory": 10}, "num_failures": 1,
        "last_failure": "node-lost of node-1: gone", "nodes": (Node("net-worker-0-0", "m1", "running, ready"),),
    }  # fmt: skip
    return JobStatus(**{**known, **changes})  # type: ignore[arg-type]


def test_status_says_in_text_what_is_known() -> None:
    assert str(status()).splitlines() == [
        "net",
        "  state           recovering",
        "  run             s3://bucket/net (on Kubernetes, namespace ml)",
        "  waits for       quota: 8 of 16 GPUs are free",
        "  step            12, loss 1.2500 (attempt 2)",
        "  resumed         from step 10, out of tier peer",
        "  saved           memory 10, bucket 5",
        "  failures        1, the last: node-lost of node-1: gone",
        "  net-worker-0-0  running, ready on m1",
    ]


def test_card_has_the_rows_and_a_curve_without_script_or_style_sheet() -> None:
    found = Parsed(card(status(state=State.DONE, exit_code=0)))

    (_, state), *others = status(state=State.DONE, exit_code=0).rows()
    assert found.text.startswith(f"net {state}") and state == "done (exit code 0)"
    assert found.text.endswith("".join(what + value for what, value in others))
    assert set(found.tags) == {"div", "strong", "span", "svg", "polyline", "table", "tr", "th", "td"}
    assert not any(name.startswith("on") or name in ("src", "href", "class", "id") for name in found.attributes)


def test_card_shows_text_of_others_as_text() -> None:
    found = Parsed(
        card(status(name=HOSTILE, reasons=(HOSTILE,), message=HOSTILE, nodes=(Node(HOSTILE, None, HOSTILE),)))
    )

    assert found.text.count(HOSTILE) == 5 and "img" not in found.tags


def test_curve_leaves_out_what_is_no_number_and_needs_two() -> None:
    assert curve([(1, math.nan), (2, 1.0), (3, math.inf)]) == ""
    flat = curve([(1, 2.0), (2, math.nan), (3, 2.0)])
    assert 'points="2.0,24.0 238.0,24.0"' in flat


def test_picture_puts_a_step_that_is_done_again_in_place_of_the_lost_one() -> None:
    picture = Picture()
    steps = [Event("step", {"step": step, "loss": float(step)}, attempt=1) for step in range(1, 8)]
    failure = Event("failure", {"cause": "crash", "rank": 1, "reason": "killed\nby"}, attempt=1)
    restored = Event("restored", {"step": 5, "tier": "memory"}, attempt=2)
    again = Event("step", {"step": 6, "loss": 6.5}, attempt=2)
    picture.take([*steps, failure, restored, again, Event("committed", {"tier": "memory", "step": 5}, attempt=2)])

    assert picture.losses[-2:] == [(5, 5.0), (6, 6.5)]
    assert (picture.step, picture.attempt, picture.restored) == (6, 2, ("memory", 5))
    assert (picture.num_failures, picture.last_failure) == (1, "crash of rank 1: killed")


class Output:
    """Plays IPython's display and the handle that it gives."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []
        self.updated: list[dict[str, str]] = []

    def __call__(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        assert raw and display_id
        self.shown.append(data)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.updated.append(data)

    def write(self, text: str) -> None:
        self.shown.append({"text/plain": text})

    def flush(self) -> None:
        """Nothing is held back."""


def test_card_screen_shows_one_output_and_updates_it() -> None:
    output = Output()
    screen = CardScreen(output)
    for step in (12, 13):
        screen.show(status(step=step))

    assert [item["text/html"] for item in output.shown] == [card(status())]
    assert [item["text/plain"] for item in output.updated] == [str(status(step=13))]


def test_text_screen_says_a_status_when_more_than_its_step_has_changed() -> None:
    output = Output()
    screen = TextScreen(output)  # type: ignore[arg-type]
    for found in (status(), status(step=13), status(step=14, state=State.RUNNING)):
        screen.show(found)

    assert [item["text/plain"] for item in output.shown] == [
        f"{status()}\n",
        f"{status(step=14, state=State.RUNNING)}\n",
    ]
