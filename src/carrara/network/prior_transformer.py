"""The noise predictor of DALL-E 2's prior: a transformer over one vector and what it is told."""

import torch
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.layers import sinusoidal_embedding
from carrara.network.transformer import EncoderBlock

_SPECIAL = 4  # tokens besides the caption's: its embedding, the time, the noisy vector, and the one that answers


class PriorTransformer(nn.Module):
    """x (B, E), time (B,), conditioning -> (B, E) (Ramesh et al. 2022, "unCLIP", section 2.2).

    The sequence is the caption's tokens, CLIP's embedding of it, the time, the noisy embedding, and a learned token
    whose answer is read.

    Args:
        embedding_width: E; of the conditioning's pooled vector, too.
        context_width: features of the conditioning's tokens.
        width: features of a token.
        depth: blocks.
        heads: attention heads.
    """

    def __init__(self, embedding_width: int, context_width: int, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.project_text = nn.Linear(context_width, width)
        self.project_pooled = nn.Linear(embedding_width, width)
        self.project_in = nn.Linear(embedding_width, width)
        self.width = width
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.special = nn.Parameter(torch.randn(_SPECIAL, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, embedding_width)

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        features = sinusoidal_embedding(time, self.width).to(self.special.dtype)
        told = self.project_pooled(conditioning.pooled), self.time_embedding(features), self.project_in(x)
        special = torch.stack([*told, torch.zeros_like(told[0])], dim=1) + self.special
        text = self.project_text(conditioning.tokens)
        tokens = torch.cat([text, special.to(text.dtype)], dim=1)
        mask = torch.nn.functional.pad(conditioning.mask, (0, _SPECIAL), value=True)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.project_out(self.norm(tokens[:, -1]))
