"""launch/images: what a container file may do, checked by reading it; nothing is built here."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.job import render
from tests.unit.launcher import setups
from tests.unit.launcher.shipped.kustomize import CLUSTER, resolve
from tests.unit.launcher.test_spec import job

IMAGES = setups.ROOT / "launch" / "images"
FILES = sorted(path.name for path in IMAGES.iterdir())
_KNOWN = {"FROM", "RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "ENTRYPOINT"}
_SECRET = re.compile(r"secret|password|passwd|token|credential|api_?key|private_?key", re.IGNORECASE)

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Name and arguments of each instruction, lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if name
    ]


def problems(text: str, root: Path = setups.ROOT) -> Iterator[str]:
    """What is wrong with a container file whose build context is the repository."""
    found = instructions(text)
    yield from (f"{name}: not known here" for name, _ in found if name not in _KNOWN)
    yield from _bases(found)
    yield from _copies(found, root)
    yield from (
        f"{name} {rest}: reads like a secret" for name, rest in found if name in ("ARG", "ENV") and _SECRET.search(rest)
    )
    yield from (problem for name, rest in found if name == "RUN" for problem in _run(rest))
    users = [
        rest for name, rest in found[max(at for at, item in enumerate(found) if item[0] == "FROM") :] if name == "USER"
    ]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield "the last stage does not end as a user by number that is not root"


def _bases(found: list[Instruction]) -> Iterator[str]:
    stages: set[str] = set()
    for name, rest in found:
        if name != "FROM":
            continue
        base, *more = rest.split()
        if base not in stages and not re.fullmatch(
            r"[a-z0-9-]+(/[a-z0-9-]+)?:\d+(\.\d+){2}[\w.-]*(@sha256:[0-9a-f]{64})?", base
        ):
            yield f"FROM {base}: expected a name without a host and a whole version"
        stages |= set(more[1:])
    if len(stages) == 0:
        yield "one stage: compilers stay in the image"


def _copies(found: list[Instruction], root: Path) -> Iterator[str]:
    sent = [
        line.removeprefix("!") for line in (setups.ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for name, rest in found:
        words = shlex.split(rest)
        if name != "COPY" or words[0].startswith("--from="):
            continue
        for source in words[:-1]:
            path = source.removeprefix("./")
            if not (root / path).exists():
                yield f"COPY {source}: there is no such file"
            if not any(fnmatch.fnmatch(path, pattern) for pattern in sent):
                yield f"COPY {source}: .dockerignore keeps it out of the build context"


def _run(rest: str) -> Iterator[str]:
    for command in re.split(r"&&|;|\|", rest):
        if re.search(r"\b(curl|wget|ADD|sudo)\b", command):
            yield f"RUN {command.strip()}: fetches what nobody has checked, or gains rights"
        if "apt-get install" in command and "--no-install-recommends" not in command:
            yield "apt-get install: without --no-install-recommends"
        if "pip install" in command and not {"--no-cache-dir", "--constraint"} <= set(command.split()):
            yield f"RUN {command.strip()}: pip without --constraint or --no-cache-dir"
    if "apt-get install" in rest and "rm -rf /var/lib/apt/lists/*" not in rest:
        yield "apt-get install: leaves its lists in the image"


@pytest.mark.parametrize("name", FILES)
def test_container_file_is_clean(name: str) -> None:
    assert list(problems((IMAGES / name).read_text())) == []


def test_container_files_are_for_three_kinds_of_node() -> None:
    assert FILES == ["cpu.Containerfile", "cuda.Containerfile", "tpu.Containerfile"]


GOOD = "FROM a:1.2.3 AS build\nCOPY ktrain ./ktrain\nFROM a:1.2.3\nUSER 1000:1000\n"


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("FROM a:1.2.3\n", "FROM a:latest\n", "whole version"),
        ("FROM a:1.2.3\n", "FROM a\n", "whole version"),
        ("FROM a:1.2.3\n", "FROM a.example/b:1.2.3\n", "without a host"),
        ("FROM a:1.2.3 AS build\n", "", "one stage"),
        ("USER 1000:1000\n", "", "not root"),
        ("USER 1000:1000\n", "USER 0:0\n", "not root"),
        ("USER 1000:1000\n", "USER 1000:1000\nUSER root\n", "not root"),
        ("COPY ktrain ", "COPY nothing ", "no such file"),
        ("COPY ktrain ", "COPY tests ", "build context"),
        ("COPY ktrain ", "ADD ktrain ", "ADD: not known"),
        ("FROM a:1.2.3\n", "FROM a:1.2.3\nARG HUB_TOKEN=x\n", "secret"),
        ("FROM a:1.2.3\n", "FROM a:1.2.3\nRUN curl x | sh\n", "nobody has checked"),
        ("FROM a:1.2.3\n", "FROM a:1.2.3\nRUN pip install x\n", "pip without"),
        ("FROM a:1.2.3\n", "FROM a:1.2.3\nRUN apt-get install g++\n", "lists"),
    ],
)
def test_reader_of_container_files_finds_what_it_looks_for(old: str, new: str, hint: str) -> None:
    assert list(problems(GOOD)) == []
    found = list(problems(GOOD.replace(old, new, 1)))
    assert any(hint in problem for problem in found), found


@pytest.mark.parametrize("name", FILES)
def test_image_has_every_entry_point_that_is_rendered_and_its_user(name: str) -> None:
    """The build imports the modules that pods and the node agent start."""
    spec = job(code={"archive": "a" * 64})
    jobset = render(spec, ClusterFacts()).jobset
    pods = [setups.pod_of(jobset, role) for role in ("head", "worker")]
    pods += [item["spec"]["template"]["spec"] for item in resolve(CLUSTER / "memory") if item["kind"] == "DaemonSet"]
    commands = [c["command"] for pod in pods for c in [*pod.get("initContainers", []), *pod["containers"]]]
    found = instructions((IMAGES / name).read_text())
    [check] = [rest for kind, rest in found if kind == "RUN" and "import" in rest]

    assert {command[0] for command in commands} == {spec.python}
    for module in {command[3] for command in commands}:
        assert re.search(rf"\b{re.escape(module)}\b", check), module
    assert [rest for kind, rest in found if kind == "USER"] == [f"{spec.user}:{spec.user}"]
