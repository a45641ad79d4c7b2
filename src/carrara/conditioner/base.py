"""What every conditioner promises."""

from typing import Any

from torch import nn

from carrara.network.conditioning import Conditioning


class Conditioner(nn.Module):
    """As a rule captions -> Conditioning; the empty one is the unconditional case of guidance (Ho & Salimans 2022).

    Attributes:
        width: features of a token and of the pooled vector; the network's `context_width` and `pooled_width`.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, captions: Any, /) -> Conditioning:
        raise NotImplementedError
