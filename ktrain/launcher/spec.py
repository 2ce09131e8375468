"""What a job on a cluster is: typed by a person, checked here, rendered by `render`, stored to render it again.

Every part refuses what cannot be when it is made, so that a JobSpec that exists is one that can be rendered. What
depends on the cluster (a queue, an API) is not decided here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

from ktrain.base import contract, ids
from ktrain.base.settings import reads_like_secret
from ktrain.base.urls import local_path, public_url, require_public, without_slash
from ktrain.errors import ConfigError
from ktrain.launcher import accelerators
from ktrain.launcher.accelerators import Devices, Slices
from ktrain.launcher.quantity import GIB, MIB

Bytes = NewType("Bytes", int)  # a number, or a quantity such as "40Gi" where it is typed

MOST_NAME = 40  # pods are called NAME-worker-JOB-INDEX, and labels end at 63
_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]+")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_GIT_URL = re.compile(r"https://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~-]+)+")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SECRET_OPTION = re.compile(  # at its end, so that --password-file is none; a tokenizer's --pad-token is none either
    r"(^|_)(SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE|SECRET)_?KEY|(ACCESS|API|AUTH|BEARER|GITHUB|HF|HUB|WANDB)_TOKEN)$",
    re.IGNORECASE,
)
_OURS = re.compile(
    r"KTRAIN_|TPU_WORKER_|MEGASCALE_"
    r"|(TPU_ACCELERATOR_TYPE|TPU_TOPOLOGY|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|HOME)$"
)
_OWN_PATHS = (contract.POD_DIR, "/dev", "/proc", "/sys", "/var/run/secrets")


class GangKind(StrEnum):
    """How the pods of a job are admitted whole or not at all."""

    AUTO = "auto"
    KUEUE = "kueue"
    NATIVE = "native"  # Workload and PodGroup of Kubernetes itself
    VOLCANO = "volcano"
    KAI = "kai"
    COSCHEDULING = "coscheduling"
    BARRIER = "none"  # no scheduler helps: pods meet at the head, or give their nodes back


class Spot(StrEnum):
    """Which pods may run on nodes that the provider takes back."""

    NONE = "none"
    WORKERS = "workers"
    ALL = "all"


class Scope(StrEnum):
    """What the memory tier's volume belongs to, and so what it survives."""

    AUTO = "auto"  # the node where it lends memory that suffices, else the pod
    POD = "pod"
    NODE = "node"  # the node, by an administrator's node agent
    MTC = "mtc"  # the node, by GKE's multi-tier checkpointing driver


class Way(StrEnum):
    """How an archive of code gets to the pods (ADR 0043)."""

    CONFIG_MAP = "config-map"  # one, or several that carry its parts
    BUCKET = "bucket"  # beside the run


class TopologyMode(StrEnum):
    REQUIRED = "required"
    PREFERRED = "preferred"


def _expect(name: str, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _expect_range(name: str, value: float, least: float, most: float) -> None:
    _expect(name, least <= value <= most, f"{least:,g} to {most:,g}", value)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the memory tier of a node holds, from which its volume is sized."""

    state: Bytes  # bytes of the state of one node's ranks
    replicas: int = 1  # copies that other nodes keep
    slots: int = 3
    scope: Scope = Scope.POD

    def __post_init__(self) -> None:
        _expect("memory.state", self.state > 0, "bytes such as 40Gi", self.state)
        _expect_range("memory.replicas", self.replicas, 0, 8)
        _expect_range("memory.slots", self.slots, 2, 16)


@dataclass(frozen=True, slots=True)
class Topology:
    """One domain (the nodes with one value of a label) for all workers."""

    label: str
    mode: TopologyMode = TopologyMode.REQUIRED

    def __post_init__(self) -> None:
        _expect("placement.topology.label", _is_label_key(self.label), "the key of a node label", self.label)


@dataclass(frozen=True, slots=True)
class Toleration:
    """A taint that does not keep the workers away; without a value any value of the key."""

    key: str
    value: str | None = None
    effect: str | None = None

    def __post_init__(self) -> None:
        _expect("placement.tolerations.key", _is_label_key(self.key), "the key of a taint", self.key)
        effects = (None, "NoSchedule", "PreferNoSchedule", "NoExecute")
        _expect("placement.tolerations.effect", self.effect in effects, f"one of {effects[1:]} or none", self.effect)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the pods may run, and who lets them."""

    queue: str | None = None
    priority: str | None = None  # a PriorityClass, under Kueue a WorkloadPriorityClass
    gang: GangKind = GangKind.AUTO
    scheduler: str | None = None  # of coscheduling
    spot: Spot = Spot.NONE
    provider: str | None = None  # how its spot nodes are marked
    topology: Topology | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    avoid_nodes: tuple[str, ...] = ()  # host names of nodes that are suspected
    share_nodes: bool = False  # two workers on one node lose both with it

    def __post_init__(self) -> None:
        for name in ("queue", "priority", "scheduler"):
            value = getattr(self, name)
            _expect(f"placement.{name}", value is None or _is_dns_name(value), "a lower-case name", value)
        for key, value in self.node_selector.items():
            good = _is_label_key(key) and _LABEL_VALUE.fullmatch(value) is not None
            _expect("placement.node_selector", good, "labels KEY = VALUE", f"{key}={value}")
        for node in self.avoid_nodes:
            _expect("placement.avoid_nodes", _LABEL_VALUE.fullmatch(node) is not None, "host names", node)
        if self.provider is not None:
            accelerators.find_provider(self.provider)
        if self.spot is not Spot.NONE and self.provider is None:
            raise ConfigError(
                f"placement.spot {self.spot.value!r}: it is not known how spot nodes are marked; name the provider: "
                "--set placement.provider=NAME"
            )


@dataclass(frozen=True, slots=True)
class Resources:
    """What the trainer of one worker pod gets besides devices and the memory tier."""

    cpu: str | None = None  # requested; default 4 for each worker
    memory: Bytes | None = None  # limit; default 16 GiB for each worker
    shm: Bytes = Bytes(8 * GIB)  # /dev/shm of the trainer: data loaders

    def __post_init__(self) -> None:
        _expect(
            "resources.cpu", self.cpu is None or _CPU.fullmatch(self.cpu) is not None, "CPUs: 8, 0.5, 500m", self.cpu
        )
        _expect("resources.memory", self.memory is None or self.memory >= 64 * MIB, "64Mi or more", self.memory)
        _expect("resources.shm", self.shm >= MIB, "1Mi or more", self.shm)


@dataclass(frozen=True, slots=True)
class Limits:
    """How often and how long."""

    max_restarts: int = 3  # for each cause of failure; also how often all pods are made anew
    deadline_s: int | None = None
    gang_wait_s: int = 1800  # for all pods to meet before they give their nodes back
    keep_s: int = 86400  # the finished job stays visible
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        _expect_range("limits.max_restarts", self.max_restarts, 0, 1_000_000)
        _expect_range("limits.deadline_s", 1 if self.deadline_s is None else self.deadline_s, 1, 10**9)
        _expect_range("limits.gang_wait_s", self.gang_wait_s, 60, 10**7)
        _expect_range("limits.keep_s", self.keep_s, 0, 10**9)
        _expect_range("limits.patience_s", self.patience_s, 1, 86400)


@dataclass(frozen=True, slots=True)
class Secret:
    """An environment variable whose value is a key of a Secret of the namespace."""

    env: str
    secret: str
    key: str

    def __post_init__(self) -> None:
        _expect_env("secrets.env", self.env)
        if not _is_dns_name(self.secret) or _SECRET_KEY.fullmatch(self.key) is None:
            raise ConfigError(  # which does not show it: it may be the value itself
                f"secrets.{self.env}: expected the name of a Secret and one of its keys, found what cannot be one; "
                "make the Secret, and refer to it: --secret NAME=SECRET:KEY"
            )


@dataclass(frozen=True, slots=True)
class Volume:
    """A persistent volume claim, mounted into the trainer and, since the run may lie there, head and agent."""

    claim: str
    path: str
    read_only: bool = False

    def __post_init__(self) -> None:
        _expect("volumes.claim", _is_dns_name(self.claim), "the name of a PersistentVolumeClaim", self.claim)
        good = re.fullmatch(r"(/[A-Za-z0-9._-]+)+", self.path) is not None and ".." not in self.path.split("/")
        _expect("volumes.path", good, "an absolute path such as /data", self.path)
        taken = next((own for own in _OWN_PATHS if f"{self.path}/".startswith(f"{own}/")), None)
        if taken is not None:
            raise ConfigError(f"volumes.path {self.path!r}: {taken} is used by the job itself; mount it elsewhere")


@dataclass(frozen=True, slots=True)
class Code:
    """Where the command's files come from: an archive, a commit, an image volume, or (none of them) the image."""

    archive: str | None = None  # its SHA-256
    way: Way | None = None  # of the archive; by its size where it is not said
    size: Bytes | None = None  # of the archive
    parts: int = 1  # ConfigMaps that carry it
    git: str | None = None  # git+https://HOST/REPO@COMMIT
    git_secret: str | None = None  # a Secret of type kubernetes.io/basic-auth
    image: str | None = None
    env: tuple[str, ...] = ()  # variables of env and secrets that are needed to fetch it, beside those of known stores

    def __post_init__(self) -> None:
        given = [name for name in ("archive", "git", "image") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"code: expected an archive, a commit or an image, found both {' and '.join(given)}")
        if self.archive is not None:
            _expect("code.archive", re.fullmatch(r"[0-9a-f]{64}", self.archive) is not None, "a SHA-256", self.archive)
        if self.image is not None:
            _expect_image("code.image", self.image)
        _expect_range("code.parts", self.parts, 1, 64)
        _expect("code.size", self.size is None or 0 < self.size <= GIB, "bytes, at most 1Gi", self.size)
        if self.archive is not None and self.way is Way.BUCKET and self.size is None:
            raise ConfigError("code.size: it is missing; an archive in a bucket is read by its size")
        if self.git is not None:
            _expect_commit(self.git)
        elif self.git_secret is not None:
            raise ConfigError("code.git_secret: there is no code.git that would need it; leave it out")
        if self.git_secret is not None:
            _expect("code.git_secret", _is_dns_name(self.git_secret), "the name of a Secret", self.git_secret)

    @property
    def is_in_bucket(self) -> bool:
        """Whether an archive lies beside the run."""
        return self.archive is not None and self.way is Way.BUCKET

    @property
    def is_brought(self) -> bool:
        """Whether the files are not the image's own."""
        return self.archive is not None or self.git is not None or self.image is not None


@dataclass(frozen=True, slots=True)
class Saving:
    """What the script does, as far as its launcher has to know it to tell what a failure costs."""

    every: int = 10  # steps between snapshots in memory
    step_s: float | None = None
    keep: int = 3  # checkpoints in the bucket
    bucket_bytes_per_s: Bytes = Bytes(200 * MIB)  # one node's, assumed where it is not given

    def __post_init__(self) -> None:
        _expect_range("saving.every", self.every, 1, 10**9)
        _expect_range("saving.keep", self.keep, 1, 10**6)
        _expect("saving.step_s", self.step_s is None or 0 < self.step_s < 10**6, "seconds, more than 0", self.step_s)
        _expect("saving.bucket_bytes_per_s", self.bucket_bytes_per_s > 0, "bytes per second", self.bucket_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Overlay:
    """What is merged into the rendered pods, by whoever knows better; never what would take their protection away."""

    head: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job on a cluster.

    Raises:
        ConfigError: something in it cannot be; the message says what was expected and found.
    """

    name: str
    run: str  # URL of the run, or a path below a volume
    image: str
    command: tuple[str, ...]  # the script and its arguments
    memory: Memory
    namespace: str = "default"
    nodes: int | None = None  # with TPUs given by the slices
    accelerator: str | None = None
    tpu: str | None = None
    slices: int = 1
    workers_per_node: int | None = None  # without accelerators
    fabric: str | None = None
    spares: int = 0  # nodes more than the job needs, to take a lost one's place
    placement: Placement = Placement()
    resources: Resources = Resources()
    limits: Limits = Limits()
    saving: Saving = Saving()
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[Secret, ...] = ()
    volumes: tuple[Volume, ...] = ()
    pull_secrets: tuple[str, ...] = ()
    code: Code = Code()
    overlay: Overlay = Overlay()
    python: str = "python3"
    user: int = 1000  # of all containers; never 0
    devices: tuple[Devices, ...] = field(init=False, repr=False)  # alternatives, the wanted one first
    tpus: Slices | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", without_slash(self.run))  # one text per run: annotations and digests are of it
        _expect_name(self.name)
        _expect_image("image", self.image)
        _expect("command", len(self.command) > 0 and self.command[0] != "", "a script and its arguments", self.command)
        _expect_open(self.command)
        _expect("namespace", _is_label(self.namespace), "the name of a namespace", self.namespace)
        _expect_range("user", self.user, 1, 2**31 - 1)
        _expect_range("spares", self.spares, 0, 1000)
        for secret in self.pull_secrets:
            _expect("pull_secrets", _is_dns_name(secret), "names of Secrets", secret)
        object.__setattr__(self, "devices", accelerators.parse_devices(self.accelerator) if self.accelerator else ())
        object.__setattr__(self, "tpus", accelerators.parse_slices(self.tpu, self.slices) if self.tpu else None)
        self._expect_size()
        self._expect_environment()
        self._expect_volumes()
        self._expect_code()

    def _expect_size(self) -> None:
        if self.devices and self.tpus:
            raise ConfigError(
                f"accelerator {self.accelerator!r} and tpu {self.tpu!r}: a job runs on one kind; leave one out"
            )
        if self.tpus is not None and self.nodes not in (None, self.tpus.num_hosts):
            raise ConfigError(
                f"nodes: {self.tpus.num_slices} x {self.tpu} are {self.tpus.num_hosts} nodes, found {self.nodes}; "
                "leave it out"
            )
        if self.tpus is None and self.slices != 1:
            raise ConfigError(f"slices: expected with tpu alone, found {self.slices} without; give tpu or leave it out")
        _expect_range("nodes", self.num_nodes, 1, 20_000)
        if (self.devices or self.tpus) and self.workers_per_node not in (None, self.num_workers):
            raise ConfigError(
                f"workers_per_node: a node runs {self.num_workers} workers on {self.accelerator or self.tpu}, "
                f"found {self.workers_per_node}; leave it out"
            )
        _expect_range("workers_per_node", self.num_workers, 1, 1024)
        if self.tpus is not None and self.spares:
            raise ConfigError(f"spares: a TPU slice is replaced whole by its provider, found {self.spares}; use 0")
        if self.fabric is not None:
            accelerators.parse_fabric(self.fabric)

    def _expect_environment(self) -> None:
        for name, value in self.env.items():
            _expect_env("env", name)
            if reads_like_secret(name):
                raise ConfigError(
                    f"env {name}: it reads like a secret, and values of env are stored in plain; "
                    "put it into a Secret and refer to it: --secret NAME=SECRET:KEY"
                )
            if "://" in value:
                _expect_public(f"env {name}", value)
        names = [secret.env for secret in self.secrets]
        twice = sorted({name for name in names if names.count(name) > 1 or name in self.env})
        _expect("env and secrets", not twice, "every variable once", twice)

    def _expect_volumes(self) -> None:
        paths = [volume.path for volume in self.volumes]
        _expect("volumes.path", len(set(paths)) == len(paths), "every path once", paths)
        path = local_path(require_public(self.run))
        if path is None:
            return
        home = next((volume for volume in self.volumes if path.is_relative_to(volume.path)), None)
        if home is None or home.read_only:
            raise ConfigError(
                f"run {self.run!r}: a path of this machine is not seen by pods; give a URL (s3://bucket/name), or a "
                "path below a volume that can be written (--volume CLAIM:/path)"
            )

    def _expect_code(self) -> None:
        known = {*self.env, *(secret.env for secret in self.secrets)}
        odd = sorted(set(self.code.env) - known)
        _expect("code.env", not odd, "names of env or secrets", odd)
        if self.code.is_in_bucket and local_path(self.run) is not None:
            raise ConfigError(
                f"code.way 'bucket': the run {self.run!r} is a path on a volume; use 'config-map', or a run in a bucket"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes that the job needs, spares not among them."""
        if self.tpus is not None:
            return self.tpus.num_hosts
        return 1 if self.nodes is None else self.nodes

    @property
    def num_workers(self) -> int:
        """Worker processes on each node."""
        if self.tpus is not None:
            return self.tpus.chips_per_host
        if self.devices:
            return self.devices[0].workers
        return 1 if self.workers_per_node is None else self.workers_per_node

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_workers


def default_name(run: str) -> str:
    """A job's name from its run's URL: the last part of it, and a digest where that had to be changed."""
    run = without_slash(run)
    last = run.rpartition("/")[2]
    plain = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".strip("-")
    if plain == last and len(plain) <= MOST_NAME:
        return plain
    return f"{plain[: MOST_NAME - 9].rstrip('-')}-{ids.text_digest(run, 8)}"


def _expect_open(command: tuple[str, ...]) -> None:
    """The command is stored in plain and stands in process lists: no secret may be in it."""
    for word in command:
        option = re.match(r"--?([A-Za-z][\w-]*)", word)
        if option is not None and _SECRET_OPTION.search(option[1].replace("-", "_")):
            raise ConfigError(
                f"command: option {option[0]} reads like a secret, and the command is stored in plain; put it into a "
                "Secret (--secret NAME=SECRET:KEY) and let the script read the variable"
            )
        if "://" in word:
            _expect_public("command", word[option.end() :].removeprefix("=") if option else word)


def _expect_name(name: str) -> None:
    if not _is_label(name) or len(name) > MOST_NAME:
        raise ConfigError(
            f"name {name!r}: expected lower-case letters, digits and '-', a letter first, at most {MOST_NAME} "
            f"characters, found {len(name)}; pods are named after it"
        )


def _expect_env(where: str, name: str) -> None:
    if _ENV_NAME.fullmatch(name) is None:
        raise ConfigError(f"{where}: expected the name of an environment variable, found {name!r}")
    if _OURS.match(name):
        raise ConfigError(f"{where} {name}: the launcher sets it; leave it out")


def _expect_public(where: str, value: str) -> None:
    try:
        require_public(value)
    except ConfigError:
        raise ConfigError(
            f"{where}: expected a URL without password, token and query, found one that may have them, and it would be "
            "stored in plain; put it into a Secret: --secret NAME=SECRET:KEY"
        ) from None


def _expect_commit(source: str) -> None:
    """Refuses what is no commit: a branch is another thing tomorrow, and a URL with a password stands in many files."""
    form = "git+https://HOST/REPO@COMMIT, the commit with all of its 40 (or 64) hexadecimal digits"
    url, _, commit = source.removeprefix("git+").rpartition("@")
    if not source.startswith("git+https://") or _GIT_URL.fullmatch(url) is None:
        secret = "@" in url or "?" in url
        said = "a URL that may hold a password; use code.git_secret" if secret else repr(public_url(source))
        raise ConfigError(f"code.git: expected {form}, found {said}")
    if _COMMIT.fullmatch(commit) is None:
        raise ConfigError(f"code.git: expected {form}, found {commit!r}; `git rev-parse HEAD` prints it")


def _expect_image(where: str, image: str) -> None:
    name, at, digest = image.partition("@")
    if at and re.fullmatch(r"sha\d+:[0-9a-f]+", digest) is None:
        raise ConfigError(  # which does not show it: it may be a password
            f"{where}: expected a digest after the '@', found something else; credentials of a registry stand in a "
            "Secret: pull_secrets = ['NAME']"
        )
    good = re.fullmatch(r"[a-zA-Z0-9][\w.\-/:]*", name) is not None
    _expect(where, good, "a reference of an image such as example.org/train:1", image)


def _is_label(text: str) -> bool:
    return len(text) <= 63 and _LABEL.fullmatch(text) is not None


def _is_dns_name(text: str) -> bool:
    return len(text) <= 253 and _DNS_NAME.fullmatch(text) is not None


def _is_label_key(text: str) -> bool:
    return len(text) <= 316 and _LABEL_KEY.fullmatch(text) is not None
