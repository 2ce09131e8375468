"""Every kind of tensor and value comes back as it was."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.masked import masked_tensor

from ktrain.errors import ConfigError
from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, Holder, restore, save_and_restore, snapshot

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2, torch.complex32, torch.complex64, torch.complex128,
]  # fmt: skip


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy())


def round_trip(value: Any) -> Any:
    fresh = Holder({})
    save_and_restore({"part": Holder(value)}, {"part": fresh})
    return fresh.value


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_of_any_dtype_comes_back_with_its_bits(dtype: torch.dtype) -> None:
    raw = torch.arange(5 * 3 * dtype.itemsize, dtype=torch.uint8) * 7
    value = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(5, 3)
    found = round_trip({"t": value})["t"]
    assert (found.dtype, found.shape) == (dtype, value.shape)
    assert as_bytes(found) == as_bytes(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0).reshape(4, 6)[:, ::2],
        torch.arange(3.0).expand(4, 3),
        torch.tensor(5.5),
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.int16),
        torch.arange(8.0).reshape(2, 2, 2).to(memory_format=torch.contiguous_format).permute(2, 0, 1),
        torch.complex(torch.arange(4.0), torch.ones(4)).conj(),
        torch.complex(torch.arange(4.0), torch.ones(4)).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "scalar", "empty", "empty-3d", "permuted", "conj", "neg"],
)
def test_tensor_of_any_form_comes_back_equal(value: torch.Tensor) -> None:
    found = round_trip({"t": value})["t"]
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


def test_values_come_back_with_identical_types() -> None:
    value = {
        "tuple": (1, (2.5, None)),
        3: [True, b"\x00\xff", {4, 5}],
        ("a", 1): Counter("abca"),
        "ordered": OrderedDict(b=1, a=torch.tensor([1, 2])),
        "big": 2**80,
        "inf": float("inf"),
        "a/b~c": {"x.y": torch.tensor(1.0)},
    }
    found = round_trip(value)
    assert repr(found) == repr(value)


def test_tensors_at_confusable_paths_stay_apart() -> None:
    value = {"a": {"b": torch.tensor(1)}, "a/b": torch.tensor(2), 1: torch.tensor(3), "1": torch.tensor(4)}
    found = round_trip(value)
    assert [int(found["a"]["b"]), int(found["a/b"]), int(found[1]), int(found["1"])] == [1, 2, 3, 4]


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_both_names_come_back() -> None:
    saved = Tied(tie=True)
    plan = plan_save(TrainState({"model": saved}), ALONE)
    assert [item.shard.name for item in plan.items] == ["model/embed.weight"]
    for tie in (True, False):
        fresh = Tied(tie)
        save_and_restore({"model": saved}, {"model": fresh})
        assert torch.equal(fresh.embed.weight, saved.embed.weight)
        assert torch.equal(fresh.head.weight, saved.embed.weight)


def test_untied_weights_restore_into_untied_ones() -> None:
    saved, fresh = Tied(tie=False), Tied(tie=False)
    save_and_restore({"model": saved}, {"model": fresh})
    assert torch.equal(fresh.head.weight, saved.head.weight)


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"scale": (1, 2.5)}, torch.arange(5), {"h": [torch.ones(2)]}])
def test_extra_state_goes_through_the_modules_own_methods(extra: Any) -> None:
    fresh = nn.Sequential(WithExtra(torch.zeros(2)))
    save_and_restore({"model": nn.Sequential(WithExtra(extra))}, {"model": fresh})
    assert repr(fresh[0].extra) == repr(extra)


def test_compiled_module_has_clean_names_and_loads_into_a_plain_one() -> None:
    saved, fresh = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    compiled = torch.compile(saved)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    saved[0].weight.grad = torch.ones(2, 3)
    optimizer.step()
    state = TrainState({"model": compiled, "optimizer": optimizer})
    names = {item.shard.name for item in plan_save(state, ALONE).items}
    assert names == {"model/0.weight", "model/0.bias", "optimizer/model.0.weight/momentum_buffer"}
    again = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    restore(TrainState({"model": fresh, "optimizer": again}), {0: snapshot(state)})
    assert torch.equal(fresh[0].weight, saved[0].weight)
    assert torch.equal(again.state[fresh[0].weight]["momentum_buffer"], torch.ones(2, 3))


def test_frozen_parts_and_unowned_parameters_come_back() -> None:
    def make() -> tuple[nn.Module, nn.Parameter, torch.optim.Optimizer]:
        model, outside = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
        model.weight.requires_grad_(False)
        return model, outside, torch.optim.Adam([{"params": [model.bias]}, {"params": [outside], "lr": 0.5}])

    model, outside, optimizer = make()
    model.bias.grad, outside.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    fresh, fresh_outside, fresh_optimizer = make()
    save_and_restore({"m": model, "o": optimizer}, {"m": fresh, "o": fresh_optimizer})
    assert torch.equal(fresh.weight, model.weight)
    found = fresh_optimizer.state[fresh_outside]["exp_avg"]
    assert torch.equal(found, optimizer.state[outside]["exp_avg"])
    assert fresh_optimizer.param_groups[1]["lr"] == 0.5


class Named(torch.Tensor):
    """A class of a user whose tensors have plain bytes."""


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout"),
    "sparse-rows": (lambda: torch.eye(3).to_sparse_csr(), "layout"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta"),
    "lazy": (lambda: nn.parameter.UninitializedParameter(), "no shape"),
    "unknown-dtype": (lambda: torch.empty(2, dtype=torch.bits8), "dtype is torch.bits8"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "dtype is torch.qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    "masked": (lambda: masked_tensor(torch.ones(2), torch.tensor([True, False])), "MaskedTensor"),
    "users-class": (lambda: torch.ones(2).as_subclass(Named), "Named and would come back as a plain tensor"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(2)), "no memory of its own"),
    "freed": (lambda: freed(torch.ones(2)), "no memory of its own"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore:.*(deprecated|prototype|beta).*:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_tensor_without_plain_bytes_is_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=f"part/t.*{reason}"):
        plan_save(TrainState({"part": Holder({"t": make()})}), ALONE)


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning")
def test_module_that_holds_wrapped_tensors_is_refused_by_name() -> None:
    model = nn.Module()
    model.register_buffer("scale", masked_tensor(torch.ones(2), torch.tensor([True, False])))
    with pytest.raises(ConfigError, match="m/scale.*MaskedTensor around other tensors"):
        plan_save(TrainState({"m": model}), ALONE)


def test_parameter_of_a_users_class_is_filled_in_place() -> None:
    def make(value: float) -> nn.Module:
        model = nn.Module()
        model.weight = nn.Parameter(torch.full((3,), value).as_subclass(Named))
        return model

    fresh = make(0.0)
    save_and_restore({"m": make(2.5)}, {"m": fresh})
    assert fresh.weight.tolist() == [2.5] * 3
    assert isinstance(fresh.weight, Named)


@pytest.mark.parametrize(
    "parts",
    [{}, {"": Holder(1)}, {"a/b": Holder(1)}, {"a.b": Holder(1)}, {"a": object()}, {1: Holder(1)}],
    ids=str,
)
def test_train_state_of_bad_parts_is_refused(parts: Any) -> None:
    with pytest.raises(ConfigError, match="state"):
        TrainState(parts)
