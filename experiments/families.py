"""Five ways from caption to picture with the same data, minutes and judge: diffusion, autoregression, flow, VAE, GAN.

The flow is of latents and of pixels.

`python -m experiments.families` prints the table of experiments/README.md and draws experiments/families.png. What a
family trains first and nobody else needs, its auto-encoder, counts into its minutes, by the speed at which it was
trained: let that be here, too. The judge does not count. More arguments go to every training: `trainer.max_steps=2`,
say, only to see that all of it runs.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from carrara.build import build_pipeline, load_trained
from carrara.config import build
from carrara.pipeline.pictures import grid, to_uint8
from carrara.run_folder import load_config
from experiments.tools import last_scores, spread, table, trained

NAME, SEEDS, SHOWN = "families", (0, 1, 2), 8
SECONDS = 600.0  # of training
CALIBRATION = 40  # steps that tell how many fit into them
IMAGES = [f"callback.{score}.num_images=512" for score in ("score", "validation_loss")]
FAMILIES = {
    "diffusion": ("latent_unet",),
    "autoregression": ("dalle",),
    "flow": ("latent_flow",),
    "pixel flow": ("pixel_flow", "model.noise_std=null"),  # with uniform noise it has bits per dimension
    "VAE": ("vae",),
    "GAN": ("gan",),
}
"""By name: the model, and its settings."""
COLUMNS = ("fd_evaluator", "clip_score", "prompt_accuracy/all", "bits_per_dim")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_seconds(run: Path) -> float:
    """What a run's steps took, without its evaluations, by the speed it logged."""
    logged = [row for row in rows(run) if "images_per_second" in row]
    return logged[-1]["images_seen"] * sum(1 / row["images_per_second"] for row in logged) / len(logged)


def autoencoder_seconds(run: Path) -> float:
    """What the training of a run's auto-encoder took; 0 where it has none."""
    part = load_config(run)["part"].get("autoencoder")
    return training_seconds(Path(part).parent) if part else 0.0


def steps(model: str, settings: Sequence[str]) -> int:
    """How many optimizer steps of a model, and before it of its auto-encoder, fit into the time."""
    short = [f"model={model}", f"trainer.max_steps={CALIBRATION}", f"trainer.log_steps={CALIBRATION // 2}"]
    run = trained(NAME, f"{model}-calibration", [*short, "callback.score.num_images=2", *settings])
    left = SECONDS - autoencoder_seconds(run)
    if left <= 0:
        raise SystemExit(f"{model}: its auto-encoder alone took more than {SECONDS:.0f} s")
    per_second = [row["images_per_second"] for row in rows(run) if "images_per_second" in row][-1]
    return max(1, int(left * per_second / load_config(run)["trainer"]["batch_size"]))


@torch.no_grad()
def pictures(run: Path, count: int = 64) -> tuple[torch.Tensor, float]:
    """The first `SHOWN` pictures of the held-out captions, and the seconds that each of `count` takes."""
    config, model, modules = load_trained(run)
    pipeline = build_pipeline(config, modules)(model)
    data = build(config["data"])
    batch = data.validation.take(data.validation.held_out[:count])
    pipeline(batch["captions"][:2], [0, 1], 0)  # warm
    start = time.perf_counter()
    made = pipeline(batch["captions"], batch["positions"].tolist(), 0)
    return to_uint8(made[:SHOWN]), (time.perf_counter() - start) / count


def main(more: Sequence[str]) -> None:
    lines, tiles = [], []
    for family, (model, *settings) in FAMILIES.items():
        length = steps(model, [*settings, *more])
        overrides = [f"model={model}", f"trainer.max_steps={length}", f"trainer.epoch_samples={10**9}", *IMAGES]
        runs = [trained(NAME, f"{model}-{seed}", [*overrides, f"seed={seed}", *settings, *more]) for seed in SEEDS]
        scores = [last_scores(run) for run in runs]
        found = [[one.get(f"val/{name}") for one in scores] for name in COLUMNS]
        shown, seconds = pictures(runs[0])
        tiles.append(shown)
        minutes = spread([(training_seconds(run) + autoencoder_seconds(run)) / 60 for run in runs], 1)
        lines.append(
            [
                f"{family} (`{model}`)", str(length), minutes,
                *(spread(values) if None not in values else "" for values in found), f"{1000 * seconds:.1f}",
            ]
        )  # fmt: skip
    print(table(["family", "steps", "minutes", *COLUMNS, "ms a picture"], lines))
    if not more:
        doubled = torch.cat(tiles).repeat_interleave(2, 2).repeat_interleave(2, 3)
        grid(doubled, SHOWN).save(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
