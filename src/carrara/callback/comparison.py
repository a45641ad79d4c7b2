"""How close estimates of pictures come to the pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carrara.callback.score import Setting, prefix
from carrara.errors import going_on_without
from carrara.metric.psnr import PSNR
from carrara.pipeline.pictures import save_grid


@dataclass(frozen=True)
class Comparison:
    """PSNR of noisy pictures and of what is made of them, and some of both to look at, with the original.

    Args:
        num_images: pictures of each split; all if there are fewer.
        batch_size: pictures a forward pass.
        num_previews: triples of noisy picture, estimate and original to look at.
    """

    num_images: int
    batch_size: int
    num_previews: int

    def __call__(
        self, setting: Setting, name: str, pictures: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """Scores `noisy_psnr` and `name` of each split.

        Args:
            name: of the estimates' PSNR.
            pictures: a batch on the device -> the noisy pictures, and the estimates; uint8 (B, 3, H, W) each.
        """
        scores = {}
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_images]
            measures = PSNR().to(setting.device), PSNR().to(setting.device)
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                batch |= {key: batch[key].to(setting.device) for key in ("images", "positions")}
                with setting.autocast():
                    made = pictures(batch)
                for measure, one in zip(measures, made, strict=True):
                    measure.update(one, batch["images"])
                if chunk[0] == indices[0] and split == "held_out" and setting.samples_dir is not None:
                    n = min(self.num_previews, len(chunk))
                    tiles = torch.stack([*made, batch["images"]], dim=1)[:n].flatten(0, 1)
                    captions: list[dict[str, str | bool | None]] = [
                        {"caption": caption, "correct": None} for caption in batch["captions"][:n]
                    ]
                    path = setting.samples_dir / f"denoising={setting.epoch:04d}.png"
                    with going_on_without(path):
                        save_grid(path, tiles, 9, captions)
            for key, measure in zip(("noisy_psnr", name), measures, strict=True):
                scores[f"{prefix(split)}{key}"] = float(measure.compute())
            scores[f"{prefix(split)}num_images"] = float(len(indices))
        return scores
