"""A look finds every change but one of values, by DLPack's table and by torch's getters alike."""

from __future__ import annotations

import copy
import ctypes
import operator
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from ktrain import native
from ktrain.state import look
from ktrain.state.look import Look, inside_of
from ktrain.state.tensors import dtype_of
from tests.unit.state.meshes import distribute, fake_rank, mesh_of

Change = Callable[[list[torch.Tensor]], None]


def replace(tensors: list[torch.Tensor]) -> None:
    tensors[1] = torch.nn.Parameter(torch.zeros(3, 4))


def exchange(tensors: list[torch.Tensor]) -> None:
    tensors[0], tensors[1] = tensors[1], tensors[0]


def alias(tensors: list[torch.Tensor]) -> None:
    tensors[0] = tensors[0][:]


def put_other_data(tensors: list[torch.Tensor]) -> None:
    tensors[1].data = torch.zeros(3, 4)


def put_strided_data(tensors: list[torch.Tensor]) -> None:
    """Other strides at the same address."""
    tensors[1].data = tensors[1].data.view(-1).as_strided((3, 4), (1, 3))


def put_other_shape(tensors: list[torch.Tensor]) -> None:
    tensors[1].data = tensors[1].data.view(4, 3)


def put_other_dtype(tensors: list[torch.Tensor]) -> None:
    """As many bytes of another kind at the same address."""
    tensors[0].data = tensors[0].data.view(torch.int32)


def drop_one(tensors: list[torch.Tensor]) -> None:
    tensors.pop()


def add_one(tensors: list[torch.Tensor]) -> None:
    tensors.append(torch.zeros(1))


def put_something_else(tensors: list[torch.Tensor]) -> None:
    tensors[1] = "no tensor"  # type: ignore[call-overload]


def put_of_other_class(tensors: list[torch.Tensor]) -> None:
    class Own(torch.Tensor):
        pass

    tensors[0] = tensors[0].as_subclass(Own)


CHANGES: list[Change] = [
    replace,
    exchange,
    alias,
    put_other_data,
    put_strided_data,
    put_other_shape,
    put_other_dtype,
    drop_one,
    add_one,
    put_something_else,
    put_of_other_class,
]


def some() -> list[torch.Tensor]:
    scalar, uneven = torch.tensor(1.0), torch.zeros(4, 3).t()
    return [torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(3, 4)), scalar, uneven, torch.zeros(0)]


@pytest.fixture(params=["dlpack", "getters"])
def looked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "getters":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")


@pytest.mark.usefixtures("looked")
@pytest.mark.parametrize("change", CHANGES)
def test_look_at_a_change_finds_it(change: Change) -> None:
    tensors = some()
    before = Look(tensors)
    kept = list(tensors)  # so that nothing new lies where something was
    change(tensors)
    assert before.try_again(tensors) is None
    assert kept


@pytest.mark.usefixtures("looked")
def test_look_at_other_values_finds_the_same() -> None:
    tensors = some()
    before = Look(tensors)
    for tensor in tensors:
        tensor.detach().fill_(7.0)
    found = before.try_again(tuple(tensors))
    assert found is not None and all(map(operator.is_, found, tensors))


@pytest.mark.usefixtures("looked")
def test_look_at_no_tensors_is_possible() -> None:
    assert Look([]).try_again([]) is not None
    assert Look([]).try_again(some()) is None


def put_other_local(tensors: list[Any]) -> None:
    tensors[1]._local_tensor = torch.zeros(2, 4)


def put_strided_local(tensors: list[Any]) -> None:
    tensors[1]._local_tensor.data = tensors[1]._local_tensor.view(-1).as_strided((2, 4), (1, 2))


def put_local_of_other_class(tensors: list[Any]) -> None:
    class Own(torch.Tensor):
        pass

    tensors[1]._local_tensor = tensors[1]._local_tensor.as_subclass(Own)


def put_other_specification(tensors: list[Any]) -> None:
    tensors[1]._spec = copy.copy(tensors[1]._spec)


def put_other_around(tensors: list[Any]) -> None:
    tensors[1] = DTensor(tensors[1]._local_tensor, tensors[1]._spec, requires_grad=False)


def put_local_bare(tensors: list[Any]) -> None:
    tensors[1] = tensors[1]._local_tensor


LOCAL_CHANGES = [
    put_other_local,
    put_strided_local,
    put_local_of_other_class,
    put_other_specification,
    put_other_around,
    put_local_bare,
]


@pytest.mark.usefixtures("looked")
@pytest.mark.parametrize("change", LOCAL_CHANGES)
def test_look_at_a_change_inside_of_a_dtensor_finds_it(change: Callable[[list[Any]], None]) -> None:
    with fake_rank(1, 2):
        mesh = mesh_of((2,))
        tensors: list[Any] = [torch.zeros(3), *(distribute(torch.zeros(4, 4), mesh, [Shard(0)]) for _ in range(2))]
        before = Look(tensors)
        for tensor in tensors:
            inside_of(tensor).fill_(7.0)
        found = before.try_again(tuple(tensors))
        assert found is not None and all(map(operator.is_, found, map(inside_of, tensors)))
        kept = [*tensors, tensors[1]._local_tensor, tensors[1]._spec]  # so that nothing new lies where something was
        change(tensors)
        assert before.try_again(tensors) is None
        assert kept


def test_dlpack_of_this_torch_describes_every_dtype_that_can_be_stored() -> None:
    names = "bool uint16 int64 float16 bfloat16 float8_e4m3fn float8_e8m0fnu float4_e2m1fn_x2 complex64".split()
    found = [look.read_by_dlpack([torch.empty(2, dtype=dtype_of(name))], False) for name in names]
    assert all(one is not None and isinstance(one[0], bytes) for one in found)


def test_dlpack_without_words_for_a_tensor_leaves_it_to_the_getters() -> None:
    tensors = [torch.zeros(3), torch.zeros(3, device="meta")]
    assert look.read_by_dlpack(tensors, False) is None
    before = Look(tensors)
    assert before.try_again(tensors) is not None
    assert before.try_again([tensors[0], torch.zeros(4, device="meta")]) is None


@pytest.mark.parametrize("exchange", [None, 1, "dlpack_exchange_api"])
def test_describe_tensors_without_a_known_table_gives_none(exchange: object) -> None:
    assert native.describe_tensors(exchange, some()) is None


def test_describe_tensors_takes_the_newest_table_of_a_known_version() -> None:
    tensors = some()
    expected = native.describe_tensors(torch.Tensor.__dlpack_c_exchange_api__, tensors)
    ours = Table(major=1)
    assert expected is not None
    assert native.describe_tensors(ours.capsule, tensors) == expected
    assert native.describe_tensors(Table(major=2, older=ours).capsule, tensors) == expected
    assert native.describe_tensors(Table(major=2).capsule, tensors) is None
    assert native.describe_tensors(Table(major=0).capsule, tensors) is None


class Table:
    """A copy of torch's table that says it is of another version; keep it as long as its capsule."""

    def __init__(self, *, major: int, older: Table | None = None) -> None:
        name = b"dlpack_exchange_api"
        address = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        make = _function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self._older = older
        self._name = ctypes.create_string_buffer(name)
        # A header (version, older table), then five functions.
        self._memory = ctypes.create_string_buffer(
            ctypes.string_at(address(torch.Tensor.__dlpack_c_exchange_api__, name), 56)
        )
        behind = 0 if older is None else ctypes.addressof(older._memory)
        struct.pack_into("=IIQ", self._memory, 0, major, 0, behind)
        self.capsule: object = make(ctypes.addressof(self._memory), self._name, None)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))
