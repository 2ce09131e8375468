"""What a process learns of its device without one at hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ktrain import device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that uses a GPU of PCI address 0000:3b:00.0."""
    about = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(device, "name", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)


def _told(root: Path, text: str) -> Path:
    (root / "0000:3b:00.0").mkdir()
    (root / "0000:3b:00.0" / "numa_node").write_text(text)
    return root


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("\n", None)])
def test_numa_node_is_that_of_the_devices_pci_address(tmp_path: Path, text: str, node: int | None) -> None:
    assert device.numa_node(_told(tmp_path, text)) == node


@pytest.mark.usefixtures("one_gpu")
def test_numa_node_where_the_system_does_not_tell_is_none(tmp_path: Path) -> None:
    assert device.numa_node(tmp_path) is None


def test_numa_node_of_a_process_that_uses_no_gpu_is_none(tmp_path: Path) -> None:
    assert device.numa_node(_told(tmp_path, "1\n")) is None
