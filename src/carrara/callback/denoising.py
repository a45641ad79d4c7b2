"""How well a denoising auto-encoder denoises."""

import torch

from carrara import keyed_random
from carrara.callback.score import Setting, prefix
from carrara.metric.psnr import PSNR
from carrara.model.base import Model
from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.pictures import save_grid, to_uint8


class Denoising:
    """Logs `val/denoised_psnr` beside `val/noisy_psnr`; leaves pairs of noisy and denoised pictures.

    Args:
        sigma: of the noise, in units of x0 (pixels lie in [−1, 1]): sigma / alpha of the schedule.
        seed: of the noise, which is keyed by the picture.
        num_images: pictures of each split; all if there are fewer.
        batch_size: pictures a forward pass.
        num_previews: pairs to look at.
    """

    def __init__(self, sigma: float, seed: int, num_images: int, batch_size: int, num_previews: int):
        self.sigma, self.seed = sigma, seed
        self.num_images, self.batch_size, self.num_previews = num_images, batch_size, num_previews

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, DiffusionModel)
        objective = model.objective
        t = objective.schedule.t_from_logsnr(-2 * torch.tensor(self.sigma, dtype=torch.float64).log())
        scores = {}
        for split, indices in setting.validation.splits.items():
            indices, name = indices[: self.num_images], prefix(split)
            noisy_psnr, denoised_psnr = PSNR().to(setting.device), PSNR().to(setting.device)
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                images, captions = batch["images"].to(setting.device), batch["captions"]
                with setting.autocast():
                    x0 = model.autoencoder.encode(images.float() / 127.5 - 1).float()
                    eps = keyed_random.normal(
                        self.seed, batch["positions"].to(setting.device), "denoising", x0.shape[1:]
                    )
                    predict = objective.predict(model.predictor.network, model.predictor.conditioner(captions))
                    x0_hat = objective.denoiser(predict)(objective.add_noise(x0, eps, t), t)
                    pair = [to_uint8(model.autoencoder.decode(z)) for z in (x0 + self.sigma * eps, x0_hat)]
                noisy_psnr.update(pair[0], images)
                denoised_psnr.update(pair[1], images)
                if chunk[0] == indices[0] and split == "held_out" and setting.samples_dir is not None:
                    n = min(self.num_previews, len(images))
                    tiles = torch.stack(pair, dim=1)[:n].flatten(0, 1)
                    path = setting.samples_dir / f"denoising={setting.epoch:04d}.png"
                    save_grid(path, tiles, 8, [{"caption": caption, "correct": None} for caption in captions[:n]])
            scores[f"{name}noisy_psnr"] = float(noisy_psnr.compute())
            scores[f"{name}denoised_psnr"] = float(denoised_psnr.compute())
            scores[f"{name}num_images"] = float(len(indices))
        return scores
