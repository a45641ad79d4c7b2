"""The noise predictor as a transformer over patches of the picture.

Peebles & Xie 2023 (DiT: patches, adaLN-zero), with the norms, feed-forward and positions of later transformers: RMSNorm
(Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), normalised queries and keys, axial rotary positions (Heo et al. 2024).
"""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from carrara.network.attention import Attention, attend, axial_angles, features_of_heads, over_grid, rotate
from carrara.network.conditioning import Conditioning
from carrara.network.layers import RMSNorm, SwiGLU, sinusoidal_embedding, zero_

TIME_FEATURES = 256  # of the sinusoidal embedding, as published


class AdaptiveNorm(nn.Module):
    """RMSNorm of tokens (B, N, C), scaled and shifted as the embedding (B, C) says (Peebles & Xie 2023, section 3.2).

    It starts as the bare norm.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, elementwise_affine=False)
        self.modulation = zero_(nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Gate(nn.Module):
    """A branch (B, N, C) times what the embedding (B, C) says: the zero of adaLN-zero, as it starts closed."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = zero_(nn.Linear(width, width))

    def forward(self, branch: Tensor, embedding: Tensor) -> Tensor:
        return branch * self.modulation(embedding)[:, None]


class CrossBlock(nn.Module):
    """Self-attention of the image, cross-attention to the text, feed-forward.

    The cross-attention is as in PixArt-α (Chen et al. 2023, section 2.2): not modulated, its last layer starts at zero.
    """

    def __init__(self, width: int, heads: int, hidden: int, context_width: int):
        super().__init__()
        self.norm1 = AdaptiveNorm(width)
        self.self_attention = Attention(width, heads, qk_norm=True, norm=RMSNorm)
        self.gate1 = Gate(width)
        self.norm2 = RMSNorm(width)
        self.cross_attention = Attention(width, heads, context_width, qk_norm=True, norm=RMSNorm)
        zero_(self.cross_attention.out)
        self.norm3 = AdaptiveNorm(width)
        self.feed_forward = SwiGLU(width, hidden)
        self.gate3 = Gate(width)

    def forward(
        self, x: Tensor, text: Tensor, embedding: Tensor, mask: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, C), text tokens (B, L, D), their mask (B, L) -> both, the text as it was."""
        x = x + self.gate1(self.self_attention(self.norm1(x, embedding), angles=angles), embedding)
        x = x + self.cross_attention(self.norm2(x), text, mask)
        return x + self.gate3(self.feed_forward(self.norm3(x, embedding)), embedding), text


class KeyValueStream(nn.Module):
    """The weights by which the tokens of one modality are attended to in a joint block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = AdaptiveNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.key_norm = RMSNorm(width)
        self.value = nn.Linear(width, width, bias=False)

    def split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Of normed tokens (B, N, C)."""
        return self.split(self.key_norm(self.key(h))), self.split(self.value(h))


class Stream(KeyValueStream):
    """The weights of one modality that also attends, and goes on to the next block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__(width, heads)
        self.query = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(width)
        self.out = nn.Linear(width, width)
        self.gate1 = Gate(width)
        self.norm2 = AdaptiveNorm(width)
        self.feed_forward = SwiGLU(width, hidden)
        self.gate2 = Gate(width)

    def queries(self, h: Tensor) -> Tensor:
        """Of normed tokens (B, N, C)."""
        return self.split(self.query_norm(self.query(h)))

    def add(self, x: Tensor, answer: Tensor, embedding: Tensor) -> Tensor:
        """Tokens (B, N, C) with the attention's answer to them (B, N, C), then the feed-forward branch."""
        x = x + self.gate1(self.out(answer), embedding)
        return x + self.gate2(self.feed_forward(self.norm2(x, embedding)), embedding)


class JointBlock(nn.Module):
    """One attention over image and text tokens, each with weights of its own (Esser et al. 2024, section 4, MM-DiT).

    Text keys are not turned, as if all words stood at the picture's origin: the order of the words is in the tokens
    already, by the text transformer's own rotary positions, and a number of words is no distance in a picture.

    Args:
        width: features of a token.
        heads: attention heads.
        hidden: of the feed-forward layers.
        last: nothing is made of the text after this block, so here it has only what is attended to.
    """

    def __init__(self, width: int, heads: int, hidden: int, last: bool):
        super().__init__()
        self.image = Stream(width, heads, hidden)
        self.text = KeyValueStream(width, heads) if last else Stream(width, heads, hidden)

    def forward(
        self, x: Tensor, text: Tensor, embedding: Tensor, mask: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, C), text tokens (B, L, C), their mask (B, L) -> both after the block."""
        image_h, text_h = self.image.norm1(x, embedding), self.text.norm1(text, embedding)
        q = rotate(self.image.queries(image_h), angles)
        (k, v), (text_k, text_v) = self.image.keys_values(image_h), self.text.keys_values(text_h)
        k, v = torch.cat([rotate(k, angles), text_k], dim=2), torch.cat([v, text_v], dim=2)
        if isinstance(self.text, Stream):
            q = torch.cat([q, self.text.queries(text_h)], dim=2)
        mask = F.pad(mask, (x.shape[1], 0), value=True)
        answer = attend(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)
        if isinstance(self.text, Stream):
            text = self.text.add(text, answer[:, x.shape[1] :], embedding)
        return self.image.add(x, answer[:, : x.shape[1]], embedding), text


class DiT(nn.Module):
    """x (B, C, H, W), time (B,), conditioning -> (B, C, H, W), of any size that the patch divides.

    Time and pooled text go into the adaLN-zero of every block. Sinusoidal positions are added to the patches, as
    published: rotary ones only tell how far tokens are from one another, and "on the left" is a place.

    Args:
        in_channels: channels of x and of the output.
        patch: height and width of what becomes one token.
        width: features of a token; 4 must divide those of a head.
        depth: number of blocks.
        heads: attention heads.
        expansion: hidden width of the feed-forward layers, in widths, rounded. They are gated: 2.667 makes them as
            large as the paper's with 4.
        context_width: features of the conditioning's tokens.
        pooled_width: features of the conditioning's pooled vector, added to the time embedding.
        text: "cross": each block attends to the text's tokens after its own; "joint": to both at once, and the text's
            tokens change from block to block by weights of their own (1.5 to 1.7 times the parameters).
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    not_hidden = ("project_in", "project_out")

    def __init__(
        self,
        in_channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        expansion: float,
        context_width: int,
        pooled_width: int,
        text: str,
        checkpointing: bool = False,
    ):
        super().__init__()
        if text not in ("cross", "joint"):
            raise ValueError(f"network.text is {text!r}, not cross or joint")
        self.patch = patch
        self.width = width
        self.head_width = features_of_heads(width, heads, 4)
        self.checkpointing = checkpointing
        self.time_embedding = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_embedding = nn.Linear(pooled_width, width)
        self.project_in = nn.Linear(in_channels * patch**2, width)
        hidden = round(expansion * width)
        self.project_text: nn.Module
        if text == "cross":
            self.project_text = nn.Identity()  # the keys and values are its projection
            self.blocks = nn.ModuleList(CrossBlock(width, heads, hidden, context_width) for _ in range(depth))
        else:
            self.project_text = nn.Linear(context_width, width)
            self.blocks = nn.ModuleList(
                JointBlock(width, heads, hidden, last=block == depth - 1) for block in range(depth)
            )
        self.norm_out = AdaptiveNorm(width)
        self.project_out = zero_(nn.Linear(width, in_channels * patch**2))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"a patch of {self.patch} does not divide a height and width of {tuple(x.shape[2:])}")
        features = sinusoidal_embedding(time, TIME_FEATURES).to(self.project_in.weight.dtype)
        embedding = F.silu(self.time_embedding(features) + self.pooled_embedding(conditioning.pooled))
        patches = F.pixel_unshuffle(x, self.patch)
        height, width = patches.shape[2:]
        h = self.project_in(patches.flatten(2).transpose(1, 2))
        positions = sinusoidal_positions(height, width, self.width, x.device)
        h = h + positions.to(h.dtype)  # a float32 sum would make all that follows float32
        angles = axial_angles(height, width, self.head_width, x.device)
        text = self.project_text(conditioning.tokens)
        for block in self.blocks:
            h, text = self._run(block, h, text, embedding, conditioning.mask, angles)
        patches = self.project_out(self.norm_out(h, embedding)).transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(patches, self.patch)

    def _run(self, block: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def sinusoidal_positions(height: int, width: int, features: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a picture's tokens (height · width, features), row by row (Peebles & Xie 2023, section 3.2).

    Half of the features tell the row, half the column.
    """
    rows = sinusoidal_embedding(torch.arange(height, device=device), features // 2)
    columns = sinusoidal_embedding(torch.arange(width, device=device), features // 2)
    return over_grid(rows, columns)
