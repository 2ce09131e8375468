"""Samples lie inside their tensors, in each of them, elsewhere each time; changes are found."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktrain.snapshot.witness import HostBytes, OnDevice, Witness, choose_samples


class Copying:
    """Tensors, a witness, and a copy that is made when the test says so."""

    def __init__(self, tensors: list[torch.Tensor], *, turn: int = 1, all_bytes: bool = False) -> None:
        self.tensors = tensors
        self.copies = [torch.empty_like(tensor) for tensor in tensors]
        places = [
            numpy.array([tensor.data_ptr() for tensor in group], numpy.uint64) for group in (tensors, self.copies)
        ]
        sizes = numpy.array([tensor.nbytes for tensor in tensors], numpy.uint64)
        host = HostBytes(places[0], sizes, places[1])
        self.witness = Witness(tensors, host, [], turn=turn, all_bytes=all_bytes, num_threads=2)

    def copy(self) -> str | None:
        for copy, tensor in zip(self.copies, self.tensors, strict=True):
            copy.copy_(tensor)
        return self.witness.problem_of_copies()


@given(
    sizes=st.lists(st.integers(4096, 200_000), min_size=1, max_size=20),
    budget=st.integers(0, 100_000),
    turn=st.integers(1, 1000),
)
def test_samples_of_any_sizes_lie_in_every_tensor_and_keep_the_budget(sizes: list[int], budget: int, turn: int) -> None:
    of_each = numpy.array(sizes, numpy.uint64)
    owners, begins, lengths = choose_samples(of_each, budget, turn)
    assert sorted(set(owners.tolist())) == list(range(len(sizes)))
    if sum(sizes) <= budget:
        assert begins.tolist() == [0] * len(sizes) and lengths.tolist() == sizes
        return
    run = int(lengths[0])
    assert (begins + lengths <= of_each[owners]).all() and (lengths == run).all() and 256 <= run <= 4096
    places = numpy.cumsum([0, *sizes[:-1]]).astype(numpy.uint64)[owners] + begins
    assert (numpy.diff(places) >= run).all()  # none twice
    assert lengths.sum() <= budget + run * len(sizes)


def test_samples_of_many_saves_come_to_every_place() -> None:
    seen = numpy.zeros(1 << 16, bool)
    for turn in range(1, 400):
        _, begins, lengths = choose_samples(numpy.array([1 << 16], numpy.uint64), 9000, turn)
        for begin, nbytes in zip(begins.tolist(), lengths.tolist(), strict=True):
            seen[begin : begin + nbytes] = True
    assert seen.all()


def test_witness_of_unchanged_tensors_says_nothing_even_of_nan() -> None:
    copying = Copying([torch.full((2000,), float("nan")), torch.randn(2000)])
    assert copying.copy() is None and copying.witness.problem_of_tensors() is None


@pytest.mark.parametrize("at", [0, 777, 4999])
def test_witness_of_a_small_state_finds_one_element_changed_by_data(at: int) -> None:
    copying = Copying([torch.zeros(5000), torch.zeros(5000)])
    copying.tensors[1].data[at] = 1.0
    assert "around torch's version counter" in str(copying.copy())


def test_witness_finds_what_was_changed_and_changed_back_while_it_was_copied() -> None:
    copying = Copying([torch.zeros(5000)])
    copying.tensors[0].data.add_(1.0)  # as an evaluation with other weights does
    for copy, tensor in zip(copying.copies, copying.tensors, strict=True):
        copy.copy_(tensor)
    copying.tensors[0].data.sub_(1.0)
    assert copying.witness.problem_of_tensors() is None
    assert copying.witness.problem_of_copies() is not None


def test_witness_of_a_change_after_the_copy_leaves_the_copy_good() -> None:
    copying = Copying([torch.zeros(5000)])
    assert copying.copy() is None
    copying.tensors[0].data.add_(1.0)
    assert copying.witness.problem_of_copies() is None
    assert copying.witness.problem_of_tensors() is not None


def test_witness_finds_a_write_that_changes_no_byte_by_its_version() -> None:
    copying = Copying([torch.zeros(10), torch.zeros(7, 300)])
    copying.tensors[1].zero_()
    assert "shape [7, 300]" in str(copying.copy())


def test_witness_of_a_large_state_finds_what_changes_all_of_a_tensor() -> None:
    for at in range(2):
        copying = Copying([torch.zeros(5 << 20), torch.zeros(2000)])  # 20 MiB
        copying.tensors[at].data += 1
        assert copying.copy() is not None


def test_witness_of_all_bytes_finds_one_element_of_a_large_state() -> None:
    copying = Copying([torch.zeros(5 << 20)], all_bytes=True)
    copying.tensors[0].data[3_333_333] = 1.0
    assert copying.copy() is not None


def on_device(tensor: torch.Tensor) -> OnDevice:
    """A device is another memory; that of the host can play it."""
    return OnDevice(tensor, memoryview(bytearray(16 + tensor.nbytes)), 16)


NOTHING = numpy.zeros(0, numpy.uint64)
NO_HOST = HostBytes(NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize("is_changed", [False, True])
def test_witness_compares_samples_of_devices_with_their_copies(is_changed: bool) -> None:
    pair = on_device(torch.randn(50, 40))
    witness = Witness([pair.tensor], NO_HOST, [pair], turn=3, all_bytes=False, num_threads=1)
    if is_changed:
        pair.tensor.data.add_(1.0)
    for one in (pair, *witness.samples):
        one.copy().copy_(one.tensor)
    assert (witness.problem_of_copies() is not None) == is_changed


def test_witness_of_tensors_on_two_devices_finds_good_copies_good() -> None:
    tensors = [torch.arange(400.0), torch.arange(900.0), torch.arange(600.0)]
    pairs = [on_device(tensor) for tensor in tensors]
    witness = Witness(tensors, NO_HOST, pairs, turn=3, all_bytes=False, num_threads=1)
    for one in (*pairs, *witness.samples):
        one.copy().copy_(one.tensor)
    # As from two devices: the samples of each are joined by themselves.
    first = witness.samples[0]
    witness.samples[:] = [
        OnDevice(first.tensor[:256], first.memory[:256]),
        OnDevice(first.tensor[256:], first.memory[256:]),
    ]
    assert witness.problem_of_copies() is None
