"""What a process of a run does beside training."""

import itertools
from typing import Any, cast

import torch

from carrara.data.module import ShardData
from carrara.worker import images_to_measure


class Endless:
    """A loader alone: whatever the batch, it has more of them."""

    def train_loader(self, batch_size: int) -> Any:
        return ({"images": torch.zeros(batch_size, 3, 2, 2, dtype=torch.uint8)} for _ in itertools.count())


def test_one_device_measures_in_batches_that_it_has_room_for():
    """A global batch is shared by all of them in training."""
    sizes = [len(images) for images in images_to_measure(cast(ShardData, Endless()))]
    assert max(sizes) <= 16 and sum(sizes) == 4096
