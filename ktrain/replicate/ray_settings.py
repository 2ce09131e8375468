"""What every Ray process of a run is started with: nothing of Ray's defaults that matters is left to chance.

The numbers behind the choices are in ADR 0005.
"""

from __future__ import annotations

from pathlib import Path

from ktrain.base.settings import child_environment
from ktrain.replicate.landing import IN_FLIGHT, PULL_NBYTES

# Pieces in flight as sender and as receiver, each with room for the piece that is just being freed.
STORE_NBYTES = 3 * IN_FLIGHT * PULL_NBYTES
HEAD_STORE_NBYTES = 80 << 20  # Ray refuses less; nothing is ever put there and its pages are never touched


def environment(token_file: Path) -> dict[str, str]:
    """The whole environment for every Ray process of ours.

    What else is set for Ray belongs to another one (the job's own, or the cluster that this pod is part of).
    """
    inherited = {key: text for key, text in child_environment({}).items() if not key.startswith("RAY_")}
    return {**inherited, **_own(token_file)}


def _own(token_file: Path) -> dict[str, str]:
    return {
        # Explicit, because a token file in the user's home would switch it on for some processes only.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A silent node is noticed after about 9 s (default 65 s).
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        # A raylet without its head ends itself after this; the next cluster gets new ones anyway.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        # A full store has to fail where we see it and not go to a disk behind our back.
        "RAY_automatic_object_spilling_enabled": "0",
        # No extra workers: a node runs one actor.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_task_events_report_interval_ms": "0",
    }


def head_arguments(*, host: str, port: int, folder: Path) -> list[str]:
    """Arguments of `ray start` for the run's head: a GCS and a raylet that runs nothing."""
    return [
        "--head",
        f"--port={port}",
        "--include-dashboard=false",
        "--dashboard-port=0",
        "--no-monitor",
        *_common(host, folder, HEAD_STORE_NBYTES),
    ]


def node_arguments(*, head: str, host: str, name: str, folder: Path) -> list[str]:
    """Arguments of `ray start` for a node that joins the head at `head` (`host:port`)."""
    return [f"--address={head}", f"--node-name={name}", *_common(host, folder, STORE_NBYTES)]


def _common(host: str, folder: Path, store_nbytes: int) -> list[str]:
    return [
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={host}",
        f"--temp-dir={folder}",
        "--num-cpus=0",
        "--num-gpus=0",
        f"--object-store-memory={store_nbytes}",
        "--include-log-monitor=false",
        # 0 is "any free one": fixed ranges collide between runs, and between nodes on one machine.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
    ]
