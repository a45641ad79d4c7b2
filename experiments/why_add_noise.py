"""Why a sampler adds noise, and removes scaled noise: two wrong samplers against DDPM's Algorithm 2.

`python -m experiments.why_add_noise` prints the table of experiments/README.md and draws experiments/why_add_noise.png.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.build import build_sampling, load_trained
from carrara.callback.generation import PictureScores
from carrara.config import build
from carrara.diffusion.guidance import Guidance
from carrara.diffusion.sampler import Ancestral, Denoise, Noise, Sampler, Steps, eps_from
from carrara.diffusion.schedule import Level, NoiseSchedule
from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.denoising import Sampling
from carrara.pipeline.pictures import grid, to_uint8
from carrara.pipeline.text_to_image import TextToImage
from experiments.tools import table, trained

NUM_IMAGES, SHOWN = 256, 8


class MeanOnly(Ancestral):
    """The mean of every step of Algorithm 2, without its noise."""

    def step(self, x: Tensor, x0_hat: Tensor, now: Level, then: Level, noise: Noise) -> Tensor:
        return super().step(x, x0_hat, now, then, lambda: torch.zeros_like(x))


class SubtractOnly(Sampler):
    """At each step the predicted noise is taken away as it is, and none is added."""

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        for now, _ in pairwise(levels):
            x0_hat = denoise(x, now.t)
            x = x - eps_from(x, x0_hat, now)
            yield x, x0_hat


SAMPLERS = {"Algorithm 2": Ancestral(), "mean only": MeanOnly(), "subtract only": SubtractOnly()}


def sampled(pipeline: TextToImage, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, R, R) and the standard deviation of the latents they were decoded from."""
    latents: list[Tensor] = []
    pictures = pipeline(batch["captions"], batch["positions"].tolist(), 0, lambda k, t, x, x0_hat: latents.append(x))
    return pictures, latents[-1].std()


@torch.no_grad()
def main() -> None:
    run = trained("why_add_noise", "ddpm", ["experiment=why_add_noise"])
    config, model, modules = load_trained(run)
    assert isinstance(model, DiffusionModel)
    data = build(config["data"])
    times = build_sampling(config, model.autoencoder).times
    rows, tiles = [], []
    for name, sampler in SAMPLERS.items():
        pipeline = TextToImage(model, config["data"]["resolution"], Sampling(sampler, times, Guidance(1.0)))
        judge = PictureScores(modules["evaluator"], None, None, data.prompt_check, NUM_IMAGES, torch.device("cpu"))  # type: ignore[arg-type]
        stds = []
        for start in range(0, NUM_IMAGES, 64):
            batch = data.validation.take(data.validation.splits["held_out"][start : start + 64])
            made, std = sampled(pipeline, batch)
            stds.append(std)
            pictures = to_uint8(made)
            judge.add_real(batch["images"], batch["positions"])
            judge.add_generated(pictures, batch["captions"], batch["positions"])
            if start == 0:
                tiles.append(pictures[:SHOWN])
        found = judge.compute()
        columns = ("prompt_accuracy/all", "fd_evaluator", "clip_score")
        rows.append([name, f"{torch.stack(stds).mean():.2f}", *(f"{found[column]:.3f}" for column in columns)])
    print(table(["sampler", "std of the latents", "prompt accuracy", "fd_evaluator", "clip_score"], rows))
    grid(torch.cat(tiles), SHOWN).save(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
