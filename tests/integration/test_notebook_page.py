"""docs/guides/notebooks.md, run as it stands there: a job outlives who launched it, and is found from elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ktrain
from ktrain.launcher.job import plan_job
from tests.integration.launching import ENDS_WITHIN_S, Place, place

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / "notebooks.md").read_text(), re.DOTALL)
LAUNCH, ATTACH, CARELESS, _ = BLOCKS
WAITS = """
import os, pathlib, time
root = pathlib.Path(__file__).parent
(root / f"started-{os.environ['KTRAIN_EPOCH']}").touch()
while not (root / "done").exists():
    time.sleep(0.02)
print("seen")
"""
AGAIN = "import sys, ktrain\njob = ktrain.launch(['train.py'], on=ktrain.Local(), run='run')\n"


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        yield made


def python(here: Place, name: str, text: str) -> subprocess.CompletedProcess[str]:
    """Runs a text as one process does its cells, to its end."""
    (here.root / name).write_text(text)
    known: dict[str, Any] = {"cwd": here.root, "env": here.environment(), "timeout": ENDS_WITHIN_S}
    return subprocess.run([sys.executable, name], capture_output=True, text=True, **known)


def test_function_of_a_cell_trains_to_its_end_and_is_watched_from_another_process(here: Place) -> None:
    launched = python(here, "cell.py", LAUNCH)
    assert launched.returncode == 0, launched.stderr

    attached = python(here, "elsewhere.py", ATTACH)

    assert attached.returncode == 0, attached.stderr
    assert "\ndone 40 0\n" in attached.stdout and attached.stdout.endswith("done\n\n"), attached.stdout
    (record,) = here.root.glob("runs/from-a-cell/launch.json")
    assert json.loads(record.read_text())["ended"]["step"] == 40
    here.await_nothing_left()
    assert here.launch_files() == []


def test_launch_that_is_killed_is_seen_as_failed_and_the_same_launch_continues(here: Place) -> None:
    here.script.write_text(WAITS)
    first = python(here, "first.py", AGAIN)
    assert first.returncode == 0, first.stderr
    here.await_that("start of the worker", (here.root / "started-1").exists)
    second = python(here, "second.py", AGAIN)
    assert "ConflictError: this run is live already, launched by process" in second.stderr

    os.kill(json.loads((here.root / "run" / "launch.json").read_text())["local"]["pid"], signal.SIGKILL)
    here.await_nothing_left()
    seen = python(here, "seen.py", "import ktrain\nprint(ktrain.attach('run').wait(timeout_s=60).to_value())\n")
    assert "'state': <State.FAILED" in seen.stdout and "without a verdict" in seen.stdout, seen.stderr
    (here.root / "done").touch()
    again = python(here, "again.py", f"{AGAIN}print(job.wait(timeout_s=90).state, job.logs())\n")

    assert again.stdout == "done seen\n\n", again.stdout + again.stderr
    here.await_nothing_left()


def test_launch_goes_on_when_whoever_asked_for_it_is_gone_before_the_answer(here: Place) -> None:
    here.script.write_text("print('ran')")
    spec = plan_job(ktrain.Local().wish((str(here.script),), str(here.run)))
    reads, writes = os.pipe()
    command = [sys.executable, "-P", "-m", "ktrain.cli.detached", str(writes), str(here.root / "log")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writes,), env=here.environment())
    os.close(reads)
    os.close(writes)
    process.communicate(json.dumps(spec.to_json()).encode(), timeout=ENDS_WITHIN_S)

    here.await_that("the end", lambda: here.events("run_ended"))
    assert [event["outcome"] for event in here.events("run_ended")] == ["succeeded"]
    here.await_nothing_left()


def test_careless_function_is_refused_with_the_words_of_the_page(here: Place) -> None:
    page = (ROOT / "docs" / "guides" / "notebooks.md").read_text()
    said = re.findall(r"^    (ktrain\.errors\.ConfigError: .*\n(?:    .+\n)+)", page, re.MULTILINE)[0]

    refused = python(here, "careless.py", f"import ktrain\n{CARELESS}")

    assert refused.stderr.endswith(said.replace("\n    ", "\n")), refused.stderr
    assert not (here.root / "runs").exists(), "nothing was started"
