from __future__ import annotations

import pytest
import torch

from ktrain.errors import ConfigError
from ktrain.train.loss import Loss, as_loss, mean_over_ranks


def test_loss_totals_are_detached_doubles() -> None:
    total = torch.ones(3, requires_grad=True).sum()
    found = Loss(total, count=7).totals()
    assert found.tolist() == [3.0, 7.0]
    assert found.dtype is torch.float64 and not found.requires_grad


def test_loss_count_as_tensor_is_taken() -> None:
    assert Loss(torch.tensor([2.0]), count=torch.tensor(5)).totals().tolist() == [2.0, 5.0]


@pytest.mark.parametrize("value", [torch.ones(2), 3.0])
def test_loss_of_no_single_tensor_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="expected one summed value as a tensor"):
        Loss(value, count=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [torch.ones(4, 2), (torch.ones(4), 1), {"name": "x", "x": torch.ones(4)}])
def test_as_loss_bare_mean_is_weighed_by_the_leading_dimension(batch: object) -> None:
    assert as_loss(torch.tensor(0.5), batch).totals().tolist() == [2.0, 4.0]


@pytest.mark.parametrize("batch", [torch.tensor(1.0), "text", [], {}])
def test_as_loss_batch_without_dimension_is_refused(batch: object) -> None:
    with pytest.raises(ConfigError, match="no leading dimension"):
        as_loss(torch.tensor(0.5), batch)


@pytest.mark.parametrize("count", [0.0, -1.0, float("nan")])
def test_mean_over_ranks_count_not_positive_is_refused(count: float) -> None:
    with pytest.raises(ConfigError, match="step 3: expected a count above 0"):
        mean_over_ranks(torch.tensor([1.0, count], dtype=torch.float64), "step 3")
