"""The only reader and writer of the environment. An explicit argument wins over everything here."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ktrain.base import contract
from ktrain.errors import ConfigError

_DEFAULT_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All timeouts, derived from one number: how long a healthy job may be silent (`patience_s`).

    The hierarchy (a beat is much shorter than a lease, a lease shorter than a step deadline, a step deadline
    shorter than a start) holds by construction, so that nobody has to tune it by hand.
    """

    patience_s: float = _DEFAULT_PATIENCE_S

    @property
    def beat_s(self) -> float:
        """Interval of heartbeats when nothing is new."""
        return min(0.5, self.patience_s / 40)

    @property
    def call_s(self) -> float:
        """One call on the control channel."""
        return max(2.0, self.patience_s / 6)

    @property
    def lease_s(self) -> float:
        """Silence after which a node counts as lost."""
        return max(3.0, self.patience_s / 6)

    @property
    def free_s(self) -> float:
        """From the word that its memory is not needed until a node has given it back: it ends its wire before."""
        return max(20.0, self.lease_s)

    @property
    def step_s(self) -> float:
        """Silence between two steps after which a rank counts as hung."""
        return self.patience_s

    @property
    def start_s(self) -> float:
        """From the start of a worker to its first step (imports, build, restore)."""
        return max(60.0, 4 * self.patience_s)

    @property
    def restore_s(self) -> float:
        """Agreement and transfer of one restore round."""
        return max(60.0, 4 * self.patience_s)

    @property
    def storage_s(self) -> float:
        """One call to a store, on top of what its bytes need at 1 MB/s."""
        return max(5.0, self.patience_s / 2)

    @property
    def drain_s(self) -> float:
        """How long nothing may move in a drain, the one that `close()` waits for included, before it is given up."""
        return max(60.0, 5 * self.patience_s)

    @property
    def stop_s(self) -> float:
        """From a request to stop until processes are ended."""
        return max(30.0, self.patience_s)


class Spread(StrEnum):
    """Whether a restore reads each byte of the bucket once and passes it on between the nodes."""

    AUTO = "auto"  # where it is estimated to be faster
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a process finds in its environment when it was started as a worker; absent values are None."""

    run: str | None
    epoch: int | None
    node: str | None
    agent: str | None
    token_file: str | None
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_index: int


def env(name: str, default: str | None = None) -> str | None:
    """One variable of the environment; an empty one counts as unset."""
    return os.environ.get(name) or default


_SECRET_NAME = re.compile(  # whole words of a name: TOKENIZERS_PARALLELISM and MAX_TOKENS are no secrets
    r"(^|_)(SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE)_?KEY)(_|$)|(^|_)TOKEN$", re.IGNORECASE
)
_SHORTEST_SECRET = 6  # what is shorter would hide half of a log


def reads_like_secret(name: str) -> bool:
    """Whether a variable of this name is for secrets."""
    return _SECRET_NAME.search(name) is not None


def secret_values() -> tuple[str, ...]:
    """The values of this process's variables whose names read like secrets: what is not to be shown."""
    found = {value for name, value in os.environ.items() if reads_like_secret(name) and len(value) >= _SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """A copy of this process's environment with `extra` on top."""
    return {**os.environ, **extra}


def set_environment(values: Mapping[str, str]) -> None:
    """Sets variables for libraries that read them at import (Ray, torch); call before importing these."""
    os.environ.update(values)


def _integer(name: str, default: int) -> int:
    text = env(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"environment variable {name}: expected an integer, found {text!r}; unset or correct it"
        ) from error


def worker_settings() -> WorkerSettings:
    """Reads torch's and ktrain's worker variables.

    Raises:
        ConfigError: a variable is no integer.
    """
    epoch = _integer(contract.ENV_EPOCH, 0)
    return WorkerSettings(
        run=env(contract.ENV_RUN),
        epoch=epoch or None,
        node=env(contract.ENV_NODE),
        agent=env(contract.ENV_AGENT),
        token_file=env(contract.ENV_TOKEN_FILE),
        rank=_integer("RANK", 0),
        local_rank=_integer("LOCAL_RANK", 0),
        world_size=_integer("WORLD_SIZE", 1),
        local_world_size=_integer("LOCAL_WORLD_SIZE", _integer("WORLD_SIZE", 1)),
        node_index=_integer("GROUP_RANK", 0),
    )


@dataclass(frozen=True, slots=True)
class PodSettings:
    """What a container of a job's pods finds in its environment (ADR 0038)."""

    role: str  # of the pod: head or worker
    run: str
    head: str  # address, "tcp:HOST:PORT"
    head_port: int
    job_file: Path
    token_file: Path
    volume: Path
    work: Path
    address: str  # of the pod
    host: str
    job_index: int
    pod_index: int


def pod_settings() -> PodSettings:
    """Reads what the rendered manifests set.

    Raises:
        ConfigError: a variable is missing, or is not what it should be.
    """
    head = _in_pod(contract.ENV_HEAD, "tcp:HOST:PORT")
    found = re.fullmatch(r"tcp:[^:\s]+:(\d{1,5})", head)
    if found is None or not 0 < int(found[1]) < 65536:
        raise _odd_in_pod(contract.ENV_HEAD, "tcp:HOST:PORT", head)
    return PodSettings(
        role=_in_pod(contract.ENV_ROLE, "head or worker"),
        run=_in_pod(contract.ENV_RUN, "the URL of the run"),
        head=head,
        head_port=int(found[1]),
        job_file=_pod_path(contract.ENV_JOB),
        token_file=_pod_path(contract.ENV_TOKEN_FILE),
        volume=_pod_path(contract.ENV_VOLUME),
        work=path_in_pod(contract.POD_WORK),
        address=_pod_address(),
        host=_in_pod(contract.ENV_HOST, "the name of a machine"),
        job_index=_pod_index(contract.ENV_JOB_INDEX),
        pod_index=_pod_index(contract.ENV_POD_INDEX),
    )


def path_in_pod(path: str) -> Path:
    """Where an absolute path of this container lies: the path itself, but in a pod that runs as processes (ADR 0036).

    There it is a folder of this machine, the same one for all containers that mount it.
    """
    root = env(contract.ENV_ROOT)
    return Path(path) if root is None else Path(root, path.lstrip("/")).resolve()


def hosts_file() -> Path | None:
    """The file that stands for the name service of pods that run as processes; None where there is a real one."""
    path = env(contract.ENV_HOSTS)
    return None if path is None else Path(path)


def _pod_path(name: str) -> Path:
    """A path that the manifest names; whoever runs pods as processes has put the real one in its place."""
    path = Path(_in_pod(name, "a path"))
    return path if env(contract.ENV_ROOT) is None else path.resolve()


def _in_pod(name: str, expected: str) -> str:
    text = env(name)
    if text is None:
        raise _odd_in_pod(name, expected, None)
    return text


def _odd_in_pod(name: str, expected: str, found: str | None) -> ConfigError:
    said = "none" if found is None else repr(found)
    return ConfigError(
        f"environment variable {name}: expected {expected}, found {said}; pods of a rendered job have it (`ktrain "
        "launch --backend kubernetes --dry-run` shows them)"
    )


def _pod_address() -> str:
    """The pod's address. Of IPv4: the control channel and the store of torch listen on it by number."""
    text = _in_pod(contract.ENV_POD_IP, "an IPv4 address")
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise _odd_in_pod(contract.ENV_POD_IP, "an IPv4 address", text) from None


def _pod_index(name: str) -> int:
    text = _in_pod(name, "an index, 0 or more")
    if not (text.isascii() and text.isdecimal()):
        raise _odd_in_pod(name, "an index, 0 or more", text)
    return int(text)


def timeouts() -> Timeouts:
    """Timeouts from `KTRAIN_PATIENCE_S`, or the defaults."""
    text = env(contract.ENV_PATIENCE)
    if text is None:
        return Timeouts()
    try:
        patience = float(text)
    except ValueError as error:
        raise ConfigError(
            f"environment variable {contract.ENV_PATIENCE}: expected seconds, found {text!r}; unset or correct it"
        ) from error
    if not 0 < patience < math.inf:
        raise ConfigError(
            f"environment variable {contract.ENV_PATIENCE}: expected more than 0 s and an end, found {text!r}"
        )
    return Timeouts(patience_s=patience)


def drain_bytes_per_s() -> float | None:
    """`KTRAIN_DRAIN_BYTES_PER_S`: what one node's drains may send to the bucket; None means no limit.

    Raises:
        ConfigError: it is no positive number.
    """
    text = env(contract.ENV_DRAIN_RATE)
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(
            f"environment variable {contract.ENV_DRAIN_RATE}: expected bytes per second, more than 0, found {text!r}; "
            "unset or correct it"
        )
    return rate


def restore_spread() -> Spread:
    """`KTRAIN_RESTORE_SPREAD`, as the head finds it; `auto` where it is unset.

    Raises:
        ConfigError: it is none of the three words.
    """
    text = env(contract.ENV_SPREAD) or Spread.AUTO
    try:
        return Spread(text)
    except ValueError as error:
        raise ConfigError(
            f"environment variable {contract.ENV_SPREAD}: expected {', '.join(Spread)}, found {text!r}; unset or "
            "correct it"
        ) from error


def volume_root() -> Path:
    """Folder of the memory tier on this machine: `KTRAIN_VOLUME`, else a folder of this user in /dev/shm.

    Where there is no /dev/shm (not Linux) the temporary directory is used: it survives processes, only slower.
    """
    chosen = env(contract.ENV_VOLUME)
    if chosen is not None:
        return Path(chosen)
    shm = Path("/dev/shm")  # noqa: S108 -- the memory-backed volume is meant; the folder below is private (0700)
    base = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    return base / f"ktrain-{os.getuid()}"
