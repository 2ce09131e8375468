"""Tagged JSON: identical types back, or a refusal that names the place."""

from __future__ import annotations

import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.objects import child_path, decode, encode

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=9)
    | st.text(max_size=9)
    | st.sampled_from(["$", "v", 2**53, 2**53 + 1, -(2**53) - 1, -0.0, bytearray(b"\0")])
)
KEYS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.binary(max_size=5)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.just("$"), inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter)
        | st.sets(KEYS, max_size=4)
        | st.frozensets(KEYS, max_size=4)
    ),
    max_leaves=12,
)


class Tensor:
    """Stands for a tensor: a type that tagged JSON does not know."""


def no_tensor(value: Any, path: str) -> None:
    return None


def trip(value: Any) -> Any:
    text = json.dumps(encode(value, tensor=no_tensor, path="p"), allow_nan=False)
    return decode(json.loads(text), tensor=lambda key: pytest.fail(f"no tensor {key}"))


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits at every level; dictionaries in order as well."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return bool(a == b)


@given(VALUES)
def test_decode_any_value_comes_back_identical(value: Any) -> None:
    assert same(trip(value), value)


@given(st.sets(KEYS, max_size=6))
def test_encode_set_in_any_order_gives_equal_json(value: set[Any]) -> None:
    other = set(reversed(list(value)))
    assert encode(other, tensor=no_tensor, path="p") == encode(value, tensor=no_tensor, path="p")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-320, 0.1, -0.0])
def test_decode_float_comes_back_bit_for_bit(value: float) -> None:
    assert same(trip({"lr": value}), {"lr": value})


@pytest.mark.parametrize(
    "value",
    [None, True, "a", [1, 2.5], {"a": {"b": [None]}}, {}, [], 2**53, "$"],
    ids=lambda value: repr(value),
)
def test_encode_plain_value_is_itself(value: Any) -> None:
    assert encode(value, tensor=no_tensor, path="p") == value


def test_encode_tagged_values_is_the_documented_json() -> None:
    value = {
        "betas": (0.9, 0.5),
        "milestones": Counter({30: 1}),
        "seen": {2, 1},
        "seed": 2**64,
        "raw": b"\0\1",
    }
    assert encode(value, tensor=no_tensor, path="p") == {
        "betas": {"$": "tuple", "v": [0.9, 0.5]},
        "milestones": {"$": "Counter", "v": [[30, 1]]},
        "seen": {"$": "set", "v": [1, 2]},
        "seed": {"$": "int", "v": "0x10000000000000000"},
        "raw": {"$": "bytes", "v": "AAE="},
    }


@pytest.mark.parametrize("value", [{"$": "tuple", "v": [1]}, {"$": 1}, {"v": {"$": None}}, {"$": {"$": "$"}}])
def test_decode_dictionary_that_looks_like_a_tag_comes_back(value: Any) -> None:
    assert same(trip(value), value)


def test_encode_tensor_leaf_is_written_by_its_key_and_comes_back() -> None:
    one, two = Tensor(), Tensor()
    found: dict[str, Any] = {}

    def tensor(value: Any, path: str) -> str | None:
        if not isinstance(value, Tensor):
            return None
        found[path] = value
        return path

    value = {"state": {0: {"exp_avg": one}}, "list": [(two,)]}
    coded = encode(value, tensor=tensor, path="optimizer")
    assert list(found) == ["optimizer/state/[0]/exp_avg", "optimizer/list/0/0"]
    back = decode(json.loads(json.dumps(coded)), tensor=found.__getitem__)
    assert back["state"][0]["exp_avg"] is one
    assert back["list"][0][0] is two


@given(st.lists(KEYS, unique_by=repr, min_size=2, max_size=6))
def test_child_path_different_keys_have_different_paths(keys: list[Any]) -> None:
    unequal = {key: None for key in keys}  # 1, 1.0 and True are one key
    assert len({child_path("p", key) for key in unequal}) == len(unequal)


def test_child_path_key_with_separators_cannot_reach_another_place() -> None:
    assert child_path("p", "a/b") == "p/a~1b"
    assert child_path("p", "~1") == "p/~01"
    assert child_path("p", "[0]") != child_path("p", 0)


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "leaf",
    [
        Colour.RED,
        Level.LOW,
        Text("a"),
        Point(1, 2),
        defaultdict(list),
        numpy.float64(1.0),
        numpy.int64(1),
        numpy.bool_(True),
        numpy.zeros(2),
        object(),
        len,
        range(3),
        {1, Level.LOW + 0, Point(1, 2)},
        {Text("a"): 1},
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_encode_type_that_would_not_come_back_is_refused_with_its_path(leaf: Any) -> None:
    with pytest.raises(ConfigError, match=r"^sched/a/1.*type \S+"):
        encode({"a": [0, leaf]}, tensor=no_tensor, path="sched")


def test_encode_list_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ConfigError, match="holds itself"):
        encode(value, tensor=no_tensor, path="p")


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: {1: x}, lambda x: (x,)])
def test_decode_deepest_value_that_encode_takes_comes_back(wrap: Any) -> None:
    value: Any = 0
    for _ in range(64):
        value = wrap(value)
    assert trip(value) == value
    with pytest.raises(ConfigError, match="64 deep"):
        encode(wrap(value), tensor=no_tensor, path="p")


def test_encode_one_object_in_two_places_is_written_twice() -> None:
    shared = [1]
    assert trip([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "value",
    [
        {"$": "tuple"},
        {"$": "tuple", "v": [], "w": 1},
        {"$": "tuple", "v": "ab"},
        {"$": "object", "v": "os.system"},
        {"$": 1, "v": []},
        {"$": "set", "v": [[1]]},
        {"$": "dict", "v": ["ab"]},
        {"$": "dict", "v": [[1, 2, 3]]},
        {"$": "dict", "v": [[[], 2]]},
        {"$": "int", "v": "12"},
        {"$": "int", "v": "0x_1"},
        {"$": "float", "v": "7ff0"},
        {"$": "complex", "v": "zz"},
        {"$": "bytes", "v": "A"},
        {"$": "bytes", "v": "A*=="},
        {"$": "tensor", "v": 3},
        {"$": "tensor", "v": ["a"]},
    ],
    ids=str,
)
def test_decode_json_that_encode_never_makes_is_corruption(value: Any) -> None:
    with pytest.raises(CorruptionError, match="tagged JSON"):
        decode([value], tensor=lambda key: key)


def test_decode_endless_nesting_is_corruption() -> None:
    value: Any = 0
    for _ in range(400):
        value = [value]
    with pytest.raises(CorruptionError, match="nested deeper"):
        decode(value, tensor=lambda key: key)


def test_decode_error_of_the_tensor_reader_passes_through() -> None:
    def tensor(key: str) -> Any:
        raise ConfigError(key)

    with pytest.raises(ConfigError, match="^w$"):
        decode({"$": "tuple", "v": [{"$": "tensor", "v": "w"}]}, tensor=tensor)
