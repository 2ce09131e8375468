"""A checkpoint can be listed and verified on a machine that has none of torch, ray, fsspec and numpy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ktrain.format import record as records

GOLDEN = Path(__file__).parents[2] / "golden" / "format-1"
PROGRAM = """
import sys
for name in ("torch", "ray", "fsspec", "numpy", "s3fs", "kubernetes"):
    sys.modules[name] = None  # every import of it fails
from ktrain.cli.main import main
main()
"""


def run_cli(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def golden_run(folder: Path) -> Path:
    """A run directory around the golden checkpoint."""
    shutil.copytree(GOLDEN, folder)
    commit = next(path for path in folder.rglob("commit-*.json"))
    run_id = records.CommitRecord.from_bytes(commit.read_bytes()).identity.run
    (folder / "run.json").write_text(f'{{"format": 1, "id": "{run_id}", "created": 0}}')
    return folder


def test_ckpt_without_torch_ray_fsspec_lists_and_verifies(tmp_path: Path) -> None:
    run = golden_run(tmp_path / "run")
    listed = run_cli("ckpt", "ls", str(run), "--output", "json")
    assert listed.returncode == 0, listed.stderr
    assert '"bucket"' in listed.stdout
    verified = run_cli("ckpt", "verify", str(run))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "proven" in verified.stdout


def test_ckpt_verify_with_flipped_bit_names_the_byte_range(tmp_path: Path) -> None:
    run = golden_run(tmp_path / "run")
    payload = next(run.rglob("rank-00001.safetensors"))
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    verified = run_cli("ckpt", "verify", str(run))
    assert verified.returncode == 3
    assert "rank 1" in verified.stdout + verified.stderr
    assert f"{len(data)}" in verified.stdout + verified.stderr


def test_ckpt_verbs_without_torch_ray_fsspec_work(tmp_path: Path) -> None:
    run = str(golden_run(tmp_path / "run"))
    for verb, code, said in (
        (("show", run), 0, "model/weight"),
        (("diff", run, "--step", "10", "--step", "10"), 0, "are equal"),
        (("pin", run, "--step", "10"), 0, "is pinned"),
        (("gc", run), 0, "nothing to remove"),
        (("repair", run), 0, "is whole"),
        (("rm", run, "--step", "10", "--dry-run", "--force", "pinned", "--force", "last"), 0, "would remove"),
        (("rm", run, "--step", "10", "--yes", "--force", "pinned"), 3, "--force last"),
    ):
        done = run_cli("ckpt", *verb)
        assert done.returncode == code, (verb, done.stdout, done.stderr)
        assert said in done.stdout + done.stderr
