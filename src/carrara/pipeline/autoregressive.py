"""Captions to pictures token by token, and the best of several by the evaluator (Ramesh et al. 2021, section 2.6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara import keyed_random
from carrara.evaluator.clip import CLIP
from carrara.model.autoregressive import AutoregressiveModel
from carrara.network.autoregressive import Choose
from carrara.pipeline.base import OnStep
from carrara.pipeline.token_draw import drawn, truncated


class AutoregressiveToImage:
    """Caption → one token after the other → decode once.

    Args:
        model: transformer and discrete auto-encoder, with the weights they have now.
        resolution: of the pictures.
        evaluator: ranks the candidates.
        temperature: that logits are divided by: below 1 likely tokens become likelier.
        top_k: only so many of the likeliest tokens are drawn from; None for all.
        top_p: only the fewest likeliest tokens that make up this probability (Holtzman et al. 2020, eq. 2); None: all.
        guidance_scale: logits are extrapolated from those of the empty caption to those of the caption, and beyond; 1
            is off. It comes first, then the temperature, top_k and top_p.
        candidates: so many pictures are made of each caption; the one most similar to it for the evaluator is taken.

    Raises:
        ValueError: a setting that is impossible.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        resolution: int,
        evaluator: CLIP | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance_scale: float,
        candidates: int,
    ):
        if not temperature > 0:
            raise ValueError(f"pipeline.temperature={temperature} must be above 0; top_k=1 takes the likeliest token")
        if top_k is not None and not _whole(top_k):
            raise ValueError(f"pipeline.top_k={top_k} must be a whole number of tokens from 1 on, or null for all")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"pipeline.top_p={top_p} must be a probability above 0, or null for all tokens")
        if not _whole(candidates):
            raise ValueError(f"pipeline.candidates={candidates} must be a whole number from 1 on")
        if candidates > 1 and evaluator is None:
            raise ValueError(f"pipeline.candidates={candidates} are ranked by an evaluator: part.evaluator names one")
        self.model, self.resolution, self.evaluator = model, resolution, evaluator
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.guidance_scale, self.candidates = guidance_scale, candidates

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, height, width = self.model.autoencoder.latent_shape(self.resolution, self.resolution)
        return height, width

    @property
    def num_steps(self) -> int:
        return self.grid[0]

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption, see `Pipeline`; `on_step` is told the codes of one more row each time, then zeros."""
        guided = self.guidance_scale != 1
        ids, mask = self.model.network.read([*captions, *([""] * len(captions) if guided else [])])
        numbers = torch.as_tensor(list(indices))
        made = [
            self.model.network.sample(ids, mask, self.grid, self._choose(seed, numbers, candidate))
            for candidate in range(self.candidates)
        ]
        codes = torch.stack([self.model.autoencoder.latents_of(tokens, *self.grid) for tokens in made])
        pictures = torch.stack([self.decode(z) for z in codes])
        best = (self._best(captions, pictures), torch.arange(len(captions), device=codes.device))
        z = codes[best]
        if on_step is not None:
            for row in range(self.num_steps):
                part = torch.zeros_like(z)
                part[:, :, : row + 1] = z[:, :, : row + 1]
                on_step(row, torch.tensor(1 - (row + 1) / self.num_steps), part, part)
        return pictures[best]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] of codes (B, C, h, w)."""
        return self.model.autoencoder.decoded(z).float().clamp(-1, 1)

    def _choose(self, seed: int, numbers: Tensor, candidate: int) -> Choose:
        """What draws a token of each picture: the draw is the picture's own, drawn on the CPU as all noise is."""

        def choose(logits: Tensor, place: int) -> Tensor:
            if len(logits) > len(numbers):
                positive, negative = logits.chunk(2)
                logits = negative + self.guidance_scale * (positive - negative)
            logits = truncated(logits / self.temperature, self.top_k, self.top_p)
            u = keyed_random.uniform(seed, numbers, f"generation/{candidate}/{place}", tuple(logits.shape[1:]))
            return drawn(logits, u.to(logits.device))

        return choose

    def _best(self, captions: list[str], pictures: Tensor) -> Tensor:
        """Of pictures (candidates, B, 3, R, R) the candidate (B,) that is most similar to each caption."""
        if self.evaluator is None or self.candidates == 1:
            return torch.zeros(len(captions), dtype=torch.int64, device=pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            texts = self.evaluator.embed_texts(captions)
            similarity = [F.cosine_similarity(self.evaluator.embed_images(of), texts) for of in pictures]
        return torch.stack(similarity).argmax(0)


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
