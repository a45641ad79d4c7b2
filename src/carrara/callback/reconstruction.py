"""How well an auto-encoder's pictures come back."""

import torch
from torch import Tensor

from carrara.autoencoder.base import Autoencoder
from carrara.autoencoder.discrete import Discrete
from carrara.autoencoder.shrunken import Enlarger
from carrara.callback.score import Setting, prefix
from carrara.errors import going_on_without
from carrara.metric.codebook_use import CodebookUse
from carrara.metric.prompt_accuracy import Check, PromptAccuracy
from carrara.metric.psnr import PSNR
from carrara.model.base import Model
from carrara.pipeline.pictures import save_grid, to_uint8


class Reconstruction:
    """Logs `val/psnr` and, where a parser reads pictures and captions, `val/reconstruction_accuracy`.

    Of what enlarges shrunken pictures also `val/psnr_bicubic`: bicubic enlargement's, which it has to beat.
    Of a discrete auto-encoder also `val/codebook_use` and `val/codebook_perplexity`, over all the pictures' tokens.

    Args:
        num_images: pictures of each split; all if there are fewer.
        batch_size: pictures a forward pass.
        num_previews: pairs of picture and reconstruction to look at.
        check: see `PromptAccuracy`; None where no parser reads the data.
    """

    def __init__(self, num_images: int, batch_size: int, num_previews: int, check: Check | None):
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_previews = num_previews
        self.check = check

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        autoencoder = model.exported
        assert isinstance(autoencoder, Autoencoder)
        scores = {}
        for split, indices in setting.validation.splits.items():
            name = prefix(split)
            psnr, bicubic = PSNR().to(setting.device), PSNR().to(setting.device)
            accuracy = None if self.check is None else PromptAccuracy(self.check).to(setting.device)
            use = CodebookUse(autoencoder.num_codes).to(setting.device) if isinstance(autoencoder, Discrete) else None
            for chunk in setting.chunks(indices[: self.num_images], self.batch_size):
                batch = setting.validation.take(chunk)
                images = batch["images"].to(setting.device)
                with setting.autocast():
                    reconstruction = to_uint8(self._round_trip(autoencoder, images.float() / 127.5 - 1, use))
                psnr.update(reconstruction, images)
                if isinstance(autoencoder, Enlarger):
                    bicubic.update(to_uint8(autoencoder.bicubic(images.float() / 127.5 - 1)), images)
                if accuracy is not None:
                    accuracy.update(batch["captions"], reconstruction)
                if chunk[0] == indices[0] and split == "held_out":
                    self._preview(images, reconstruction, batch["captions"], setting)
            scores[f"{name}psnr"] = float(psnr.compute())
            if isinstance(autoencoder, Enlarger):
                scores[f"{name}psnr_bicubic"] = float(bicubic.compute())
            scores[f"{name}num_images"] = float(min(self.num_images, len(indices)))
            if accuracy is not None and (shares := accuracy.compute()):  # none of captions that say nothing to it
                scores[f"{name}reconstruction_accuracy"] = float(shares["all"])
            if use is not None:
                scores |= {f"{name}{key}": float(value) for key, value in use.compute().items()}
        return scores

    def _round_trip(self, autoencoder: Autoencoder, images: Tensor, use: CodebookUse | None) -> Tensor:
        if not isinstance(autoencoder, Discrete) or use is None:
            return autoencoder.decode(autoencoder.encode(images))
        tokens = autoencoder.tokens(images)
        use.update(tokens)
        return autoencoder.decode_tokens(tokens, *images.shape[2:])

    def _preview(self, images: Tensor, reconstruction: Tensor, captions: list[str], setting: Setting) -> None:
        if setting.samples_dir is None:
            return
        n = min(self.num_previews, len(images))
        pairs = torch.stack([images[:n], reconstruction[:n]], dim=1).flatten(0, 1)
        path = setting.samples_dir / f"reconstruction={setting.epoch:04d}.png"
        with going_on_without(path):
            save_grid(path, pairs, 8, [{"caption": caption, "correct": None} for caption in captions[:n]])
