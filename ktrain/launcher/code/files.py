"""Which files of a directory are its code: what git knows or would add, minus what the ignore file names."""

from __future__ import annotations

import fnmatch
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ktrain.errors import ConfigError
from ktrain.launcher.code.members import MARK

IGNORE_FILE = ".ktrainignore"
_NEVER = (".git", MARK, "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints")
_GIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """Relative names with `/`, sorted by their bytes, and what the user should know of the choice."""

    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One line of the ignore file; the last one that matches a name decides."""

    text: str
    takes_back: bool  # began with "!"
    is_rooted: bool  # began with "/"
    is_folder: bool  # ended with "/"

    def matches(self, name: str) -> bool:
        parts = name.split("/")
        paths = ["/".join(parts[: at + 1]) for at in range(len(parts))]
        if self.is_folder:
            parts, paths = parts[:-1], paths[:-1]
        texts = paths if self.is_rooted else (*parts, *paths)
        return any(fnmatch.fnmatchcase(text, self.text) for text in texts)


def choose_files(folder: Path) -> Chosen:
    """The files to send, links and what else is no regular file among them: these are refused, not left out.

    Submodules and other work trees inside are gone into, by their own ignore files of git.

    Raises:
        ConfigError: git cannot say which files there are, or a submodule is not checked out.
    """
    patterns = _patterns(folder)
    warnings = []
    if not _is_below_git(folder):
        found = _all_files(folder)
    else:
        try:
            found = _git_files(folder, "", patterns)
        except FileNotFoundError:
            found = _all_files(folder)
            warnings.append(
                f"code {folder}: there is no git to ask which files are to be sent, so all are, also those that "
                f".gitignore names; install git, or name them in {IGNORE_FILE}"
            )
    kept = {name for name in found if not _is_ignored(name, patterns)}
    return Chosen(tuple(sorted(kept, key=lambda name: name.encode("utf-8", "surrogateescape"))), tuple(warnings))


def _is_below_git(folder: Path) -> bool:
    whole = folder.resolve()
    return any((parent / ".git").exists() for parent in (whole, *whole.parents))


def _git_files(folder: Path, prefix: str, patterns: list[_Pattern]) -> list[str]:
    """What git tracks, and what it would add, of this work tree and of those below it."""
    found: list[str] = []
    for name in _listed(folder):
        full = prefix + name.rstrip("/")
        path = folder / name
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue  # tracked and deleted
        if not stat.S_ISDIR(mode):
            found.append(full)
        elif _is_ignored(f"{full}/.", patterns):
            continue
        elif (path / ".git").exists():
            found += _git_files(path, f"{full}/", patterns)
        elif not any(path.iterdir()):
            raise ConfigError(
                f"code {folder}: the submodule {full} is not checked out; run `git submodule update --init`, or leave "
                f"it out in {IGNORE_FILE}"
            )
    return found


def _listed(folder: Path) -> list[str]:
    """As git says it; a submodule is one name, another work tree one that ends with "/".

    Raises:
        FileNotFoundError: there is no git.
        ConfigError: git fails: that it cannot tell does not mean that all files are meant.
    """
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"code {folder}: git listed no files within {_GIT_S:g} s; give another") from None
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"]
        raise ConfigError(f"code {folder}: git cannot list its files: {words[0]}; mend that, or give another")
    return [name for name in done.stdout.decode("utf-8", "surrogateescape").split("\0") if name]


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _patterns(folder: Path) -> list[_Pattern]:
    try:
        lines = (folder / IGNORE_FILE).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            plain = text.removeprefix("!")
            found.append(_Pattern(plain.strip("/"), text[0] == "!", plain[:1] == "/", plain[-1:] == "/"))
    return found


def _is_ignored(name: str, patterns: list[_Pattern]) -> bool:
    if any(part in _NEVER for part in name.split("/")):
        return True
    last = next((pattern for pattern in reversed(patterns) if pattern.matches(name)), None)
    return last is not None and not last.takes_back
