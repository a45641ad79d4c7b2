"""The components of embeddings are found before the first step: once, on rank 0."""

from collections.abc import Callable, Iterator

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from carrara.model.embedding_prior import EmbeddingPriorModel
from carrara.network.embedding_tokens import EmbeddingTokens


class MeasureComponents(Callback):
    """Measures all `EmbeddingTokens` that have not been measured yet, and gives what was found to all ranks.

    Args:
        images: gives batches of training images, uint8 (B, 3, R, R).
    """

    def __init__(self, images: Callable[[], Iterator[Tensor]]):
        self.images = images

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Not in `setup`: here a resumed run has its checkpoint's, and the model is on its device."""
        for module in pl_module.modules():
            if isinstance(module, EmbeddingTokens) and not module.measured:
                assert isinstance(pl_module, EmbeddingPriorModel)
                if trainer.is_global_zero:
                    module.measure(torch.cat([self._embeddings(pl_module, images) for images in self.images()]))
                found = {name: value.cpu() for name, value in module.state_dict().items()}
                module.load_state_dict(trainer.strategy.broadcast(found))

    @staticmethod
    def _embeddings(model: EmbeddingPriorModel, images: Tensor) -> Tensor:
        return model.embeddings(images.to(model.device).float() / 127.5 - 1)
