"""Captions to pictures token by token, and the best of several by the evaluator (Ramesh et al. 2021, section 2.6)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carrara.evaluator.clip import CLIP
from carrara.model.autoregressive import AutoregressiveModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.candidates import check_candidates, most_similar
from carrara.pipeline.token_draw import TokenDraw


class AutoregressiveToImage:
    """Caption → one token after the other → decode once.

    Args:
        model: transformer and discrete auto-encoder, with the weights they have now.
        resolution: of the pictures.
        evaluator: ranks the candidates.
        temperature, top_k, top_p, guidance_scale: see `TokenDraw`.
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
        self.draw = TokenDraw(temperature, top_k, top_p, guidance_scale)
        check_candidates(candidates)
        if candidates > 1 and evaluator is None:
            raise ValueError(f"pipeline.candidates={candidates} are ranked by an evaluator: part.evaluator names one")
        self.model, self.resolution = model, resolution
        self.evaluator, self.candidates = evaluator, candidates

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
        ids, mask = self.model.network.read([*captions, *([""] * len(captions) if self.draw.guided else [])])
        numbers = torch.as_tensor(list(indices))
        made = [
            self.model.network.sample(ids, mask, self.grid, self.draw.chooser(seed, numbers, f"generation/{candidate}"))
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

    def _best(self, captions: list[str], pictures: Tensor) -> Tensor:
        """Of pictures (candidates, B, 3, R, R) the candidate (B,) that is most similar to each caption."""
        if self.evaluator is None or self.candidates == 1:
            return torch.zeros(len(captions), dtype=torch.int64, device=pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            texts = self.evaluator.embed_texts(captions)
            return most_similar(torch.stack([self.evaluator.embed_images(of) for of in pictures]), texts)
