"""How well a denoising auto-encoder denoises."""

from typing import Any

import torch
from torch import Tensor

from carrara import keyed_random
from carrara.callback.comparison import Comparison
from carrara.callback.score import Setting
from carrara.model.base import Model
from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.pictures import to_uint8


class Denoising:
    """Logs `val/denoised_psnr` beside `val/noisy_psnr`.

    Args:
        sigma: of the noise, in units of x0 (pixels lie in [−1, 1]): sigma / alpha of the schedule.
        seed: of the noise, which is keyed by the picture.
        num_images, batch_size, num_previews: see `Comparison`.
    """

    def __init__(self, sigma: float, seed: int, num_images: int, batch_size: int, num_previews: int):
        self.sigma, self.seed = sigma, seed
        self.compare = Comparison(num_images, batch_size, num_previews)

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, DiffusionModel)
        objective, predictor, autoencoder = model.objective, model.predictor, model.autoencoder
        t = objective.schedule.t_from_logsnr(-2 * torch.tensor(self.sigma, dtype=torch.float64).log())

        def pictures(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            x0 = autoencoder.encode(model.images(batch)).float()
            eps = keyed_random.normal(self.seed, batch["positions"], "denoising", tuple(x0.shape[1:]))
            predict = objective.predict(predictor.network, predictor.conditioner(batch["captions"]))
            x0_hat = objective.denoiser(predict)(objective.add_noise(x0, eps, t), t)
            return to_uint8(autoencoder.decode(x0 + self.sigma * eps)), to_uint8(autoencoder.decode(x0_hat))

        return self.compare(setting, "denoised_psnr", pictures)
