"""A drain whose agent is killed in the middle of a payload's upload, and who goes on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.format import record as records
from ktrain.testing.faulty_s3 import FaultyS3, S3Fault, S3Trouble
from ktrain.testing.s3_servers import MotoServer, RcloneServer, S3Server, find_program
from tests.integration.upload_child import WRITE_ID, open_volume, slot_bytes, upload

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
URL = "s3://bucket/run"


@pytest.mark.parametrize(("program", "make"), [("moto_server", MotoServer), ("rclone", RcloneServer)])
def test_drain_agent_killed_in_mid_payload_the_next_one_sends_only_the_parts_that_are_missing(
    program: str, make: Callable[[], S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts of four have arrived and two are on their way when it dies. Neither server names digests of parts."""
    if find_program(program) is None:
        pytest.skip(f"{program} is not installed")
    stalls = S3Fault("upload_part", S3Trouble.STALL, nth=2, count=2)
    with make() as server, FaultyS3(server, stalls, checks=True) as proxy:
        server.make_bucket("bucket")
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in proxy.environment().items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-m", "tests.integration.upload_child", str(tmp_path), URL]
        agent = subprocess.Popen(command, cwd=ROOT)
        deadline = Deadline.after(WAIT_S)
        while proxy.count("upload_part", 200) < 2:
            deadline.check("wait for two parts")
            SYSTEM_CLOCK.sleep(0.02)
        agent.send_signal(signal.SIGKILL)
        agent.wait(WAIT_S)
        proxy.heal()

        with open_volume(tmp_path) as volume:
            said = upload(volume, URL, again=True)
            expected = slot_bytes(volume)
        assert "files" in said[-1], said[-1]
        assert server.get("bucket", f"run/{records.payload_name(10, 1, WRITE_ID, 0)}") == expected
        assert proxy.count("create_multipart_upload") == 1
        assert proxy.count("upload_part", 200) == 4, "two of the dead agent and two of this one"
        assert proxy.count("get_object") == 1, "the manifest, to see whether all was there; no part was read"
