"""How well shrunken pictures are made large again, beside bicubic enlargement."""

from collections.abc import Callable

import torch

from carrara.callback.generation import PictureScores
from carrara.callback.score import Setting, prefix
from carrara.errors import going_on_without
from carrara.evaluator.clip import CLIP
from carrara.metric.prompt_accuracy import Check
from carrara.metric.psnr import PSNR
from carrara.model.base import Model
from carrara.model.super_resolution import SuperResolutionModel
from carrara.network.resize import enlarge, shrink
from carrara.pipeline.pictures import save_grid, to_uint8
from carrara.pipeline.super_resolution import SuperResolution


class Enlargement:
    """Logs `val/psnr`, the Fréchet and kernel distances, and prompt accuracy of enlarged pictures that were shrunken.

    `val/psnr_bicubic` and `val/fd_evaluator_bicubic` are those of bicubic enlargement. A sample is sharp where the mean
    of all that it could be is blurred, and so nearer in distribution and further in PSNR.

    Args:
        pipeline: makes a `SuperResolution` of a model.
        seed: of the pictures.
        num_images: of each split; all if there are fewer.
        batch_size: pictures in a chunk.
        num_previews: triples of enlarged, bicubic and true picture to look at.
        evaluator, check: see `PictureScores`.
    """

    def __init__(
        self,
        pipeline: Callable[[Model], SuperResolution],
        seed: int,
        num_images: int,
        batch_size: int,
        num_previews: int,
        evaluator: CLIP | None,
        check: Check | None,
    ):
        self.pipeline, self.seed = pipeline, seed
        self.num_images, self.batch_size, self.num_previews = num_images, batch_size, num_previews
        self.evaluator, self.check = evaluator, check

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, SuperResolutionModel)
        made, scores = self.pipeline(model), dict[str, float]()
        if self.evaluator is not None:
            self.evaluator.to(setting.device)
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_images]
            ways = ("", "_bicubic")
            judges = {
                way: PictureScores(self.evaluator, None, None, self.check, len(indices), setting.device) for way in ways
            }
            psnr = {way: PSNR().to(setting.device) for way in ways}
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                real, captions, positions = batch["images"].to(setting.device), batch["captions"], batch["positions"]
                small = shrink(real.float() / 127.5 - 1, model.factor)
                with torch.no_grad(), setting.autocast():
                    large = made(small, captions, positions.tolist(), self.seed)
                pictures = {"": to_uint8(large), "_bicubic": to_uint8(enlarge(small, model.factor).clamp(-1, 1))}
                for way, images in pictures.items():
                    judges[way].add_real(real, positions)
                    judges[way].add_generated(images, captions, positions)
                    psnr[way].update(images, real)
                if chunk[0] == indices[0] and split == "held_out" and setting.samples_dir is not None:
                    n = min(self.num_previews, len(real))
                    tiles = torch.stack([*pictures.values(), real], dim=1)[:n].flatten(0, 1)
                    path = setting.samples_dir / f"enlarged={setting.epoch:04d}.png"
                    with going_on_without(path):
                        save_grid(path, tiles, 6, [{"caption": caption, "correct": None} for caption in captions[:n]])
            for way in ways:
                found = judges[way].compute() | {"psnr": float(psnr[way].compute())}
                scores |= {f"{prefix(split)}{name}{way}": value for name, value in found.items()}
            scores[f"{prefix(split)}num_images"] = float(len(indices))
        return scores
