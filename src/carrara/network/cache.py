"""What an attention layer keeps of a sequence that grows token by token."""

import torch
from torch import Tensor


class Cache:
    """Keys and values of one attention layer, so that each token's are computed once.

    Args:
        capacity: tokens that there will be at most; room for them is taken at the first `append`.

    Attributes:
        length: tokens that are in it.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add those of the next n tokens, both (B, heads, n, d).

        Raises:
            ValueError: more tokens than there is room for.
        """
        end = self.length + keys.shape[-2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not go into a cache for {self.capacity}")
        if self.length == 0:
            shape = (*keys.shape[:-2], self.capacity, keys.shape[-1])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        self._keys[..., self.length : end, :] = keys
        self._values[..., self.length : end, :] = values
        self.length = end

    @property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, both (B, heads, length, d)."""
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]
