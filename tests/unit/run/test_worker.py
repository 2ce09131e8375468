"""The worker's border: what the script sees, how its end is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.run import worker


@pytest.fixture(autouse=True)
def _keep_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "train.py"
    path.write_text(text)
    return str(path)


def test_run_script_sees_its_arguments_its_folder_and_main(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("VALUE = 7\n")
    out = tmp_path / "out"
    said = "repr((__name__, sys.argv[1:], sibling.VALUE))"
    text = f"import pathlib, sys, sibling\npathlib.Path({str(out)!r}).write_text({said})\n"

    assert worker.run_script(script(tmp_path, text), ["--lr", "1"]) == contract.EXIT_OK

    assert out.read_text() == repr(("__main__", ["--lr", "1"], 7))


def test_run_script_raises_leaves_an_error_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.run_script(script(tmp_path, "raise ValueError('nan in layer 3')\n"), []) == contract.EXIT_FAILED

    said = json.loads((tmp_path / "error.json").read_text())
    assert said["kind"] == "exception"
    assert said["message"]["message"] == "ValueError: nan in layer 3"
    assert "train.py" in said["message"]["extraInfo"]["py_callstack"]
    shown = capsys.readouterr().err
    assert "nan in layer 3" in shown and "runpy" not in shown, "only the script's own frames are shown"


def test_run_script_ktrain_error_keeps_its_kind(tmp_path: Path) -> None:
    text = "from ktrain.errors import ConfigError\nraise ConfigError('batch 7 does not divide by 4')\n"

    assert worker.run_script(script(tmp_path, text), []) == contract.EXIT_USAGE
    assert json.loads((tmp_path / "error.json").read_text())["kind"] == "config"


def test_run_script_sys_exit_passes_through(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        worker.run_script(script(tmp_path, "import sys; sys.exit(130)\n"), [])

    assert caught.value.code == contract.EXIT_STOPPED
    assert not (tmp_path / "error.json").exists()


def test_run_script_syntax_error_is_a_failure(tmp_path: Path) -> None:
    assert worker.run_script(script(tmp_path, "def (:\n"), []) == contract.EXIT_FAILED


def ended_by(tmp_path: Path, text: str) -> tuple[int, str]:
    """Exit code and log of a worker of its own."""
    command = [sys.executable, "-u", "-m", "ktrain.run.worker", "--parent", str(os.getpid()), script(tmp_path, text)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout


def test_threads_in_native_code_do_not_abort_a_worker_that_has_finished(tmp_path: Path) -> None:
    text = """
import threading, torch
def add(a):
    while True:
        a + a
for _ in range(3):
    threading.Thread(target=add, args=(torch.ones(100),), daemon=True).start()
print("last words")
"""
    assert ended_by(tmp_path, text) == (contract.EXIT_OK, "last words\n")


@pytest.mark.parametrize(("end", "code"), [("None", 0), ("3", 3), ("'no data'", contract.EXIT_FAILED)])
def test_worker_leaves_in_order(tmp_path: Path, end: str, code: int) -> None:
    text = f"""
import atexit, io, sys, threading
class Circle:
    def __init__(self):
        self.me = self
    def __del__(self):
        print("finalised")
Circle()
left = open("left", "w")
left.write("whole")
class Own(io.RawIOBase):
    def writable(self):
        return True
    def write(self, data):
        raise RuntimeError("a stream of somebody's own")
sys.own = io.BufferedWriter(Own())
sys.own.write(b"lost with its stream")
sys.kept = left
started = threading.Event()
def work():
    started.wait()
    threading.main_thread().join(0.01)
    print("thread")
threading.Thread(target=work).start()
atexit.register(print, "handler")
started.set()
sys.exit({end})
"""
    found, log = ended_by(tmp_path, text)

    assert found == code
    assert log.splitlines() == [*(["no data"] if end == "'no data'" else []), "thread", "handler", "finalised"]
    assert (tmp_path / "left").read_text() == "whole"
