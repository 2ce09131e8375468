"""The table of dtypes against torch's own."""

from __future__ import annotations

import pytest
import torch

from ktrain.errors import ConfigError
from ktrain.format import dtype as dtypes


@pytest.mark.parametrize("name", list(dtypes._DTYPES))
def test_item_nbytes_every_dtype_is_what_torch_says(name: str) -> None:
    assert dtypes.item_nbytes(name) == getattr(torch, name).itemsize


def test_dtypes_cover_every_type_that_tensors_are_computed_with() -> None:
    quantized = {"quint8", "qint8", "qint32", "quint4x2", "quint2x4"}
    known = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    # Types of single bits and odd widths are shells without operations, in torch 2.13 too.
    shells = {name for name in known if name.startswith("bits") or name.strip("uint") in set("1234567")}
    assert known - quantized - shells == set(dtypes._DTYPES)


def test_item_nbytes_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="'quint8'"):
        dtypes.item_nbytes("quint8")
