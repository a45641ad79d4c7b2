"""The network of DALL-E 2's autoregressive prior: the components of an embedding, one after the other."""

import torch
from torch import Tensor, nn

from carrara.network.attention import features_of_heads, rotary_angles
from carrara.network.autoregressive import Choose, DecoderBlock, continued
from carrara.network.conditioning import Conditioning
from carrara.network.embedding_tokens import EmbeddingTokens
from carrara.network.layers import RMSNorm, zero_


class EmbeddingTransformer(nn.Module):
    """Logits of each token of an embedding from what it is told and those before it (Ramesh et al. 2022, section 2.2).

    The sequence is CLIP's embedding of the caption, the caption's tokens, and those of the picture's embedding. All
    components have one table of buckets; a learned vector tells which is to be guessed. Rotary positions count from the
    first component, the caption's backwards, so that it may be padded to any length.

    Args:
        embedding_width: E; of the conditioning's pooled vector, too.
        context_width: features of the conditioning's tokens.
        num_components: N; see `EmbeddingTokens`.
        num_buckets: K, of each component.
        width: features of a token.
        depth: blocks.
        heads: attention heads.
        expansion: hidden width of the feed-forward layers, in widths, rounded.
    """

    not_hidden = ("project_text", "project_pooled", "project_out")

    def __init__(
        self,
        embedding_width: int,
        context_width: int,
        num_components: int,
        num_buckets: int,
        width: int,
        depth: int,
        heads: int,
        expansion: float,
    ):
        super().__init__()
        self.num_components = num_components
        self.head_width = features_of_heads(width, heads, 2)
        self.tokens = EmbeddingTokens(embedding_width, num_components, num_buckets)
        self.project_pooled = nn.Linear(embedding_width, width)
        self.project_text = nn.Linear(context_width, width)
        self.places = nn.Parameter(0.5 * torch.randn(num_components, width))
        self.buckets = nn.Embedding(num_buckets, width)
        nn.init.normal_(self.buckets.weight, std=0.5)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, round(expansion * width)) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.project_out = zero_(nn.Linear(width, num_buckets))

    def forward(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        """tokens (B, N) int64 and what is told of their captions -> all logits (B, N, K) in one pass."""
        told, angles, mask = self._told(conditioning)
        following = self.buckets(tokens[:, :-1]) + self.places[1:]
        x = torch.cat([told, following.to(told.dtype)], dim=1)
        mask = nn.functional.pad(mask, (0, self.num_components - 1), value=True)
        for block in self.blocks:
            x = block(x, angles, mask=mask)
        return self.project_out(self.norm(x[:, -self.num_components :]))

    def sample(self, conditioning: Conditioning, choose: Choose) -> Tensor:
        """Tokens (B, N), chosen one after the other; each goes through the network once.

        Args:
            conditioning: of B captions; or of n · B, to choose each token by the logits of n captions.
            choose: is asked for each token, 0 … N − 1.
        """
        told, angles, mask = self._told(conditioning)
        following = self.places.roll(-1, 0)  # the last token is followed by none

        def answer(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
            token = choose(self.project_out(self.norm(x)).float(), place)
            vector = self.buckets(token.repeat(len(told) // len(token))) + following[place]
            return token, vector.to(told.dtype)

        return continued(self.blocks, told, angles, self.num_components, answer, mask)

    def _told(self, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """What there is before the first component is guessed, and what guesses it.

        Returns:
            Tokens (B, 1 + L + 1, C); angles (1 + L + N, C / heads / 2) of all positions; mask (B, 1 + L + 1) bool.
        """
        text = self.project_text(conditioning.tokens)
        pooled = self.project_pooled(conditioning.pooled)[:, None]
        first = self.places[0].to(text.dtype).expand(len(text), 1, -1)
        length = text.shape[1]
        positions = torch.arange(self.num_components, device=text.device)
        backwards = -torch.arange(1, length + 2, device=text.device)
        angles = rotary_angles(torch.cat([backwards, positions]), self.head_width)
        mask = nn.functional.pad(conditioning.mask, (1, 1), value=True)
        return torch.cat([pooled.to(text.dtype), text, first], dim=1), angles, mask
