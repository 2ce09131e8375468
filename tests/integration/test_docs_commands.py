"""The pages as a stranger reads them: what they show is run, against a small run that the first guide trains."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from ktrain.base import contract
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.policy import as_every, as_keep
from ktrain.cli.main import cli, main

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
KILLED_AT = 60


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> dict[str, str]:
    """Page and line -> each command of ktrain that a page shows."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if {"adr", "changes", "reference"} & set(page.parts):
            continue
        text = re.sub(r"\\\n\s+", "", page.read_text())
        for line in re.findall(r"^    (?:\w+='[^']*' )?(?:\.venv/bin/)?(ktrain .*)$", text, re.MULTILINE):
            found[f"{page.name}: {line}"] = line
    return found


COMMANDS = commands()
CLUSTER_VERBS = (  # run by tests/unit/cli/test_cluster_verbs.py, test_cluster_remote.py and test_cluster_resume.py
    "wait", "events", "delete", "list", "exec", "port-forward", "resume", "gc",
)  # fmt: skip
LAUNCHES = {
    shown
    for shown, line in COMMANDS.items()
    if line.split()[1] in ("launch", "logs", "cancel", *CLUSTER_VERBS) or "--backend kubernetes" in line
}


@dataclass(frozen=True)
class Place:
    """A folder with plain.py, its run `runs/plain`, and the memory volume."""

    folder: Path

    def python(self, **environment: str) -> int:
        known = {**os.environ, contract.ENV_VOLUME: str(self.folder / "volume"), "PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            [sys.executable, "plain.py"],
            cwd=self.folder,
            env={**known, **environment},
            capture_output=True,
            timeout=100,
        )
        return process.returncode

    def steps(self) -> list[int]:
        found = RunCatalog.open(str(self.folder / "runs" / "plain"), timeouts=Timeouts(), create=False)
        return [commit.identity.step for commit in found.listing().commits]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Place]:
    """The run of the plain-loop guide: killed on its way, and ended."""
    killed, ended = (Place(tmp_path_factory.mktemp(name)) for name in ("killed", "ended"))
    for place in (killed, ended):
        (place.folder / "plain.py").write_text(blocks(GUIDES / "plain-loop.md")[0])
    assert killed.python(KTRAIN_FAULTS=f"kill@step,step={KILLED_AT}") == -9
    assert ended.python() == 0
    assert ended.steps()[-1] == 100 and len(ended.steps()) >= 2
    return killed, ended


@pytest.fixture
def place(
    trained: tuple[Place, Place], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """A copy to work on; the killed run where the command asks for memory that was left over."""
    killed, ended = trained
    made = Place(tmp_path / "place")
    shutil.copytree((killed if "--volume" in str(request.node.name) else ended).folder, made.folder)
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv(contract.ENV_VOLUME, str(made.folder / "volume"))
    return made


def adapted(line: str, place: Place) -> list[str]:
    """The command with the small run's name and steps in place of those of the page."""
    words = shlex.split(line, comments=True)[1:]
    run = str(place.folder / "runs" / "plain")
    if "--volume" in words:  # a copy has another path; its id is that of the run
        run = json.loads((place.folder / "runs" / "plain" / "run.json").read_text())["id"]
    words = [run if word == "RUN" or word.startswith("runs/") else word for word in words]
    steps = iter((100,) if words.count("--step") == 1 else place.steps()[-2:])
    for at, word in enumerate(words):
        if word == "--step":
            words[at + 1] = str(next(steps))
    return words


def ktrain(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


@pytest.mark.parametrize("shown", sorted(COMMANDS.keys() - LAUNCHES))
def test_command_that_a_page_shows_works(shown: str, place: Place) -> None:
    words = adapted(COMMANDS[shown], place)
    if "import" in words:  # from a model that nobody has here; the recipes' tests import another one
        cli.commands["ckpt"].commands["import"].make_context("import", words[2:])  # type: ignore[attr-defined]
        return
    if "--off" in words:
        assert ktrain("ckpt", "quarantine", words[2], "--step", "100") == contract.EXIT_OK
    if words[:2] == ["ckpt", "rm"] and "--step" in words:
        words.append("--yes")  # a person would be asked
    assert ktrain(*words) == (contract.EXIT_FAILED if "diff" in words else contract.EXIT_OK)  # 1: they differ


@pytest.mark.parametrize(
    "shown", [name for name, line in COMMANDS.items() if line.split()[1] not in ("ckpt", "status")]
)
def test_command_line_of_a_launch_that_a_page_shows_is_understood(shown: str, place: Place) -> None:
    shutil.copytree(ROOT / "examples", place.folder / "examples")
    (place.folder / "train.py").touch()
    verb, *words = shlex.split(COMMANDS[shown], comments=True)[1:]
    context = cli.commands[verb].make_context(verb, words)
    assert isinstance(context, click.Context) and context.params


JSON_ROWS = re.findall(r"^\| `(ktrain [^`]+)` \| (.+) \|$", (ROOT / "docs/reference/cli.md").read_text(), re.MULTILINE)
ARGUMENTS = {
    "pin": "--step 100",
    "rm": "--step 100 --dry-run",
    "diff": "--step 100",
    "export": "OUT --to safetensors",
    "launch": "--backend kubernetes --dry-run --run s3://bucket/a --image a:1 --state 1Gi",
}


def arguments(verb: str, place: Place) -> list[str]:
    words = verb.split()[1:]
    if words[-1] == "import":
        return [*words, str(place.folder / "out.safetensors"), "runs/new", "--from", "safetensors"]
    if words[-1] == "diff":
        return [*words, "runs/plain", "--step", str(place.steps()[-2]), "--step", "100"]
    out = str(place.folder / "out.safetensors")
    return [*words, "runs/plain", *ARGUMENTS.get(words[-1], "").replace("OUT", out).split()]


@pytest.mark.parametrize("verb", [verb for verb, _ in JSON_ROWS if verb.removeprefix("ktrain ") not in CLUSTER_VERBS])
def test_json_of_a_verb_has_the_documented_fields(verb: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    if verb.endswith("import"):
        assert ktrain("ckpt", "export", "runs/plain", str(place.folder / "out.safetensors"), "--to", "safetensors") == 0
    if verb.endswith("quarantine"):
        assert ktrain("ckpt", "quarantine", "runs/plain", "--step", "100") == 0
    capsys.readouterr()
    code = ktrain(*arguments(verb, place), "--output", "json")
    assert code == (contract.EXIT_FAILED if verb.endswith("diff") else contract.EXIT_OK)
    value: Any = json.loads(capsys.readouterr().out)
    said = list(dict.fromkeys(re.findall(r"`(\w+)`", dict(JSON_ROWS)[verb])))
    if isinstance(value, list):
        assert value and all(set(row) <= set(said) for row in value)
    else:
        assert list(value) == [name for name in said if name in value], "every field is named, in this order"
        assert said[0] in value


def test_json_table_names_every_verb_that_has_it() -> None:
    groups = {"ktrain": cli.commands, "ktrain ckpt": cli.commands["ckpt"].commands}  # type: ignore[attr-defined]
    have = {
        f"{group} {name}"
        for group, known in groups.items()
        for name, command in known.items()
        if any("--output" in option.opts for option in command.params)
    }
    assert have == {verb for verb, _ in JSON_ROWS if "--volume" not in verb}


def test_script_of_the_guide_goes_on_after_it_was_killed_and_ends_once(
    trained: tuple[Place, Place], tmp_path: Path
) -> None:
    """As the guide says: kill it, run it again; run it after it has ended."""
    place = Place(tmp_path / "place")
    shutil.copytree(trained[0].folder, place.folder)
    assert place.python() == 0 and place.steps()[-1] == 100
    assert place.python() == 0 and place.steps()[-1] == 100
    lines = (place.folder / "runs" / "plain" / "events.jsonl").read_text().splitlines()
    restored = [event["step"] for event in map(json.loads, lines) if event["kind"] == "restored"]
    assert 0 < restored[0] < KILLED_AT and restored[1] == 100


def test_policies_that_the_guides_show_are_taken() -> None:
    names: dict[str, Any] = {}
    for page, word in (("storage.md", "retention import"), ("cadence.md", "cadence import")):
        for block in [block for block in blocks(GUIDES / page) if word in block]:
            exec(compile(block, page, "exec"), names)
    text = re.search(r'`"(latest:[^"]+)"` is the same', (GUIDES / "storage.md").read_text())
    assert text is not None and as_keep(text[1]).in_bucket == as_keep(names["keep"]).in_bucket
    assert as_every(names["every"]).auto is not None


def test_run_that_a_page_damages_is_found_damaged(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The last chapter of the tutorial."""
    (line,) = re.findall(r"^    (printf .*)$", (ROOT / "docs/tutorial/01-first-run.md").read_text(), re.MULTILINE)
    subprocess.run(
        ["bash", "-c", line.replace("runs/first", "runs/plain")], check=True, capture_output=True, timeout=60
    )
    assert ktrain("ckpt", "verify", "runs/plain") == contract.EXIT_CORRUPT
    assert "rank-00000.safetensors, bytes 0 to" in capsys.readouterr().err
