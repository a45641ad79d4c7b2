"""What a process of a run does beside training."""

import itertools
from typing import Any, cast

import pytest
import torch

from carrara.data.module import ShardData
from carrara.worker import images_to_measure


class Endless:
    """A loader alone: whatever the batch, it has more of them."""

    def __init__(self, groups: int):
        self.groups = groups

    def train_loader(self, batch_size: int) -> Any:
        assert batch_size % self.groups == 0
        return ({"images": torch.zeros(batch_size, 3, 2, 2, dtype=torch.uint8)} for _ in itertools.count())


@pytest.mark.parametrize(("groups", "at_once"), [(1, 16), (3, 15), (32, 32)])
def test_one_device_measures_in_batches_that_it_has_room_for(groups, at_once):
    """A global batch is shared by all of them in training."""
    sizes = [len(images) for images in images_to_measure(cast(ShardData, Endless(groups)))]
    assert set(sizes) == {at_once} and 4096 <= sum(sizes) < 4096 + at_once
