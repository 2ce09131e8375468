"""Code that is sent: what is packed, that it is the same bytes each time, and that it arrives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktrain.errors import ConfigError, CorruptionError
from ktrain.launcher.code import unpack
from ktrain.launcher.code.archive import pack_code
from ktrain.launcher.code.private import is_private_name
from ktrain.launcher.code.unpack import unpack_code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "code"
    (found / "lib").mkdir(parents=True)
    (found / "train.py").write_text("print(1)\n")
    (found / "lib" / "net.py").write_text("x = 1\n")
    (found / "run.sh").write_text("#!/bin/sh\n")
    (found / "run.sh").chmod(0o755)
    return found


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


def test_pack_takes_every_file_where_there_is_no_git(folder: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "net.pyc").write_bytes(b"x")

    assert pack_code(folder).names == ("lib/net.py", "run.sh", "train.py")


def test_pack_takes_what_git_tracks_or_would_add(folder: Path) -> None:
    git(folder, "init")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "old.py").write_text("")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "a")
    (folder / "old.py").unlink()  # tracked, and not there
    (folder / "new.py").write_text("")
    (folder / "out.log").write_text("")

    assert pack_code(folder).names == (".gitignore", "lib/net.py", "new.py", "run.sh", "train.py")
    assert pack_code(folder / "lib").names == ("net.py",)


def test_pack_leaves_out_what_the_ignore_file_names(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "big.bin").write_bytes(b"x")
    (folder / ".ktrainignore").write_text("# mine\n\ndata/\n*.sh\nlib/n*.py\n.ktrainignore\n")

    assert pack_code(folder).names == ("train.py",)


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ("/train.py", ["lib/net.py", "lib/train.py", "run.sh"]),  # at the top alone
        ("train.py", ["lib/net.py", "run.sh"]),
        ("run.sh/", ["lib/net.py", "lib/train.py", "run.sh", "train.py"]),  # a folder, and it is none
        ("*.py\n!net.py", ["lib/net.py", "run.sh"]),
        ("!net.py\n*.py", ["run.sh"]),  # the last one decides
        ("lib/*\n!/lib/net.py", ["lib/net.py", "run.sh", "train.py"]),
    ],
)
def test_pack_reads_the_ignore_file_as_git_reads_its_own(lines: str, left: list[str], folder: Path) -> None:
    (folder / "lib" / "train.py").write_text("")
    (folder / ".ktrainignore").write_text(f"{lines}\n.ktrainignore\n")

    assert list(pack_code(folder).names) == left


def committed(folder: Path) -> None:
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "a")


def test_pack_goes_into_submodules_and_into_work_trees_that_nobody_added(folder: Path) -> None:
    for name in ("sub", "other"):
        (folder / name).mkdir()
        (folder / name / "a.py").write_text("")
        (folder / name / "a.log").write_text("")
        (folder / name / ".gitignore").write_text("*.log\n")
        committed(folder / name)
    git(folder, "init")
    git(folder, "add", "sub", "train.py")  # as git takes a work tree: by its commit

    assert {"sub/a.py", "other/a.py", "train.py", "lib/net.py"} <= set(pack_code(folder).names)
    assert not any(name.endswith(".log") or ".git/" in name for name in pack_code(folder).names)


def test_pack_refuses_a_submodule_that_is_not_checked_out_unless_it_is_ignored(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.py").write_text("")
    committed(folder / "sub")
    committed(folder)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(folder), str(clone))

    with pytest.raises(ConfigError, match="submodule sub is not checked out; run `git submodule update --init`"):
        pack_code(clone)
    (clone / ".ktrainignore").write_text("sub/\n")
    assert "train.py" in pack_code(clone).names


def test_pack_does_not_take_all_files_where_git_fails(folder: Path) -> None:
    (folder / ".git").write_text("gitdir: nowhere\n")

    with pytest.raises(ConfigError, match="git cannot list its files: fatal: "):
        pack_code(folder)


def test_pack_without_git_says_that_ignore_files_of_git_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git(folder, "init")
    (folder / ".gitignore").write_text("run.sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    packed = pack_code(folder)

    assert "run.sh" in packed.names
    assert len(packed.warnings) == 1 and "there is no git to ask" in packed.warnings[0]


def test_pack_warns_of_what_looks_like_a_secret_and_says_how_to_leave_it_out(folder: Path) -> None:
    (folder / ".env").write_text("A=1\n")
    (folder / ".env.example").write_text("A=\n")
    (folder / "lib" / "deploy").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")
    packed = pack_code(folder)

    assert [line.split(": ")[1].split()[0] for line in packed.warnings] == [".env", "lib/deploy"]
    assert all("a line /" in line and "--secret NAME=SECRET:KEY" in line for line in packed.warnings)
    (folder / ".ktrainignore").write_text("/.env\n/lib/deploy\n")
    assert pack_code(folder).warnings == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/.env", True), (".env.local", True), ("prod.env", True), ("id_ed25519", True), ("id_ed25519.pub", False),
        ("x/.aws/config", True), ("cert.PEM", True), ("credentials.json", True), ("secrets.toml", True),
        ("environment.py", False), ("secrets.py.example", False), ("keys.py", False), ("tokenizer.json", False),
    ],
)  # fmt: skip
def test_private_name_is_one_that_usually_holds_a_secret(name: str, expected: bool) -> None:
    assert is_private_name(name) is expected


@pytest.mark.parametrize("name", ["RUN.sh", "Lib"])
def test_pack_refuses_names_that_differ_by_case_alone(name: str, folder: Path) -> None:
    (folder / name).write_text("")

    with pytest.raises(ConfigError, match="is there twice|a file and a folder"):
        pack_code(folder)


def test_pack_of_the_same_files_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    for name in reversed(pack_code(folder).names):
        path = other / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / name).read_bytes())
        os.utime(path, (1, 1))
    (other / "run.sh").chmod(0o700)
    (other / "train.py").chmod(0o600)

    assert pack_code(other).sha256 == pack_code(folder).sha256
    (other / "train.py").write_text("print(2)\n")
    assert pack_code(other).sha256 != pack_code(folder).sha256


def test_pack_refuses_links_with_their_path(folder: Path) -> None:
    (folder / "lib" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="lib/secret is a link"):
        pack_code(folder)
    (folder / "lib" / "secret").unlink()
    (folder / "more").symlink_to(folder / "lib", target_is_directory=True)
    with pytest.raises(ConfigError, match="more is a link"):
        pack_code(folder)


def test_pack_refuses_what_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match="pipe is no regular file"):
        pack_code(folder)


def test_pack_refuses_a_name_that_would_not_be_unpacked(folder: Path) -> None:
    (folder / "a\nb.py").write_text("")
    with pytest.raises(ConfigError, match="has a name that no file of code has"):
        pack_code(folder)


def test_pack_beyond_its_cap_is_refused_with_the_largest_files(folder: Path) -> None:
    (folder / "big.bin").write_bytes(bytes(5000))
    with pytest.raises(
        ConfigError, match=r"4 files have .*, expected at most .*; the largest are big\.bin \(5000 bytes\)"
    ):
        pack_code(folder, most_bytes=4000)


def test_pack_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file is left"):
        pack_code(tmp_path)
    with pytest.raises(ConfigError, match="expected a directory"):
        pack_code(tmp_path / "nope")


def test_unpack_gives_back_the_files_and_who_may_run_them(folder: Path, tmp_path: Path) -> None:
    packed = pack_code(folder)
    archive, target = tmp_path / "code.zip", tmp_path / "target"
    archive.write_bytes(packed.data)

    assert unpack_code(archive, packed.sha256, target) == 3
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {*packed.names, ".ktrain-code"}
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in packed.names)
    assert os.access(target / "run.sh", os.X_OK) and not os.access(target / "train.py", os.X_OK)
    assert pack_code(target).sha256 == packed.sha256


def test_unpack_of_other_bytes_is_refused_before_any_is_written(folder: Path, tmp_path: Path) -> None:
    packed = pack_code(folder)
    archive, target = tmp_path / "code.zip", tmp_path / "target"
    archive.write_bytes(packed.data[:-1] + b"x")

    with pytest.raises(CorruptionError, match="expected SHA-256"):
        unpack_code(archive, packed.sha256, target)
    assert not target.exists()


def test_unpack_that_was_cut_off_begins_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_code(folder)
    archive, target = tmp_path / "code.zip", tmp_path / "target"
    archive.write_bytes(packed.data)

    def fails(path: Path, mode: int) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "chmod", fails)
        with pytest.raises(OSError, match="disk is gone"):
            unpack_code(archive, packed.sha256, target)
    assert [path.name for path in target.rglob("*.py")] == ["net.py"]
    (target / "link").symlink_to(folder)

    assert unpack_code(archive, packed.sha256, target) == 3
    assert not (target / "link").exists() and (folder / "train.py").exists()


def test_unpack_joins_the_parts_of_an_archive_in_their_order(folder: Path, tmp_path: Path) -> None:
    packed = pack_code(folder)
    parts = [tmp_path / "part.0", tmp_path / "part.1"]
    parts[0].write_bytes(packed.data[:100])
    parts[1].write_bytes(packed.data[100:])
    names = [str(part) for part in parts]

    assert unpack.main([*names, packed.sha256, str(tmp_path / "a")]) == 0
    assert unpack.main([*reversed(names), packed.sha256, str(tmp_path / "b")]) == 3
    assert unpack.main([names[0], packed.sha256, str(tmp_path / "b")]) == 3
    assert (tmp_path / "a" / "train.py").is_file() and not (tmp_path / "b").exists()


def test_unpack_into_a_folder_that_holds_something_is_refused(folder: Path, tmp_path: Path) -> None:
    packed = pack_code(folder)
    archive = tmp_path / "code.zip"
    archive.write_bytes(packed.data)

    with pytest.raises(ConfigError, match="is not empty"):
        unpack_code(archive, packed.sha256, folder)


def test_unpack_as_the_init_container_runs_it(folder: Path, tmp_path: Path) -> None:
    packed = pack_code(folder)
    archive = tmp_path / "code.zip"
    archive.write_bytes(packed.data)
    command = [sys.executable, "-P", "-m", "ktrain.launcher.code.unpack", str(archive)]

    done = subprocess.run([*command, packed.sha256, str(tmp_path / "a")], capture_output=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "a" / "train.py").is_file()
    done = subprocess.run([*command, "0" * 64, str(tmp_path / "b")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.startswith("ktrain: code archive")
