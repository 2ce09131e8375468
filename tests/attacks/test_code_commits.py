"""Commits that a stranger made, or a server that lies: each is refused, and nothing is written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrain.errors import ConfigError, CorruptionError, KtrainError, UnavailableError
from ktrain.launcher.code import git, members
from ktrain.launcher.code.git import fetch_commit


class Repository:
    """A repository whose trees are written object by object, as no honest git would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.run("init", "--quiet", "--bare", "--template=")
        self.run("config", "uploadpack.allowAnySHA1InWant", "true")

    @property
    def url(self) -> str:
        return f"file://{self.folder}"

    def run(self, *arguments: str, given: bytes = b"") -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(self.folder), *names, *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout.decode().strip()

    def blob(self, data: bytes) -> str:
        return self.run("hash-object", "-w", "--stdin", given=data)

    def tree(self, *entries: tuple[str, str, str]) -> str:
        """Of (mode, name, id of the object), sorted as git wants it, whatever the names are."""
        ordered = sorted(entries, key=lambda entry: entry[1] + ("/" if entry[0] == "40000" else ""))
        data = b"".join(f"{mode} {name}".encode() + b"\0" + bytes.fromhex(oid) for mode, name, oid in ordered)
        return self.run("hash-object", "-t", "tree", "-w", "--literally", "--stdin", given=data)

    def commit(self, *entries: tuple[str, str, str]) -> str:
        return self.run("commit-tree", "-m", "a", self.tree(*entries))

    def files(self, **files: bytes) -> str:
        return self.commit(*(("100644", name.replace("_dot_", "."), self.blob(data)) for name, data in files.items()))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "origin")


def fetch(repository: Repository, commit: str, tmp_path: Path) -> int:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return fetch_commit(repository.url, commit, scratch, tmp_path / "target", protocol="file")


def refused(repository: Repository, commit: str, tmp_path: Path) -> KtrainError:
    with pytest.raises(KtrainError) as caught:
        fetch(repository, commit, tmp_path)
    assert not (tmp_path / "target").exists() and not list((tmp_path / "scratch").iterdir())
    return caught.value


def evil(mode: str, name: str) -> Callable[[Repository], str]:
    def make(repository: Repository) -> str:
        blob = repository.blob(b"/etc/passwd")
        return repository.commit(("100644", "good.py", blob), (mode, name, blob))

    return make


def evil_folder(name: str) -> Callable[[Repository], str]:
    def make(repository: Repository) -> str:
        below = repository.tree(("100644", "config", repository.blob(b"x")))
        return repository.commit(("40000", name, below))

    return make


# Refused by git's own proof of what it was sent, or by ours: which of them was first does not matter.
HOSTILE: dict[str, Callable[[Repository], str]] = {
    "above the folder": evil_folder(".."),
    "here": evil_folder("."),
    "a folder of git": evil_folder(".git"),
    "a folder of git by case": evil_folder(".GIT"),
    "a path in a name": evil("100644", "a/b"),
    "above, in a name": evil("100644", "../evil"),
    "no name": evil("100644", ""),
    "a line end": evil("100644", "a\nb"),
    "a backslash": evil("100644", "..\\evil"),
    "a drive": evil("100644", "C:evil"),
    "a link": evil("120000", "link"),
    "twice": lambda repository: repository.commit(*[("100644", "a", repository.blob(b"x"))] * 2),
    "twice by case": evil("100644", "GOOD.py"),
    "the mark of a target": evil("100644", members.MARK),
    "nothing": lambda repository: repository.commit(),
    "no commit": lambda repository: repository.tree(("100644", "a", repository.blob(b"x"))),
    "a file": lambda repository: repository.blob(b"x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_commit_is_refused_and_writes_nothing(name: str, repository: Repository, tmp_path: Path) -> None:
    commit = HOSTILE[name](repository)

    assert isinstance(refused(repository, commit, tmp_path), ConfigError | CorruptionError | UnavailableError)


@pytest.mark.parametrize(("mode", "words"), [("120000", "is a link"), ("160000", "is a submodule")])
def test_link_or_submodule_is_refused_in_words(mode: str, words: str, repository: Repository, tmp_path: Path) -> None:
    blob = repository.blob(b"lib")
    commit = repository.commit(("100644", "a.py", blob), (mode, "odd", "1" * 40 if mode == "160000" else blob))

    assert words in str(refused(repository, commit, tmp_path))


def test_commit_with_more_bytes_than_allowed_is_refused(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository.files(zeros=bytes(1 << 20))
    monkeypatch.setattr(members, "MOST_BYTES", 1000)

    assert "expected at most 1000" in str(refused(repository, commit, tmp_path))


def test_commit_that_the_server_has_not_is_said_with_what_to_look_at(repository: Repository, tmp_path: Path) -> None:
    repository.files(a=b"x")
    error = refused(repository, "1" * 40, tmp_path)

    assert isinstance(error, UnavailableError) and "is the commit pushed" in str(error)


def test_tag_is_not_taken_for_the_commit_it_names(repository: Repository, tmp_path: Path) -> None:
    commit = repository.files(a=b"x")
    repository.run("tag", "-a", "v1", "-m", "v1", commit)

    assert "that is no commit" in str(refused(repository, repository.run("rev-parse", "v1"), tmp_path))


def test_server_of_another_protocol_is_not_asked(repository: Repository, tmp_path: Path) -> None:
    commit = repository.files(a=b"x")
    (tmp_path / "scratch").mkdir()

    with pytest.raises(UnavailableError, match="not allowed"):
        fetch_commit(repository.url, commit, tmp_path / "scratch", tmp_path / "target")


def test_attributes_filters_and_hooks_of_a_commit_do_nothing(repository: Repository, tmp_path: Path) -> None:
    attributes = b"* text eol=crlf ident filter=lfs\nsecret.py export-ignore\n"
    commit = repository.files(_dot_gitattributes=attributes, secret_dot_py=b"$Id$\n")

    assert fetch(repository, commit, tmp_path) == 2
    assert (tmp_path / "target" / "secret.py").read_bytes() == b"$Id$\n"


def test_git_that_gives_another_object_is_found(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the listing and the bytes are of two minds, no byte is written."""
    commit = repository.files(a=b"xyz")
    real = git._entries
    wrong = repository.blob(b"zyx!")
    monkeypatch.setattr(
        git,
        "_entries",
        lambda *given: [git._Entry(entry.name, entry.mode, wrong, entry.size) for entry in real(*given)],
    )

    assert isinstance(refused(repository, commit, tmp_path), CorruptionError)
