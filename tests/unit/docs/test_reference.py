"""The reference pages are golden lists: what they name is what the code has, no more and no less."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

import ktrain
from ktrain import errors
from ktrain.base import contract, events, faults
from ktrain.base.settings import Timeouts
from ktrain.cli.main import cli
from ktrain.jobs.job import Job
from ktrain.jobs.status import JobStatus
from ktrain.launcher import faults as fault_plans
from ktrain.launcher.places import Kubernetes, Local

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "ktrain"
_CODE = re.compile(r"`([^`]+)`")
_NO_FIELDS = ("attempt", "clock")  # arguments of the functions that make events


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    lines = (DOCS / "reference" / page).read_text().splitlines()
    start = lines.index(heading)
    level = heading.split(" ", 1)[0]
    ends = [at for at in range(start + 1, len(lines)) if re.match(f"#{{1,{len(level)}}} ", lines[at])]
    return "\n".join(lines[start + 1 : min(ends, default=len(lines))])


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the first table in a text, without its header."""
    table = []
    for line in text.splitlines():
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif table:
            break
    return table[2:]


def first_names(text: str) -> list[str]:
    """What stands in code marks in the first column."""
    return [_CODE.findall(row[0])[0] for row in rows(text)]


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for verb, below in command.commands.items():
        yield from commands(below, f"{name} {verb}")


COMMANDS = dict(commands(cli, "ktrain"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_cli_page_options_are_those_of_the_command(name: str) -> None:
    options = [option for option in COMMANDS[name].params if isinstance(option, click.Option)]
    found = sorted(opt for option in options for opt in option.opts if opt.startswith("--"))
    assert sorted(first_names(section("cli.md", f"## `{name}`"))) == found


def test_cli_page_headings_are_the_commands() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    assert sorted(re.findall(r"^## `(ktrain .+)`$", page, re.MULTILINE)) == sorted(COMMANDS)


def test_cli_page_actions_are_those_of_fault_plans() -> None:
    listed = {row[0].strip("`"): tuple(_CODE.findall(row[1])) for row in rows(section("cli.md", "### Faults"))}
    assert listed == fault_plans._KEYS


def test_exit_codes_page_is_the_contract() -> None:
    page = section("exit-codes.md", "# Reference: exit codes")
    listed = {_CODE.findall(row[1])[0]: int(row[0].strip("`")) for row in rows(page)}
    assert listed == {name: value for name, value in vars(contract).items() if name.startswith("EXIT_")}


def test_environment_page_variables_are_the_contract() -> None:
    known = [value for name, value in vars(contract).items() if name.startswith("ENV_")]
    assert sorted(first_names(section("environment.md", "## Variables"))) == sorted(known)


def test_environment_page_timeouts_are_the_settings() -> None:
    known = [name for name, value in vars(Timeouts).items() if isinstance(value, property)]
    assert sorted(first_names(section("environment.md", "## Timeouts"))) == sorted(known)
    assert [field.name for field in fields(Timeouts)] == ["patience_s"]


def test_environment_page_fault_points_and_actions_are_those_of_the_plan() -> None:
    text = section("environment.md", "## Fault points")
    assert tuple(first_names(text)) == faults.POINTS
    assert all(f"`{action}`" in text for action in faults.ACTIONS)


def test_events_page_kinds_are_those_of_the_code() -> None:
    listed = first_names(section("events.md", "## Kinds"))
    assert sorted(listed) == sorted(events.KINDS)


def test_events_page_causes_are_the_contract() -> None:
    known = [value for name, value in vars(contract).items() if name.startswith("CAUSE_")]
    assert sorted(first_names(section("events.md", "## Causes"))) == sorted(known)


def said_fields() -> Iterator[tuple[str, str, str]]:
    """(kind, field, place) of every event whose kind is spelt out where it is made."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            kind = node.args[0].value
            is_fault_point = isinstance(node.func, ast.Attribute) and node.func.attr == "reached"
            if not isinstance(kind, str) or kind not in events.KINDS or is_fault_point:
                continue
            names = [item.arg for item in node.keywords if item.arg is not None and item.arg not in _NO_FIELDS]
            for argument in node.args[1:]:
                if isinstance(argument, ast.Dict):
                    names += [str(key.value) for key in argument.keys if isinstance(key, ast.Constant)]
            yield from ((kind, name, f"{path.relative_to(ROOT)}:{node.lineno}") for name in names)


def test_events_page_fields_cover_what_the_code_says() -> None:
    table = rows(section("events.md", "## Kinds"))
    listed = {row[0].strip("`"): set(_CODE.findall(row[1])) for row in table}
    said = list(said_fields())
    assert len(said) > 40  # the search finds the calls
    missing = [f"{kind}.{name} ({place})" for kind, name, place in said if name not in listed[kind]]
    assert missing == []


def test_python_page_names_are_the_public_ones() -> None:
    assert sorted(first_names(section("python.md", "# Reference: public names"))) == sorted(ktrain.__all__)


def parameters(module: str, name: str) -> list[str]:
    """Parameter names of a function, or of a class's constructor, without importing torch."""
    tree = ast.parse((PACKAGE / module).read_text())
    node = next(item for item in tree.body if isinstance(item, ast.ClassDef | ast.FunctionDef) and item.name == name)
    if isinstance(node, ast.ClassDef):
        node = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    assert isinstance(node, ast.FunctionDef)
    return [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg != "self"]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("Checkpointer", "checkpoint/checkpointer.py"),
        ("session", "train/session.py"),
        ("Trainer", "train/trainer.py"),
    ],
)
def test_python_page_parameters_are_those_of_the_callable(name: str, module: str) -> None:
    table = {row[0].strip("`"): _CODE.findall(row[1]) for row in rows(section("python.md", "## Parameters"))}
    assert table[name] == parameters(module, name)


def test_python_page_errors_are_the_tree() -> None:
    own = [cls for cls in errors._tree(errors.KtrainError) if cls.__module__ == errors.__name__]
    listed = {_CODE.findall(row[0])[0]: row[1].strip("`") for row in rows(section("python.md", "## Errors"))}
    assert listed == {cls.__name__: cls.kind for cls in own}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize(
    ("heading", "kind", "own"),
    [("Local", Local, ()), ("Kubernetes", Kubernetes, ()), ("JobStatus", JobStatus, ("is_final", "loss", "to_value"))],
)
def test_python_page_fields_of_launches_are_those_of_the_code(heading: str, kind: type, own: tuple[str, ...]) -> None:
    text = (DOCS / "reference" / "python.md").read_text().partition(f"| `{heading}` | Is")[2]
    listed = [name.partition("(")[0] for row in rows(f"| `{heading}` | Is{text}") for name in _CODE.findall(row[0])]
    assert sorted(listed) == sorted([*(item.name for item in fields(kind)), *own])


def test_python_page_members_of_a_job_are_those_of_the_code() -> None:
    text = (DOCS / "reference" / "python.md").read_text().partition("| `Job` | Is |")[2]
    listed = [name.partition("(")[0] for row in rows(f"| `Job` | Is |{text}") for name in _CODE.findall(row[0])]
    assert sorted(listed) == sorted(name for name in vars(Job) if not name.startswith("_"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_page_python_blocks_parse(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)
