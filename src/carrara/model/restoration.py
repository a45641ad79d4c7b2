"""Training a network that takes noise away, from noisy pictures alone."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.corruption.base import Corruption, as_stored
from carrara.model.base import Model, OptimizerFactory

Target = Literal["noisy", "clean", "self"]
Versions = Literal["two", "new"]
_SPACING = 4  # pixels from one masked pixel to the next
_AROUND = ((0.5, 1.0, 0.5), (1.0, 0.0, 1.0), (0.5, 1.0, 0.5))


class RestorationModel(Model):
    """Minimises the distance of the restored picture from another noisy version of it (Lehtinen et al. 2018).

    The network is shown one of two versions of a picture, as a file holds it, and the other is its target. Targets are
    not cut off at black and white, which would move their mean.
    The distance is the corruption's: the squared error, for text the absolute one. What noisy targets add to it
    (`Corruption.excess`) is taken off more and more as the training goes on, at its end and in validation all of it.
    Without it from the start a small network learned less (`experiments/README.md`).

    Args:
        network: noisy pictures (B, 3, H, W) in [−1, 1] -> restored ones.
        corruption: what makes the noisy versions.
        target: `noisy`: the other version. `clean`: the picture itself. `self`: the shown version itself at masked
            pixels, which the network does not see. It needs noise that is independent from pixel to pixel: of text,
            whose letters tell their own pixels, much stays (Batson & Royer 2019, "Noise2Self", section 3; Krull et al.
            2019, "Noise2Void"). Its network must draw pixels anew: one that adds to them (`residual`) would be trained
            where they are filled in, and then keep their noise.
        versions: `two`: fixed by the picture's key, as if it had been taken twice; a toss, keyed by the position in the
            stream, says which is shown, so that both serve as targets. There are no more of them, however often it is
            visited (unless data.flip or data.crop=random lays another part of the picture under the same noise).
            `new`: two at each visit that no other has, as Lehtinen et al. train. In validation always the first two.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "restoration"

    def __init__(
        self,
        network: nn.Module,
        corruption: Corruption,
        target: Target,
        versions: Versions,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        if target == "self" and getattr(network, "residual", False):
            raise ValueError(
                "model.target=self goes with network.residual=false: what is added to a pixel leaves its noise in it"
            )
        self.restoration = network
        self.corruption = corruption
        self.target = target
        self.versions = versions

    @property
    def hot(self) -> list[nn.Module]:
        return [self.restoration]

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        clean = self.images(batch)
        version = self._noisy(batch, clean, "shown")
        noisy = as_stored(version)
        if self.target == "self":
            mask = masked_pixels(self.uniform(batch, "mask"), noisy.shape[2], noisy.shape[3])
            error = self._estimate(restored(self.restoration, without(mask, noisy)), version).mean(1, keepdim=True)
            return {"loss": ((error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()}
        answer = restored(self.restoration, noisy)
        if self.target == "clean":
            return {"loss": self.corruption.distance(answer, clean).mean()}
        return {"loss": self._estimate(answer, self._noisy(batch, clean, "target")).mean()}

    def _noisy(self, batch: dict[str, Any], clean: Tensor, role: Literal["shown", "target"]) -> Tensor:
        """The noisy version of each picture that is shown, or the one that is its target."""
        if self.versions == "new" and self.training:
            return self.corruption.corrupt(clean, batch["positions"], f"visit/{role}")
        second = torch.full((len(clean),), role == "target", device=clean.device)
        if self.training:
            second = second ^ (self.uniform(batch, "version") > 0.5)
        versions = torch.empty_like(clean)
        for number, rows in ((0, ~second), (1, second)):
            if rows.any():
                chosen = [key for key, row in zip(batch["keys"], rows.tolist(), strict=True) if row]
                versions[rows] = self.corruption(clean[rows], chosen, number)
        return versions

    def _estimate(self, answer: Tensor, noisy: Tensor) -> Tensor:
        """The distance of each value from the clean one, up to a factor and a constant, by a noisy one."""
        taken_off = self.global_step / self.max_steps if self.training else 1.0
        return self.corruption.distance(answer, noisy) - taken_off * self.corruption.excess(answer)


def restored(network: nn.Module, noisy: Tensor) -> Tensor:
    """What a network makes of noisy pictures (B, 3, H, W) in [−1, 1]: as many, float32."""
    return network(noisy).float()


def masked_pixels(u: Tensor, height: int, width: int) -> Tensor:
    """Every fourth pixel in every fourth row, (B, 1, H, W) bool; uniforms (B,) say where that begins."""
    start = (u * _SPACING**2).long()
    rows = torch.arange(height, device=u.device) % _SPACING == (start // _SPACING)[:, None]
    columns = torch.arange(width, device=u.device) % _SPACING == (start % _SPACING)[:, None]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def without(mask: Tensor, images: Tensor) -> Tensor:
    """The pictures with the mean of the pixels around in place of each masked one, as Noise2Self has it."""
    channels = images.shape[1]
    kernel = torch.tensor(_AROUND, device=images.device).expand(channels, 1, 3, 3)
    around = F.conv2d(images, kernel, padding=1, groups=channels)
    weight = F.conv2d(torch.ones_like(images), kernel, padding=1, groups=channels)  # less at the edges
    return torch.where(mask, around / weight, images)
