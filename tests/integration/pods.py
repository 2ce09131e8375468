"""Starts the containers of a rendered job as processes of this machine: a kubelet as small as can be.

What a container is told is what its manifest says. Only paths of mounts become folders, and the head's name in the
cluster's DNS becomes an address.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.launcher import spec_file
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code as carried
from ktrain.launcher.render.access import token_secret
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.spec import JobSpec
from tests.integration.launching import ENDS_WITHIN_S, Place
from tests.unit.launcher.setups import pod_of

Manifest = dict[str, Any]
TOKEN = "0123456789abcdef"


@dataclass
class Pod:
    """One pod: its folders, its containers' processes."""

    role: str
    index: int
    address: str
    manifest: Manifest
    folder: Path
    shm: Path  # of its memory-backed volumes
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    made: int = 0  # how often this pod was made anew

    def container(self, name: str) -> Manifest:
        every = [*self.manifest.get("initContainers", ()), *self.manifest["containers"]]
        return next(item for item in every if item["name"] == name)

    def names(self) -> list[str]:
        return [item["name"] for item in (*self.manifest.get("initContainers", ()), *self.manifest["containers"])]

    def volume(self, name: str) -> Path:
        declared = next(item for item in self.manifest["volumes"] if item["name"] == name)
        base = self.shm if declared.get("emptyDir", {}).get("medium") == "Memory" else self.folder
        return base / name

    def mapped(self, text: str, container: Manifest) -> str:
        """A path of the container as one of this machine; any other text as it is."""
        for mount in container["volumeMounts"]:
            if mount["name"].startswith("data-") or mount["mountPath"] == "/dev/shm":
                continue  # claims lie where the manifest says, and /dev/shm is this machine's own
            if text == mount["mountPath"] or text.startswith(mount["mountPath"] + "/"):
                return str(self.volume(mount["name"])) + text.removeprefix(mount["mountPath"])
        return text


class Cluster:
    """The pods of one job."""

    def __init__(self, here: Place, job: JobSpec, code: CodeArchive) -> None:
        rendered = render(job, ClusterFacts(restart_rules=True))
        self.here = here
        self.job = job
        self.owned = [*rendered.owned, token_secret(job, TOKEN), *carried.config_maps(job, code.data)]
        net = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}"
        self.head_address = f"tcp:{net}.2:{_free_port(f'{net}.2')}"
        self.head = self._pod(rendered, "head", 0, f"{net}.2")
        self.workers = [
            self._pod(rendered, "worker", at, f"{net}.{3 + at}") for at in range(job.num_nodes + job.spares)
        ]

    # Pods

    def _pod(self, rendered: Rendered, role: str, index: int, address: str) -> Pod:
        name = f"{role}{index}"
        folder, shm = self.here.root / name, self.here.volume / name
        return Pod(role, index, address, pod_of(rendered.jobset, role), folder, shm)

    def create(self, pod: Pod) -> None:
        """Makes the pod's volumes, empty, and starts its containers in their order."""
        pod.made += 1
        for declared in pod.manifest["volumes"]:
            folder = pod.volume(declared["name"])
            if "persistentVolumeClaim" in declared:
                continue
            folder.mkdir(parents=True)
            for name, data in self._content(declared).items():
                (folder / name).write_bytes(data)
        for name in pod.names():
            container = pod.container(name)
            process = self.start(pod, name)
            if name == "code":
                assert process.wait(ENDS_WITHIN_S) == 0, self.log(pod, name)
            if "startupProbe" in container:
                self._await_probe(pod, container)

    def _content(self, volume: Manifest) -> dict[str, bytes]:
        if "configMap" in volume:
            found = self._object("ConfigMap", volume["configMap"]["name"])
            plain = {name: text.encode() for name, text in found.get("data", {}).items()}
            return {**plain, **{name: base64.b64decode(text) for name, text in found.get("binaryData", {}).items()}}
        if "secret" in volume:
            found = self._object("Secret", volume["secret"]["secretName"])["stringData"]
            return {name: text.encode() for name, text in found.items()}
        return {}

    def _object(self, kind: str, name: str) -> Manifest:
        return next(item for item in self.owned if (item["kind"], item["metadata"]["name"]) == (kind, name))

    def _await_probe(self, pod: Pod, container: Manifest) -> None:
        command = [pod.mapped(part, container) for part in container["startupProbe"]["exec"]["command"]]
        deadline = Deadline.after(ENDS_WITHIN_S)
        while subprocess.run(command, check=False).returncode != 0:
            assert not deadline.expired(), f"not ready:\n{self.log(pod, container['name'])}"
            SYSTEM_CLOCK.sleep(0.1)

    # Containers

    def start(self, pod: Pod, name: str) -> subprocess.Popen[bytes]:
        container = pod.container(name)
        directory = container.get("workingDir", str(self.here.root))
        with open(self._log_path(pod, name), "ab") as log:
            process = subprocess.Popen(
                [pod.mapped(part, container) for part in container["command"]],
                env=self._environment(pod, container),
                cwd=pod.mapped(directory, container),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        pod.processes[name] = process
        return process

    def _environment(self, pod: Pod, container: Manifest) -> dict[str, str]:
        fields = {
            "metadata.name": f"{self.job.name}-{pod.role}-0-{pod.index}-x{pod.made}",
            "metadata.namespace": self.job.namespace,
            "status.podIP": pod.address,
            "spec.nodeName": f"machine-{pod.role}-{pod.index}",
            "metadata.labels['jobset.sigs.k8s.io/job-index']": "0",
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(pod.index),
        }
        found = {"PATH": os.environ["PATH"], "TMPDIR": str(self.here.root / "tmp")}
        for item in container.get("env", ()):
            text = fields[item["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in item else item["value"]
            found[item["name"]] = pod.mapped(text, container)
        if container.get("env"):
            found[contract.ENV_HEAD] = self.head_address
            found[contract.ENV_WORK] = pod.mapped(contract.POD_WORK, container)
        return found

    def _log_path(self, pod: Pod, name: str) -> Path:
        return self.here.root / f"{pod.role}{pod.index}-{name}.out"

    def log(self, pod: Pod, name: str) -> str:
        path = self._log_path(pod, name)
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    # Life and death

    def run(self) -> int:
        """Follows the manifests' rules until the head gives its verdict; returns that, with all trainers ended."""
        deadline = Deadline.after(ENDS_WITHIN_S)
        while (code := self.tend()) is None:
            assert not deadline.expired(), self.logs()
            SYSTEM_CLOCK.sleep(0.1)
        return code

    def tend(self) -> int | None:
        """Starts again what ended and should run; the head's exit code once it is a verdict."""
        for pod in self.workers:
            for name in ("agent", "trainer"):
                code = pod.processes[name].poll()
                if code is not None and not (name == "trainer" and code == contract.EXIT_OK):
                    self.start(pod, name)
        code = self.head.processes["head"].poll()
        if code is None or code in (contract.EXIT_OK, contract.EXIT_AGAIN, contract.EXIT_AGAIN_FREE):
            return code
        if code in contract.EXITS_FINAL:
            return code
        self.replace(self.head)
        return None

    def replace(self, pod: Pod, signum: int = signal.SIGKILL) -> None:
        """Ends a pod and everything in it; makes it anew, empty."""
        self.end(pod, signum)
        self.create(pod)

    def end(self, pod: Pod, signum: int = signal.SIGKILL) -> dict[str, int]:
        """Ends a pod as a kubelet does, sidecars last; returns the exit codes."""
        for name in reversed(pod.names()):
            process = pod.processes[name]
            if process.poll() is None:
                process.send_signal(signum)
                process.wait(ENDS_WITHIN_S)
        shutil.rmtree(pod.folder)
        shutil.rmtree(pod.shm)
        return {name: process.returncode for name, process in pod.processes.items()}

    def logs(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.here.root.glob("*.out"))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster(here: Place, command: Sequence[str], code: Path, **fields: Any) -> Iterator[Cluster]:
    """The job of a folder of code, all its pods made, each once the one before it has its processes."""
    archive = pack_code(code)
    value = {
        "name": "small",
        "run": str(here.run),
        "image": "example.org/train:1",
        "command": list(command),
        "memory": {"state": "1Mi"},
        "volumes": [{"claim": "runs", "path": str(here.root)}],
        "code": {"archive": archive.sha256},
        "python": sys.executable,
        **fields,
    }
    (here.root / "tmp").mkdir(exist_ok=True)
    made = Cluster(here, spec_file.from_value(value), archive)
    try:
        yield made
    finally:
        for pod in (made.head, *made.workers):
            for process in pod.processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
