"""The training loss on fixed validation samples, without luck: fixed noise, times spread evenly."""

from carrara import keyed_random
from carrara.callback.score import Setting, prefix
from carrara.metric.mean import Mean
from carrara.model.base import Model

_GOLDEN_RATIO = 0.6180339887498949


class ValidationLoss:
    """Logs `val/loss` and the loss's parts.

    Sample i's time is the i-th point of the golden-ratio sequence, evenly spread over (0, 1) for any number of
    samples; its noise is keyed by i.

    Args:
        num_images: how many samples of each split; all if there are fewer.
        batch_size: samples a forward pass.
    """

    def __init__(self, num_images: int, batch_size: int):
        self.num_images = num_images
        self.batch_size = batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        scores = {}
        for split, indices in setting.validation.splits.items():
            means: dict[str, Mean] = {}
            for chunk in setting.chunks(indices[: self.num_images], self.batch_size):
                batch = setting.validation.take(chunk)
                batch["images"] = batch["images"].to(setting.device)
                batch["positions"] = batch["positions"].to(setting.device)
                u = ((batch["positions"].double() + 0.5) * _GOLDEN_RATIO % 1.0).float()
                with setting.autocast():
                    losses = model.loss(batch, u.clamp(keyed_random.SMALLEST, 1 - keyed_random.SMALLEST))
                for name, value in losses.items():
                    means.setdefault(name, Mean().to(setting.device)).update(value.detach(), len(chunk))
            for name in model.loss_names:  # in one order on all ranks, also on a rank without a chunk
                mean = means.get(name, Mean().to(setting.device))
                scores[f"{prefix(split)}{name}"] = float(mean.compute())
        return scores
