"""Where a job runs, as it is typed in Python: what a launch on this machine, or a job on a cluster, needs to know.

These objects hold what they were given. It is checked when something is launched with it, by the very checks that the
command line goes through; only then is loaded what checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktrain.errors import ConfigError

if TYPE_CHECKING:
    from ktrain.launcher.code.archive import CodeArchive
    from ktrain.launcher.job import Wish
    from ktrain.launcher.spec import JobSpec

_FIELDS = {"state": "memory.state", "queue": "placement.queue"}  # the others have the name that they have in the job
_TYPED = ("image", "state", "nodes", "accelerator", "queue", "namespace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """This machine, on which every node is a folder and some processes. They outlive the process that launches.

    Args:
        nodes, spares, workers_per_node, max_restarts: as the options of `ktrain launch`.
        patience_s: silence that a healthy job may show; all timeouts follow.
        faults: what is broken on purpose, such as "kill-worker@step=30,rank=1".
        code: folder whose modules a function may import; None is the current one.
    """

    nodes: int = 1
    spares: int = 0
    workers_per_node: int = 1
    max_restarts: int = 3
    patience_s: float | None = None
    faults: tuple[str, ...] = ()
    code: str | Path | None = None

    @property
    def code_folder(self) -> Path:
        return Path.cwd() if self.code is None else Path(self.code).absolute()

    def wish(self, command: tuple[str, ...], run: str | None) -> Wish:
        """The launch that this asks for."""
        from ktrain.launcher.job import Wish

        script, *args = command
        return Wish(
            script=script,
            args=tuple(args),
            run=run,
            nodes=self.nodes,
            spares=self.spares,
            workers_per_node=self.workers_per_node,
            max_restarts=self.max_restarts,
            patience_s=self.patience_s,
            faults=tuple(self.faults),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubernetes:
    """A cluster, and the pods of a job on it.

    Args:
        image: has Python, torch and ktrain.
        state: bytes of state that one node holds, such as "40Gi".
        nodes, accelerator, queue, namespace: as the options of `ktrain launch`.
        code: folder of code that is sent along; None: a script lies in the image, a function needs none.
        fields: any other field of the job file by its path: {"tpu": "v6e:4x4", "placement.priority": "high"}.
        job: TOML file with the fields that are not given here.
        kubeconfig, context: how the cluster is reached; None: as `kubectl` does it.
    """

    image: str | None = None
    state: str | int | None = None
    nodes: int | None = None
    accelerator: str | None = None
    queue: str | None = None
    namespace: str | None = None
    code: str | Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    job: str | Path | None = None
    kubeconfig: str | Path | None = None
    context: str | None = None

    def spec(self, command: tuple[str, ...], run: str | None, archive: CodeArchive | None) -> JobSpec:
        """The job that this asks for.

        Raises:
            ConfigError: something in it is missing or cannot be.
        """
        from ktrain.launcher import spec_file
        from ktrain.launcher.code.ways import choose_way
        from ktrain.launcher.spec import default_name

        value = {} if self.job is None else spec_file.read_toml(Path(self.job))
        value["command"] = list(command)
        typed = {name: getattr(self, name) for name in _TYPED if getattr(self, name) is not None}
        for name, item in {**typed, **self.fields, **({} if run is None else {"run": run})}.items():
            spec_file.put(value, _FIELDS.get(name, name), item)
        if not isinstance(value.get("run"), str):
            raise ConfigError("run: it is missing; say where the run lives: launch(..., run='s3://bucket/net-a')")
        value.setdefault("name", default_name(value["run"]))
        spec = spec_file.from_value(value)
        if archive is None:
            return spec
        if spec.code.git is not None or spec.code.image is not None:
            raise ConfigError("code: a function or a folder is sent as an archive; leave code.git and code.image out")
        return replace(spec, code=choose_way(archive, spec.run, spec.code).code)


Place = Local | Kubernetes
