"""Samples lie inside their tensors, in each of them, elsewhere each time; changes are found."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktrain.snapshot.witness import HostBytes, Witness, choose_samples

RUN_NBYTES = 256


def host(tensors: list[torch.Tensor]) -> HostBytes:
    return HostBytes(
        numpy.array([tensor.data_ptr() for tensor in tensors], numpy.uint64),
        numpy.array([tensor.nbytes for tensor in tensors], numpy.uint64),
    )


def watch(tensors: list[torch.Tensor], *, turn: int = 1, all_bytes: bool = False) -> Witness:
    return Witness(tensors, host(tensors), turn=turn, all_bytes=all_bytes, num_threads=2)


@given(
    sizes=st.lists(st.integers(4096, 200_000), min_size=1, max_size=20),
    budget=st.integers(0, 100_000),
    turn=st.integers(1, 1000),
)
def test_samples_of_any_sizes_lie_in_every_tensor_and_keep_the_budget(sizes: list[int], budget: int, turn: int) -> None:
    begins = numpy.cumsum([0, *sizes[:-1]]).astype(numpy.uint64) + numpy.uint64(1 << 30)
    places = HostBytes(begins, numpy.array(sizes, numpy.uint64))
    addresses, lengths = choose_samples(places, budget=budget, turn=turn)
    if sum(sizes) <= budget:
        assert addresses.tolist() == begins.tolist() and lengths.tolist() == sizes
        return
    owner = numpy.searchsorted(begins, addresses, side="right") - 1
    assert set(owner.tolist()) == set(range(len(sizes)))
    ends = begins[owner] + places.sizes[owner]
    assert (addresses + lengths <= ends).all() and (lengths == RUN_NBYTES).all()
    assert (numpy.diff(addresses) >= RUN_NBYTES).all()  # none twice
    assert lengths.sum() <= budget + RUN_NBYTES * len(sizes)


def test_samples_of_many_saves_come_to_every_place() -> None:
    places = HostBytes(numpy.array([0], numpy.uint64), numpy.array([1 << 16], numpy.uint64))
    seen = numpy.zeros(1 << 16, bool)
    for turn in range(1, 400):
        for address in choose_samples(places, budget=4096, turn=turn)[0].tolist():
            seen[address : address + RUN_NBYTES] = True
    assert seen.all()


def test_witness_of_unchanged_tensors_says_nothing_even_of_nan() -> None:
    tensors = [torch.full((2000,), float("nan")), torch.randn(2000)]
    assert watch(tensors).changed() is None


@pytest.mark.parametrize("at", [0, 777, 4999])
def test_witness_of_a_small_state_finds_one_element_changed_by_data(at: int) -> None:
    tensors = [torch.zeros(5000), torch.zeros(5000)]
    witness = watch(tensors)
    tensors[1].data[at] = 1.0
    assert "around torch's version counter" in str(witness.changed())


def test_witness_finds_a_write_that_changes_no_byte_by_its_version() -> None:
    tensors = [torch.zeros(10), torch.zeros(7, 300)]
    witness = watch(tensors)
    tensors[1].zero_()
    assert "shape [7, 300]" in str(witness.changed())


def test_witness_of_a_large_state_finds_what_changes_all_of_a_tensor() -> None:
    tensors = [torch.zeros(5 << 20), torch.zeros(2000)]  # 20 MiB
    for changed in tensors:
        witness = watch(tensors)
        changed.data += 1
        assert witness.changed() is not None


def test_witness_of_all_bytes_finds_one_element_of_a_large_state() -> None:
    tensors = [torch.zeros(5 << 20)]
    witness = watch(tensors, all_bytes=True)
    tensors[0].data[3_333_333] = 1.0
    assert witness.changed() is not None
