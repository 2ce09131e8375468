"""From what a person typed to a job: everything that can be refused is refused here, before anything starts."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ktrain.base import contract, ids, settings
from ktrain.base.job import LaunchSpec, WorkDir, canonical_url, local_path
from ktrain.errors import ConfigError
from ktrain.launcher.faults import parse_fault

_MOST_NODES = 200  # local nodes have addresses 127.0.0.2 and up


@dataclass(frozen=True, slots=True)
class Wish:
    """A launch as it was asked for."""

    script: str
    args: tuple[str, ...] = ()
    run: str | None = None
    nodes: int = 1
    workers_per_node: int = 1
    max_restarts: int = 3
    patience_s: float | None = None
    faults: tuple[str, ...] = field(default=())
    spares: int = 0


def default_run(script: str) -> str:
    """`runs/<script stem>`: the same script again continues its run."""
    return f"runs/{Path(script).stem}"


def plan_job(wish: Wish) -> LaunchSpec:
    """Checks a wish and makes it whole.

    Raises:
        ConfigError: something in it cannot be; nothing was changed, except that a local run's directory exists now.
    """
    script = Path(wish.script)
    if not script.is_file():
        raise ConfigError(
            f"script {wish.script!r}: there is no such file in {os.getcwd()}; give the path of a Python file"
        )
    _expect_range("--nodes", wish.nodes, 1, _MOST_NODES)
    _expect_range("--spares", wish.spares, 0, _MOST_NODES - wish.nodes)
    _expect_range("--workers-per-node", wish.workers_per_node, 1, 1024)
    _expect_range("--max-restarts", wish.max_restarts, 0, 1_000_000)
    patience_s = settings.timeouts().patience_s if wish.patience_s is None else wish.patience_s
    if not (math.isfinite(patience_s) and patience_s >= 1):
        raise ConfigError(f"--patience: expected at least 1 s, found {patience_s:g}")
    for text in wish.faults:
        parse_fault(text, nodes=wish.nodes, world_size=wish.nodes * wish.workers_per_node)
    run = canonical_url(wish.run or default_run(wish.script))
    work = WorkDir.of_run(run)
    path = local_path(run)
    if path is not None:
        _expect_writable(path)
    return LaunchSpec(
        launch_id=ids.random_id(),
        run=run,
        script=str(script.absolute()),
        args=wish.args,
        nodes=wish.nodes,
        workers_per_node=wish.workers_per_node,
        max_restarts=wish.max_restarts,
        patience_s=patience_s,
        python=sys.executable,
        cwd=os.getcwd(),
        volume_root=str(settings.volume_root()),
        log_dir=str((path if path is not None else work.path) / contract.LOGS_DIR),
        faults=wish.faults,
        spares=wish.spares,
    )


def _expect_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}: expected {least} to {most}, found {value}")


def _expect_writable(path: Path) -> None:
    probe = path / f".probe-{ids.random_id(4)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run {path}: it cannot be written ({error.strerror}); choose another --run") from error
