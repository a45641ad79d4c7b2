"""Pictures of embeddings: of captions through the prior, and variations of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.conditioner.image_embedding import ImageEmbedding
from carrara.model.unclip import UnCLIPModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws, Sampling, denoised
from carrara.pipeline.embedding_prior import EmbeddingPrior


@dataclass(frozen=True)
class UnCLIP:
    """Caption → embedding → latent → picture (Ramesh et al. 2022, "Hierarchical text-conditional image generation").

    Attributes:
        model: the decoder.
        prior: makes embeddings of captions, of the same CLIP.
        resolution: of the pictures.
        sampling: of the decoder; a weak model does not guide it.
        embeddings: (N, E) of the pictures to vary, see `varying`; picture k is of row k, whatever its caption.
        one_noise: all pictures have the same, so that they differ by their embeddings alone.
    """

    model: UnCLIPModel
    prior: EmbeddingPrior
    resolution: int
    sampling: Sampling
    embeddings: Tensor | None = None
    one_noise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prior, EmbeddingPrior):
            raise ValueError("part.prior makes no embeddings: name a run of model=prior or model=autoregressive_prior")
        ours, theirs = self.model.clip.image_projection.weight, self.prior.model.clip.image_projection.weight
        if not ours.is_meta and (ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs.cpu())):
            raise ValueError("part.prior was trained with another CLIP than part.clip: train it with this one")

    @property
    def num_steps(self) -> int:
        return self.sampling.num_steps

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption; see `Pipeline`."""
        if self.embeddings is None:
            embeddings = self.prior(captions, indices, seed)
        else:
            embeddings = self.embeddings[list(indices)]
        conditioner = self.model.predictor.conditioner
        assert isinstance(conditioner, ImageEmbedding)
        everywhere = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
        positive, negative = conditioner(embeddings), conditioner(conditioner.dropped(embeddings, everywhere))
        shape = self.model.autoencoder.latent_shape(self.resolution, self.resolution)
        draws = Draws(seed, torch.as_tensor([0 if self.one_noise else index for index in indices]))
        return self.decode(denoised(self.model, positive, negative, shape, draws, self.sampling, on_step))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] from latents."""
        return self.model.autoencoder.decode(z).float().clamp(-1, 1)

    @torch.no_grad()
    def varying(self, images: Tensor, count: int) -> "UnCLIP":
        """This pipeline for variations of one picture, or for the way from one to another.

        Args:
            images: (1 or 2, 3, R, R) in [−1, 1].
            count: of variations, each of other noise; or of steps on the great circle between the embeddings, ends
                included, all of one noise (section 3.2).
        """
        ends = self.model.clip.image_directions(images.to(self.model.device))
        shares = torch.linspace(0, 1, count, device=ends.device)[:, None]
        way = slerp(ends[:1], ends[-1:], shares)
        return replace(self, embeddings=way, one_noise=len(images) == 2)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Points (N, E) at shares (N, 1) of the way from a (1, E) to b (1, E) on the sphere they lie on (Shoemake 1985)."""
    angle = F.cosine_similarity(a, b).clamp(-1, 1).arccos()[:, None]
    if float(angle) < 1e-4:  # the same direction: sines vanish
        return a + share * (b - a)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
