"""How well noisy pictures are restored."""

from typing import Any

from torch import Tensor

from carrara.callback.comparison import Comparison
from carrara.callback.score import Setting
from carrara.corruption.base import as_stored
from carrara.model.base import Model
from carrara.model.restoration import RestorationModel, restored
from carrara.pipeline.pictures import to_uint8


class Restoration:
    """Logs `val/psnr` of the restored pictures beside `val/noisy_psnr`, on version 0 of each validation picture.

    Args:
        num_images, batch_size, num_previews: see `Comparison`.
    """

    def __init__(self, num_images: int, batch_size: int, num_previews: int):
        self.compare = Comparison(num_images, batch_size, num_previews)

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, RestorationModel)

        def pictures(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            noisy = as_stored(model.corruption(model.images(batch), batch["keys"], 0))
            return to_uint8(noisy), to_uint8(restored(model.restoration, noisy))

        return self.compare(setting, "psnr", pictures)
