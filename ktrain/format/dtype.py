"""Element types: torch's names without `torch.`, their sizes, and how a payload writes them.

Invariant: a payload uses only types that every safetensors reader knows; all others are bytes (`U8`) with the
item's bytes as an added last dimension, and the manifest alone knows the true type.
"""

from __future__ import annotations

from ktrain.errors import ConfigError

# Name -> (bytes per item, safetensors name or "" where old safetensors readers have none).
_DTYPES: dict[str, tuple[int, str]] = {
    "bool": (1, "BOOL"),
    "uint8": (1, "U8"),
    "int8": (1, "I8"),
    "uint16": (2, "U16"),
    "int16": (2, "I16"),
    "uint32": (4, "U32"),
    "int32": (4, "I32"),
    "uint64": (8, "U64"),
    "int64": (8, "I64"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "float32": (4, "F32"),
    "float64": (8, "F64"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    "float8_e4m3fnuz": (1, ""),
    "float8_e5m2fnuz": (1, ""),
    "float8_e8m0fnu": (1, ""),
    "float4_e2m1fn_x2": (1, ""),
    "complex32": (4, ""),
    "complex64": (8, ""),
    "complex128": (16, ""),
}

BYTES = "U8"


def is_dtype(dtype: object) -> bool:
    """Whether payloads can hold the type."""
    return isinstance(dtype, str) and dtype in _DTYPES


def item_nbytes(dtype: str) -> int:
    """Bytes of one item.

    Raises:
        ConfigError: payloads cannot hold the type.
    """
    return _find(dtype)[0]


def safetensors_dtype(dtype: str) -> str:
    """The type a payload's header names: `F32`; `U8` where safetensors has no name for it.

    Raises:
        ConfigError: payloads cannot hold the type.
    """
    return _find(dtype)[1] or BYTES


def is_stored_as_bytes(dtype: str) -> bool:
    """Whether the header's shape has the item's bytes as an added last dimension."""
    return not _find(dtype)[1]


def safetensors_item_nbytes(name: str) -> int | None:
    """Bytes of one item of a type that a header names, or None for a name no payload of ours has."""
    return _HEADER_NBYTES.get(name)


def from_safetensors(name: str) -> str | None:
    """Our name of a type that a header names, or None for a name no payload of ours has."""
    return _FROM_HEADER.get(name)


_FROM_HEADER = {text: name for name, (_, text) in _DTYPES.items() if text}
_HEADER_NBYTES = {name: nbytes for nbytes, name in _DTYPES.values() if name}


def _find(dtype: str) -> tuple[int, str]:
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise ConfigError(
            f"dtype {dtype!r} cannot be stored, expected one of {', '.join(_DTYPES)}; convert the tensor"
        ) from None
