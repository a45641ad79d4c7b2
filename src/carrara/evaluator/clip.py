"""Image tower, text tower and their similarity (Radford et al. 2021, "CLIP")."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.network.layers import norm_groups, without_autocast
from carrara.network.tokenizer import Tokenizer
from carrara.network.transformer import EncoderBlock, TextTransformer


class ImageTower(nn.Module):
    """Convolutions down to a grid of tokens, then a transformer; the mean token is the picture's vector.

    Args:
        resolution: pictures' height and width.
        patch: pixels a token spans, a power of two; the stem halves the resolution until it gets there.
        width: features of a token.
        depth: transformer blocks.
        heads: attention heads.
    """

    def __init__(self, resolution: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        levels = patch.bit_length() - 1
        if patch < 2 or 2**levels != patch or resolution % patch:
            raise ValueError(f"evaluator.patch={patch} must be a power of two from 2 on that divides {resolution}")
        widths = [max(width >> (levels - 1 - level), 16) for level in range(levels)]
        stem: list[nn.Module] = []
        for c_in, c_out in zip([3, *widths], widths, strict=False):
            stem += [
                nn.Conv2d(c_in, c_out, 3, padding=1, stride=2),
                nn.GroupNorm(norm_groups(c_out), c_out),
                nn.SiLU(),
            ]
        self.stem = nn.Sequential(*stem, nn.Conv2d(widths[-1], width, 3, padding=1))
        self.positions = nn.Parameter(0.02 * torch.randn((resolution // patch) ** 2, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


class CLIP(nn.Module):
    """Two towers into one space, with a learned temperature.

    Args:
        resolution: the pictures' size the image tower works at; others are resized to it.
        patch, image_width, image_depth: the image tower's.
        vocab_size, max_length, text_width, text_depth: the text tower's.
        heads: attention heads of both.
        embedding_width: features of the common space; the Fréchet distance's features, too.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        image_width: int,
        image_depth: int,
        vocab_size: int,
        max_length: int,
        text_width: int,
        text_depth: int,
        heads: int,
        embedding_width: int,
    ):
        super().__init__()
        self.resolution = resolution
        self.embedding_width = embedding_width
        self.image_tower = ImageTower(resolution, patch, image_width, image_depth, heads)
        self.image_projection = nn.Linear(image_width, embedding_width, bias=False)
        self.tokenizer = Tokenizer(vocab_size, max_length)
        self.text_tower = TextTransformer(vocab_size, max_length, text_width, text_depth, heads)
        self.text_projection = nn.Linear(text_width, embedding_width, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [−1, 1] -> (B, embedding_width), not normalised."""
        if images.shape[-1] != self.resolution or images.shape[-2] != self.resolution:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.image_projection(self.image_tower(images))

    def embed_texts(self, captions: list[str]) -> Tensor:
        """B captions -> (B, embedding_width), not normalised."""
        ids, mask = self.tokenizer(captions)
        device = self.log_temperature.device
        return self.text_projection(self.text_tower(ids.to(device), mask.to(device))[1])

    @torch.no_grad()
    def image_directions(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [−1, 1] -> their embeddings' directions (B, embedding_width), of mean square 1."""
        return self._direction(self.embed_images(images))

    @torch.no_grad()
    def text_directions(self, captions: list[str]) -> Tensor:
        """B captions -> their embeddings' directions (B, embedding_width), of mean square 1."""
        return self._direction(self.embed_texts(captions))

    def _direction(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.float(), dim=1) * self.embedding_width**0.5


def info_nce(image: Tensor, text: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch of matching pairs (Radford et al. 2021, figure 3).

    Args:
        image, text: (B, D) embeddings; row i of one matches row i of the other.
        log_temperature: scalar.

    Returns:
        Scalar, log(B) for embeddings that tell nothing.
    """
    scale = torch.exp(-log_temperature)
    with without_autocast(image):  # bfloat16 would round logits of 64 to 100 to halves
        logits = scale * F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    labels = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))
