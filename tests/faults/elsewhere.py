"""Faults that only real processes, stores or devices show: where they are shown. (fault, where, test)."""

from __future__ import annotations

ELSEWHERE: tuple[tuple[str, str, str], ...] = (
    ("worker dies", "SIGKILL to a worker of a launch", "tests/chaos/test_kinds.py"),
    ("worker dies", "SIGKILL at every fault point of a plain run", "tests/integration/test_plain_resume.py"),
    ("worker stopped", "SIGSTOP to a worker of a launch: named as hung, replaced", "tests/chaos/test_kinds.py"),
    ("writer dies", "SIGKILL after every step of a slot's writer", "tests/integration/test_arena_processes.py"),
    ("writer stopped", "a stopped process keeps its slot", "tests/integration/test_arena_processes.py"),
    ("agent dies", "SIGKILL to an agent of a launch", "tests/chaos/test_kinds.py"),
    ("head dies", "SIGKILL to the head of a launch", "tests/chaos/test_kinds.py"),
    ("launcher dies", "SIGKILL to the launcher", "tests/integration/test_launch_local.py"),
    ("any process dies", "SIGKILL to any process at random moments", "tests/chaos/test_random_kills.py"),
    ("node lost", "all processes of a node, and its memory", "tests/integration/test_launch_faults.py"),
    ("all nodes lost", "all processes, and all memory", "tests/chaos/test_kinds.py"),
    ("wire lost", "SIGKILL to Ray's processes on all nodes", "tests/chaos/test_kinds.py"),
    ("wire lost", "Ray's head, raylets and actors, one by one", "tests/integration/test_ray_wire.py"),
    ("bit flip", "slots, manifests and bucket between two launches", "tests/chaos/test_corruption.py"),
    ("bit flip", "found by `ktrain ckpt verify`, with its bytes", "tests/integration/test_launch_ckpt.py"),
    ("EIO of the bucket", "a file in place of the bucket's folder", "tests/chaos/test_kinds.py"),
    ("timeout of the bucket", "an S3 server stopped by SIGSTOP", "tests/chaos/test_kinds.py"),
    ("timeout of the bucket", "a call that never returns is left", "tests/unit/tier/test_deadline.py"),
    ("403 to 503 from the bucket", "what clients make of the answers", "tests/unit/tier/test_answers.py"),
    ("403 to 503 from the bucket", "an S3 server of the tests", "tests/unit/tier/test_bucket_s3.py"),
    ("ENOSPC of the volume", "a real volume that is too small", "tests/integration/test_arena_processes.py"),
    ("attack files", "documents and payloads made to mislead", "tests/attacks/test_format_files.py"),
    ("all of these in any order", "against a model of what must be restorable", "tests/model/test_checkpoint_model.py"),
)
