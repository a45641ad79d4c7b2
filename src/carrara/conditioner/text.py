"""A text transformer trained together with the noise predictor."""

import torch
from torch import nn

from carrara.conditioner.base import Conditioner
from carrara.network.conditioning import Conditioning
from carrara.network.tokenizer import Tokenizer
from carrara.network.transformer import TextTransformer


class Text(Conditioner):
    """Captions -> one vector a token and their mean.

    Args:
        vocab_size: most token ids.
        max_length: most tokens of a caption, start and end included.
        width: see `Conditioner`.
        depth: transformer blocks.
        heads: attention heads.
    """

    def __init__(self, vocab_size: int, max_length: int, width: int, depth: int, heads: int):
        super().__init__(width)
        self.tokenizer = Tokenizer(vocab_size, max_length)
        self.transformer = TextTransformer(vocab_size, max_length, width, depth, heads)

    def forward(self, captions: list[str]) -> Conditioning:
        device = self.transformer.angles.device
        ids, mask = self.tokenizer(captions)
        ids, mask = ids.to(device), mask.to(device)
        tokens, pooled = self.transformer(ids, mask)
        return Conditioning(tokens, mask, pooled)


class Unconditional(Conditioner):
    """Ignores captions: one learned token for all pictures. For shards without captions.

    Args:
        width: see `Conditioner`.
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.token = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, captions: list[str]) -> Conditioning:
        tokens = self.token.expand(len(captions), 1, -1)
        mask = torch.ones(len(captions), 1, dtype=torch.bool, device=tokens.device)
        return Conditioning(tokens, mask, tokens[:, 0])
