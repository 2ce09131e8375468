"""Code out of a commit of git, with the git of the image, where nothing in it is trusted before it is looked at.

    python -P -m ktrain.launcher.code.git URL COMMIT SCRATCH TARGET

Bytes are written as they stand in the commit: no hooks, filters, attributes, links or submodules. Standard library and
`ktrain.errors` alone.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ktrain.base import contract
from ktrain.errors import ConfigError, CorruptionError, DeadlineError, KtrainError, UnavailableError
from ktrain.launcher.code import members, unpack

_FETCH_S = 900.0
_LOCAL_S = 300.0
_PIECE = 1 << 20
_MOST_FILE_BYTES = members.MOST_BYTES + (128 << 20)  # of any file that git writes, its pack among them
_ENTRY = re.compile(rb"(?P<mode>\d{6}) (?P<kind>\w+) (?P<id>[0-9a-f]+) +(?P<size>\d+|-)\t(?P<name>.+)", re.DOTALL)
_DAMAGED = "error: object"  # how git begins, where its proof of what it was sent fails
_FILES = {"100644": 0o644, "100664": 0o644, "100755": 0o755}
_PLAIN = (  # no configuration of the image, no question to anybody, words in English
    "env", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "LC_ALL=C",
    "git",
)  # fmt: skip
# git asks it for what the Secret says; so neither stands in a command line, in a file or in a variable of Python's.
_HELPER = (
    f'!f() {{ test -n "${contract.ENV_GIT_PASSWORD}" && printf "username=%s\\npassword=%s\\n" '
    f'"${{{contract.ENV_GIT_USERNAME}:-git}}" "${contract.ENV_GIT_PASSWORD}"; }}; f'
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of a commit."""

    name: str
    mode: int
    object_id: str
    size: int


def fetch_commit(url: str, commit: str, scratch: Path, target: Path, *, protocol: str = "https") -> int:
    """Writes the files of a commit below an empty folder; returns how many. Nothing is written unless all is allowed.

    Raises:
        ConfigError: there is no git, or the commit has what may not be written.
        UnavailableError: it could not be fetched.
        CorruptionError: what came is not that commit.
        DeadlineError: git did not end in time.
    """
    if shutil.which("git") is None:
        raise ConfigError("code from git: the image has no git; use one that has, or send a directory: --code DIR")
    what = f"code {url}@{commit}"
    repository, blobs = scratch / "repo.git", scratch / "blobs"
    shutil.rmtree(repository, ignore_errors=True)  # of a try that was cut off
    try:
        _fetch(what, repository, url, commit, protocol)
        entries = _entries(what, repository, commit)
        with open(blobs, "w+b") as file:
            wanted = "".join(f"{entry.object_id}\n" for entry in entries).encode()
            _git(what, ["-C", str(repository), "cat-file", "--batch"], _LOCAL_S, wanted, file)
            _prove(what, file, entries)
            members.expect_target(target)
            _write(file, entries, target)
    finally:
        shutil.rmtree(repository, ignore_errors=True)
        blobs.unlink(missing_ok=True)
    return len(entries)


def _fetch(what: str, repository: Path, url: str, commit: str, protocol: str) -> None:
    kind = ["--object-format=sha256"] if len(commit) == 64 else []
    _git(what, ["init", "--quiet", "--bare", "--template=", *kind, str(repository)], _LOCAL_S)
    host = re.match(r"\w+://[^/]*", url)
    options = {
        "protocol.allow": "never",
        f"protocol.{protocol}.allow": "always",
        "fetch.fsckObjects": "true",
        "credential.helper": "",
        f"credential.{host[0] if host else url}.helper": _HELPER,
    }
    flags = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
    asked = ["fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", url, commit]
    try:
        _git(what, ["-C", str(repository), *flags, *asked], _FETCH_S)
    except CorruptionError as error:
        if _DAMAGED in str(error):
            raise
        raise UnavailableError(
            f"{error}; is the commit pushed, does the server give commits by their id, and may this job read it "
            "(code.git_secret)"
        ) from error
    found = _git(what, ["-C", str(repository), "rev-parse", "--verify", f"{commit}^{{commit}}"], _LOCAL_S)
    if found.decode().strip() != commit:
        raise CorruptionError(f"{what}: that is no commit, but names {found.decode().strip()}; nothing was unpacked")


def _entries(what: str, repository: Path, commit: str) -> list[_Entry]:
    listed = _git(what, ["-C", str(repository), "ls-tree", "-r", "-z", "-l", "--full-tree", commit], _LOCAL_S)
    found = []
    for line in filter(None, listed.split(b"\0")):
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise CorruptionError(f"{what}: git lists {line[:200]!r}; nothing was unpacked")
        name, mode = entry["name"].decode("utf-8", "backslashreplace"), entry["mode"].decode()
        if mode not in _FILES:
            kind = {"120000": "is a link", "160000": "is a submodule"}.get(mode, "is no regular file")
            raise ConfigError(
                f"{what}: {name!r} {kind}; nothing was unpacked; send the directory with its files: --code DIR"
            )
        found.append(_Entry(name, _FILES[mode], entry["id"].decode(), int(entry["size"])))
    if not found:
        raise ConfigError(f"{what}: the commit has no file")
    members.expect_members(what, [(entry.name, entry.size) for entry in found])
    return found


def _prove(what: str, file: BinaryIO, entries: Sequence[_Entry]) -> None:
    """That git gave every object that it was asked for, in that order and of the listed size."""
    file.seek(0)
    for entry in entries:
        head = file.readline()
        if head != f"{entry.object_id} blob {entry.size}\n".encode():
            raise CorruptionError(f"{what}: {entry.name!r}: git gave {head[:200]!r}; nothing was unpacked")
        file.seek(entry.size, 1)
        if file.read(1) != b"\n":
            raise CorruptionError(f"{what}: {entry.name!r} was cut short; nothing was unpacked")


def _write(file: BinaryIO, entries: Sequence[_Entry], target: Path) -> None:
    file.seek(0)
    for entry in entries:
        file.readline()
        path = target / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as copy:
            for begin in range(0, entry.size, _PIECE):
                copy.write(file.read(min(_PIECE, entry.size - begin)))
        file.read(1)
        path.chmod(entry.mode)


def _git(
    what: str, arguments: Sequence[str], limit_s: float, given: bytes = b"", output: BinaryIO | None = None
) -> bytes:
    """What git prints, or nothing where that goes to a file.

    Raises:
        CorruptionError: it failed; the message has its words.
        DeadlineError: it did not end in time.
    """
    try:
        done = subprocess.run(
            [*_PLAIN, *arguments],
            input=given,
            stdout=output if output is not None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"{what}: git did not end within {limit_s:g} s") from None
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").split("\n")
        said = next((line for line in words if line.startswith(("fatal:", "error:"))), words[0])
        raise CorruptionError(f"{what}: git failed ({done.returncode}): {said}")
    return done.stdout or b""


def main(argv: list[str]) -> int:
    url, commit, scratch, target = argv
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_FILE_BYTES, _MOST_FILE_BYTES))
    try:
        fetch_commit(url, commit, Path(scratch), Path(target))
    except (KtrainError, OSError) as error:
        return unpack.said(error)
    return contract.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
