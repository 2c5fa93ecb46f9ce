"""Networks that several test files share."""

from __future__ import annotations

import pytest
from flagged_networks import (
    EPS,
    Batch,
    trained,
)
from small_cnn import digits
from torch import nn


@pytest.fixture(scope="module")
def test_images() -> Batch:
    return digits("test", 48)


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    return trained(*digits("train", 1500))


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return trained(*digits("train", 1500), eps=EPS)
