"""A function is packed by value, refused where it cannot be, and opened only when it is what was launched."""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import io
import json
import logging
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ktrain.errors import ConfigError, CorruptionError
from ktrain.launcher.code.function import FILE, SCRIPT, open_function, pack_function
from ktrain.launcher.code.preflight import MOST_DATA_BYTES, find_problems

CELL = """
import math
import logging

LOG = logging.getLogger("cell")
SCALE = 3
pad_token = "<|endoftext|>"


class Net:
    def __init__(self, size):
        self.size = size

    def area(self):
        return math.pi * self.size ** 2 * SCALE


def scaled(value):
    return Net(value).area(), pad_token, LOG.name


def train(value=2):
    return scaled(value)
"""


@pytest.fixture
def cell() -> Iterator[Callable[[str], types.ModuleType]]:
    """Runs a text as a notebook does its cells: in a module that nobody can import."""

    def run(text: str) -> types.ModuleType:
        made = types.ModuleType("__main__")
        exec(compile(text, "cell", "exec"), made.__dict__)
        return made

    yield run


def problems(function: object, **options: Any) -> dict[str, str]:
    return {item.path: item.why for item in find_problems({"train": function}, **options)}


def test_function_of_a_notebook_runs_where_nothing_of_it_can_be_imported(
    cell: Callable[[str], types.ModuleType], tmp_path: Path
) -> None:
    here = cell(CELL + "def show(value):\n    print(train(value))\n")
    packed = pack_function(here.show, (3,))
    for name, data in packed.files.items():
        (tmp_path / name).write_bytes(data)

    done = subprocess.run(
        [sys.executable, str(tmp_path / packed.command[0]), *packed.command[1:]],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, f"{here.train(3)}\n"), done.stderr


def test_function_with_arguments_is_called_with_them(cell: Callable[[str], types.ModuleType]) -> None:
    here = cell(CELL)
    packed = pack_function(here.train, (3,))

    assert open_function(packed.data, packed.sha256)() == here.train(3)
    assert packed.command == (SCRIPT, hashlib.sha256(packed.data).hexdigest())


@pytest.mark.parametrize("at", [0, 30, -1])
def test_function_whose_bytes_were_changed_is_not_opened(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_function(len, ("abc",))
    changed = bytearray(packed.data)
    changed[at] ^= 1
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # would fail another way

    with pytest.raises(CorruptionError, match=f"{FILE}: expected SHA-256 {packed.sha256}"):
        open_function(bytes(changed), packed.sha256)


def test_function_of_another_python_is_refused_with_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_function(len, ("abc",))
    head, _, rest = packed.data.partition(b"\n")
    data = json.dumps({**json.loads(head), "python": "3.9"}).encode() + b"\n" + rest
    here = f"{sys.version_info.major}.{sys.version_info.minor}"

    with pytest.raises(ConfigError, match=rf"packed by Python 3\.9, and this is Python {here}"):
        open_function(data, hashlib.sha256(data).hexdigest())


def test_things_of_this_process_are_named_with_their_path(tmp_path: Path) -> None:
    lock, place = threading.Lock(), socket.socket()
    with place, open(tmp_path / "log.txt", "w") as log:
        held: dict[str, object] = {"sinks": [log]}

        def train(*, port: object = place) -> None:
            with lock:
                held.clear()

        found = problems(train)

    assert found == {
        "train -> closure 'held'['sinks'][0]": f"an open file ({tmp_path / 'log.txt'}); open it in the function",
        "train -> closure 'lock'": "a thread.lock belongs to this process; make it in the function",
        "train -> default 'port'": "a socket; connect in the function",
    }


def test_refusal_of_a_class_is_kept_with_its_path() -> None:
    class Odd:
        def __reduce_ex__(self, protocol: object) -> str:
            raise TypeError("no copies of me")

    holder = types.SimpleNamespace(inner=[Odd()])

    (found,) = problems(lambda: holder).items()

    assert found[0] == "train -> closure 'holder'.inner[0]" and found[1].endswith("cannot be pickled: no copies of me")


class OnDevice(torch.Tensor):
    """Plays a tensor of a device that this machine may not have."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def test_tensor_on_a_device_is_named_by_its_place_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    model.register_buffer("mean", torch.zeros(4).as_subclass(OnDevice))

    assert problems(lambda: model) == {
        "train -> closure 'model'._buffers['mean']": (
            "a tensor on cuda:0, 16 bytes; make it in the function, or move it to the CPU"
        )
    }


def test_large_arrays_are_named_with_their_sizes_and_small_ones_pass() -> None:
    large, small = np.zeros(MOST_DATA_BYTES, np.uint8), torch.zeros(1 << 10)
    text = b"x" * (2 << 20)

    found = problems(lambda: (large, small, text))

    assert sorted(found) == ["train -> closure 'large'", "train -> closure 'text'"]
    assert found["train -> closure 'large'"].startswith("16 MiB of 18 MiB of data")
    assert problems(lambda: small) == {}
    view = torch.zeros(MOST_DATA_BYTES + 1, dtype=torch.uint8)[:3]
    assert list(problems(lambda: view)) == ["train -> closure 'view'"], "its storage goes along"


def test_dictionary_of_another_class_is_taken_by_its_reduction() -> None:
    held = collections.defaultdict(threading.Lock)
    made = collections.OrderedDict(a=threading.Lock())

    assert problems(lambda: held) == {}
    assert list(problems(lambda: made)) == ["train -> closure 'made'['a']"]


def test_variable_that_reads_like_a_secret_is_refused_and_a_mark_of_a_tokenizer_is_not() -> None:
    HF_TOKEN, api_key, eos_token = "hf_abcdefghijklmnop", "k", "<|end_of_the_text|>"

    class Hub:
        PASSWORD = "p"

    def train(db_password: str = "p") -> object:
        return HF_TOKEN, api_key, eos_token, Hub

    assert sorted(problems(train)) == [
        "train -> closure 'HF_TOKEN'",
        "train -> closure 'Hub'.PASSWORD",
        "train -> closure 'api_key'",
        "train -> default 'db_password'",
    ]


def module_at(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text("def inner():\n    return 1\n")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_module_that_is_only_here_is_named_unless_it_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = module_at(tmp_path / "code", "only_here", monkeypatch)
    wanted = functools.partial(map, local.inner)

    (found,) = problems(wanted).values()
    assert f"module only_here is not installed, it is only here ({tmp_path / 'code' / 'only_here.py'})" in found
    assert problems(wanted, code=tmp_path / "code") == {}
    assert "only_here" in next(iter(problems(wanted, code=tmp_path).values())), "a folder above does not import it"
    assert problems(lambda: (torch, np, json, logging.getLogger("a"), io.StringIO("x"))) == {}


def test_refusal_names_everything_at_once_and_the_argument(tmp_path: Path) -> None:
    lock = threading.RLock()
    with open(tmp_path / "a", "w") as file, pytest.raises(ConfigError) as caught:
        pack_function(lambda opened: lock, (file,))

    assert len(str(caught.value).splitlines()) == 3
    assert "closure 'lock'" in str(caught.value) and "argument 0 of" in str(caught.value)


def test_deep_and_circular_values_are_walked() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    ring: dict[str, Any] = {}
    ring["self"] = ring

    assert problems(lambda: (deep, ring)) == {}
