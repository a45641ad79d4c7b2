"""What a restoration must have learned: networks trained here on 8 × 8 shapes for half a minute each."""

from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from carrara.callback.restoration import Restoration
from carrara.corruption.base import Corruption
from carrara.corruption.noise import Gaussian
from carrara.corruption.text import Text
from carrara.data import shapes
from carrara.model.restoration import RestorationModel
from tests import tiny

pytestmark = pytest.mark.slow
STEPS, BATCH, TRAIN, TEST = 800, 128, 51_200, 256


@cache
def pictures(split: Any, count: int) -> tuple[torch.Tensor, list[str]]:
    return torch.from_numpy(shapes.examples(0, split, range(count), resolution=8).images), [
        f"{split}/{k}" for k in range(count)
    ]


def train(corruption: Corruption, target: Any, residual: bool) -> RestorationModel:
    torch.manual_seed(0)
    images, keys = pictures("train", TRAIN)
    model = tiny.restoration_model(
        network=tiny.drunet(channels=[16, 32], residual=residual),
        corruption=corruption,
        target=target,
        optimizer=partial(tiny.Muon, lr=4e-3, momentum=0.95, betas=(0.9, 0.98), weight_decay=0.0),
        max_steps=STEPS,
        warmup_steps=20,
        cooldown=0.5,
    )
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for step in range(STEPS):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        rows = positions % TRAIN
        optimizer.zero_grad()
        batch = {"images": images[rows], "keys": [keys[k] for k in rows], "positions": positions}
        with patch.object(RestorationModel, "global_step", step):  # as a trainer has it
            model.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


class Held:
    """Stands for a `ValidationSet` of held-out pictures."""

    def __init__(self) -> None:
        self.images, self.keys = pictures("held_out", TEST)
        self.splits = {"held_out": torch.arange(TEST).numpy()}

    def take(self, indices: Any) -> dict[str, Any]:
        rows = torch.from_numpy(indices)
        keys = [self.keys[k] for k in indices]
        return {"images": self.images[rows], "keys": keys, "positions": rows, "captions": keys}


@torch.no_grad()
def psnr(model: RestorationModel) -> tuple[float, float]:
    """Of noisy pictures and of what is made of them."""
    setting = tiny.setting()
    scores = Restoration(TEST, 64, 0)(model, type(setting)(**vars(setting) | {"validation": Held()}))
    return scores["val/noisy_psnr"], scores["val/psnr"]


@pytest.mark.parametrize("corruption", [Gaussian(0.4, 0), Text(0.25, 0)], ids=["gaussian", "text"])
def test_noisy_targets_teach_nearly_as_much_as_clean_ones(corruption: Corruption) -> None:
    """Noise in the targets is noise in the gradient, which so short a training does not average out."""
    shown, clean = psnr(train(corruption, "clean", residual=True))
    _, noisy = psnr(train(corruption, "noisy", residual=True))
    _, blind = psnr(train(corruption, "self", residual=False))
    assert clean > shown + 5
    assert noisy > clean - 0.8
    assert noisy > blind + 1


@pytest.mark.parametrize("corruption", [Gaussian(0.4, 0), Text(0.25, 0)], ids=["gaussian", "text"])
def test_a_network_that_draws_pictures_anew_restores_them_too(corruption: Corruption) -> None:
    shown, noisy = psnr(train(corruption, "noisy", residual=False))
    assert noisy > shown + 5
