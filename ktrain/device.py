"""The accelerator of this process over `torch.accelerator`; without one, the CPU as a null object.

Nothing is asked of the hardware at import.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ktrain.errors import ConfigError

_LOG = logging.getLogger(__name__)
_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process
_SIDE_STREAMS: dict[torch.device, SideStream] = {}


def is_available() -> bool:
    """Whether this process can use an accelerator."""
    return torch.accelerator.is_available()


def name() -> str:
    """`cuda`, `xpu`, ..., or `cpu` where there is no accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def is_deterministic() -> bool:
    """Whether the same steps from the same state give the same bits: on the CPU, elsewhere where torch is told so."""
    return name() == "cpu" or torch.are_deterministic_algorithms_enabled()


def count() -> int:
    """Accelerators that this process sees; 0 where there is none."""
    return torch.accelerator.device_count() if is_available() else 0


def for_rank(local_rank: int) -> torch.device:
    """The device of a rank: its own accelerator, the only one it sees, or the CPU.

    Raises:
        ConfigError: several accelerators are visible, but fewer than local ranks.
    """
    kind, num_devices = name(), count()
    if num_devices == 0:
        return torch.device("cpu")
    if num_devices == 1:  # the launcher showed each rank its own
        return torch.device(kind, 0)
    if local_rank >= num_devices:
        raise ConfigError(
            f"local rank {local_rank} has no {kind} device: {num_devices} are visible; start {num_devices} ranks a node"
        )
    return torch.device(kind, local_rank)


def use(device: torch.device) -> None:
    """Makes the device the current one of this thread; for the CPU nothing happens."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def process_group_backend(device: torch.device | None = None) -> str:
    """The backend of collectives on the device: `gloo`, `nccl`, ... by torch's own map."""
    import torch.distributed as dist

    return dist.get_default_backend_for_device(device or torch.device(name()))


def synchronize(device: torch.device | None = None) -> None:
    """Waits until all work queued on the device is done; for the CPU nothing happens."""
    if device is None:
        if is_available():
            torch.accelerator.synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


class SideStream:
    """A stream of a device beside the one that computes. One copy at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)
        self._begin: torch.Event | None = None

    def follow_current(self) -> None:
        """What runs here begins when the thread's current stream has done all that it was given so far."""
        self._begin = torch.accelerator.current_stream(self._device).record_event()

    def mark(self) -> torch.Event:
        """An event that has happened when all that was given to this stream so far is done."""
        return self._stream.record_event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The current stream of this thread inside; on leaving, all work is done. From any thread."""
        use(self._device)  # a thread that names no device would make a context on the first one
        with self._stream:
            if self._begin is not None:
                self._stream.wait_event(self._begin)
            try:
                yield
            finally:
                self._stream.synchronize()  # after an error too: what was queued before it still writes


def side_stream(device: torch.device) -> SideStream:
    """The side stream of a device; one for all copies of this process."""
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = SideStream(device)
    return _SIDE_STREAMS[device]


def is_capturing() -> bool:
    """Whether work of this thread is being recorded into a graph instead of done."""
    return name() == "cuda" and torch.cuda.is_current_stream_capturing()


def generators(devices: range | None = None) -> list[torch.Tensor]:
    """The states of the devices' default generators (all devices where None): CPU tensors of bytes."""
    if not is_available():
        return []
    module = torch.get_device_module(name())
    return [module.get_rng_state(index) for index in _indices(devices)]


def set_generators(states: list[torch.Tensor], devices: range | None = None) -> None:
    """The opposite of `generators`; states beyond the devices that are there are left out."""
    if not is_available():
        return
    module = torch.get_device_module(name())
    for index, state in zip(_indices(devices), states, strict=False):
        module.set_rng_state(state, index)


def numa_node(root: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The node of this machine's memory that is nearest to the device in use; None where that is not known.

    Nothing is started for it: a process that has not used its device yet has none.
    """
    if name() != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:  # an older torch does not say
        return None
    try:
        node = int((root / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def register_host_memory(memory: memoryview) -> bool:
    """Pins memory that exists (a slot), so that copies from the device are one DMA; false where it cannot be.

    Whoever registers unregisters before the memory is unmapped.
    """
    if name() != "cuda" or memory.nbytes == 0:
        return False
    code = int(_cuda_runtime().cudaHostRegister(_address(memory), memory.nbytes, _REGISTER_PORTABLE))
    if code != 0:
        _LOG.warning("CUDA cannot pin %d bytes of a slot (error %d); copies into it are slower", memory.nbytes, code)
        _forget_error()
    return code == 0


def unregister_host_memory(memory: memoryview) -> None:
    """Undoes `register_host_memory`."""
    if name() == "cuda" and memory.nbytes:
        _cuda_runtime().cudaHostUnregister(_address(memory))


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Takes the runtime's note of a call of ours that failed, which torch would read as that of its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)


def _address(memory: memoryview) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _indices(devices: range | None) -> range:
    return range(count()) if devices is None else devices
