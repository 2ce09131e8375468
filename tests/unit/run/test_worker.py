"""The worker's border: what the script sees, how its end is told."""

from __future__ import annotations

import json
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
