"""The plain mean of numbers, over all ranks."""

import torch
from torch import Tensor

from carrara.metric.float64_metric import Float64Metric


class Mean(Float64Metric):
    """Mean of values weighted by how many samples each stands for."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_sum("count")

    def update(self, value: Tensor, count: int) -> None:
        """Add a scalar that is the mean of `count` samples."""
        self.total = self.total + value.double() * count
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; nan before any value."""
        return torch.as_tensor(self.total / self.count)
