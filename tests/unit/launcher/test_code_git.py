"""Code from a commit: fetched with the git of the machine, whole, by its id."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError, DeadlineError
from ktrain.launcher.code import git
from ktrain.launcher.code.git import fetch_commit


def run(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    found = tmp_path / "origin"
    (found / "lib").mkdir(parents=True)
    (found / "train.py").write_text("print(1)\n")
    (found / "lib" / "gr\u00f6\u00dfe.py").write_bytes(b"a\r\nb\n")
    (found / "run.sh").write_text("#!/bin/sh\n")
    (found / "run.sh").chmod(0o755)
    run(found, "init", "--quiet")
    run(found, "config", "uploadpack.allowAnySHA1InWant", "true")
    run(found, "add", ".")
    run(found, "commit", "-m", "a")
    return found


def fetch(origin: Path, commit: str, tmp_path: Path) -> int:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return fetch_commit(f"file://{origin}", commit, scratch, tmp_path / "target", protocol="file")


def test_commit_gives_its_files_and_who_may_run_them(origin: Path, tmp_path: Path) -> None:
    first = run(origin, "rev-parse", "HEAD")
    (origin / "train.py").write_text("print(2)\n")
    run(origin, "commit", "-am", "b")
    target = tmp_path / "target"

    assert fetch(origin, first, tmp_path) == 3
    assert (target / "train.py").read_text() == "print(1)\n"
    assert (target / "lib" / "gr\u00f6\u00dfe.py").read_bytes() == b"a\r\nb\n"
    assert os.access(target / "run.sh", os.X_OK) and not os.access(target / "train.py", os.X_OK)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_fetch_again_begins_anew(origin: Path, tmp_path: Path) -> None:
    commit = run(origin, "rev-parse", "HEAD")
    (tmp_path / "scratch" / "repo.git").mkdir(parents=True)  # of a try that was cut off
    (tmp_path / "scratch" / "repo.git" / "config").write_text("[broken")
    fetch(origin, commit, tmp_path)
    (tmp_path / "target" / "half").write_text("")

    assert fetch(origin, commit, tmp_path) == 3
    assert not (tmp_path / "target" / "half").exists()


def test_folder_of_somebody_else_is_not_touched(origin: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("")

    with pytest.raises(ConfigError, match="is not empty"):
        fetch(origin, run(origin, "rev-parse", "HEAD"), tmp_path)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


def test_image_without_git_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(git.resource, "setrlimit", lambda *given: None)

    code = git.main(["https://example.com/a", "1" * 40, str(tmp_path), str(tmp_path / "target")])
    assert code == contract.EXIT_USAGE and "the image has no git" in capsys.readouterr().err


def test_git_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(git, "_LOCAL_S", 0.2)

    with pytest.raises(DeadlineError, match="did not end"):
        fetch_commit("https://example.com/a", "1" * 40, tmp_path, tmp_path / "target")


def test_secret_reaches_git_alone_and_for_its_host_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git that asks the helper as git does, and keeps its command lines."""
    real = subprocess.run(["sh", "-c", "command -v git"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv(contract.ENV_GIT_PASSWORD, r"pass\nword %s")
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/commands
case "$*" in *fetch*) ;; *) exec {real} "$@" ;; esac
while [ "$1" != fetch ]; do set -- "$@" "$1"; shift; done
shift
for word; do case "$word" in --*|https:*|1111*) ;; *) set -- "$@" "$word" ;; esac; shift; done
printf 'protocol=https\\nhost=example.com\\n\\n' | {real} "$@" credential fill > {tmp_path}/ours
printf 'protocol=https\\nhost=other.org\\n\\n' | {real} "$@" credential fill > {tmp_path}/theirs
exit 1
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    with pytest.raises(Exception, match="is the commit pushed"):
        fetch_commit("https://example.com/a", "1" * 40, tmp_path, tmp_path / "target")
    assert r"password=pass\nword %s" in (tmp_path / "ours").read_text()
    assert "username=git" in (tmp_path / "ours").read_text()
    assert "password" not in (tmp_path / "theirs").read_text()
    assert "pass\\nword" not in (tmp_path / "commands").read_text()


def test_server_that_cannot_be_reached_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "ktrain.launcher.code.git", "https://127.0.0.1:1/me/net", "1" * 40]
    done = subprocess.run(
        [*command, str(tmp_path), str(tmp_path / "target")], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == contract.EXIT_UNAVAILABLE
    assert done.stderr.startswith(f"ktrain: code https://127.0.0.1:1/me/net@{'1' * 40}: git failed")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
