"""What every test gets: a seed that is printed, and the stacks of all threads when it hangs."""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import signal
import zlib
from collections.abc import Generator

import hypothesis
import pytest

_SEED = pytest.StashKey[int]()

# Deadlines of hypothesis measure the neighbours on a shared machine, not the code.
hypothesis.settings.register_profile("ktrain", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("ktrain")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run with the seed that it printed")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--seed")
    config.stash[_SEED] = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    # `kill -USR1 <pid>` shows where a run hangs without ending it; the timeouts in pyproject.toml end it.
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[_SEED]} (repeat with --seed {config.stash[_SEED]})"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Returns a seed of this test's own, the same whenever --seed is, whichever tests run beside it."""
    return zlib.crc32(request.node.nodeid.encode(), request.config.stash[_SEED])


@pytest.fixture(autouse=True)
def _seeded_random(seed: int) -> None:
    random.seed(seed)


@pytest.fixture
def undumped() -> None:
    """For tests beside whose thread a cluster works: CPython 3.11 may crash where it dumps the stack of a busy thread.

    Their time limit still ends them, and shows the stacks then.
    """
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _same_log_level() -> Generator[None]:
    """What a test silences is heard again in the next."""
    log, disabled = logging.getLogger("ktrain"), logging.root.manager.disable
    level = log.level
    yield
    log.setLevel(level)
    logging.disable(disabled)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat with --seed {item.config.stash[_SEED]}"))
    return report
