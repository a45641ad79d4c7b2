"""How near a prior's embeddings come to those of the pictures."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from carrara.callback.score import Setting, prefix
from carrara.metric.mean import Mean
from carrara.model.base import Model
from carrara.model.embedding_prior import EmbeddingPriorModel
from carrara.pipeline.embedding_prior import EmbeddingPrior


class PriorScore:
    """Logs `val/prior_cosine`, of the prior's embeddings with the pictures' own, beside two that it has to beat.

    `val/text_cosine` is that of the captions' embeddings; `val/shuffled_cosine` that of embeddings made for the next
    caption of the chunk, which tell how much is of pictures in general.

    Args:
        pipeline: makes an `EmbeddingPrior` of a model.
        seed: of the embeddings.
        num_images: captions of each split; all if there are fewer.
        batch_size: captions in a chunk.
    """

    def __init__(self, pipeline: Callable[[Model], EmbeddingPrior], seed: int, num_images: int, batch_size: int):
        self.pipeline, self.seed = pipeline, seed
        self.num_images, self.batch_size = num_images, batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, EmbeddingPriorModel)
        prior = self.pipeline(model)
        scores: dict[str, float] = {}
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_images]
            means = {name: Mean().to(setting.device) for name in ("prior", "text", "shuffled")}
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                with setting.autocast():
                    made = prior(batch["captions"], batch["positions"].tolist(), self.seed)
                    truth = model.clip.image_directions(batch["images"].to(setting.device).float() / 127.5 - 1)
                    texts = model.clip.text_directions(batch["captions"])
                for name, guess in (("prior", made), ("text", texts), ("shuffled", made.roll(1, 0))):
                    means[name].update(_cosine(guess, truth).mean(), len(chunk))
            scores |= {f"{prefix(split)}{name}_cosine": float(mean.compute()) for name, mean in means.items()}
            scores[f"{prefix(split)}num_images"] = float(len(indices))
        return scores


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.double(), b.double())
