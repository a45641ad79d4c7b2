"""Does learning to restore need clean pictures (Lehtinen et al. 2018), and what are restored ones worth to diffusion?

`python -m experiments.noise2noise` prints the two tables of experiments/README.md: PSNR of restored pictures by what
they were learned from, and scores, against clean pictures, of the demo's latent U-Net trained on noisy, restored and
clean shards. More arguments go to every training: `trainer.max_steps=2`, say, only to see that all of it runs.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from carrara.run_folder import load_config
from experiments.tools import ROOT, RUNS, last_scores, spread, table, trained

EXPERIMENTS = {"gaussian": "experiment=noise2noise", "text": "experiment=noise2noise_text"}  # by corruption
TARGETS = {
    "clean": ["model.target=clean"],
    "noisy": ["model.target=noisy"],
    "self": ["model.target=self", "network.residual=false"],
}
SEEDS = (0,)
COLUMNS = ("fd_evaluator", "clip_score", "prompt_accuracy/all")
NAME = "noise2noise"


def written(do: str, label: str, overrides: Sequence[str]) -> Path:
    """The folder of the shards that `shards.py do=…` makes of the shapes, or of `overrides`' data."""
    out = RUNS / NAME / "shards" / label
    command = [sys.executable, str(ROOT / "shards.py"), f"do={do}", *overrides, f"out={out}"]
    subprocess.run(command, check=True)
    return out


def restorations(
    name: str,
    trainings: Mapping[str, Mapping[str, Sequence[str]]],
    seeds: Sequence[int],
    more: Sequence[str],
    psnr: Callable[[Path], tuple[float, float]],
) -> dict[tuple[str, str], Path]:
    """Prints what every target comes to, and how much less than the first one with the same seed, as mean ± standard
    deviation of the seeds; the runs of the first seed by corruption and target.

    `trainings` are overrides by corruption and target; `psnr` says that of a run's noisy pictures and of what it makes
    of them.
    """
    rows, found = [], {}
    for corruption, by_target in trainings.items():
        best: tuple[float, ...] = ()
        for target, overrides in by_target.items():
            runs = [
                trained(name, f"{corruption}-{target}-{seed}", [*overrides, f"seed={seed}", *more]) for seed in seeds
            ]
            found[corruption, target] = runs[0]
            noisy, restored = zip(*map(psnr, runs), strict=True)
            best = best or restored
            less = [a - b for a, b in zip(best, restored, strict=True)]
            rows.append([corruption, target, spread(noisy, 2), spread(restored, 2), spread(less, 3)])
    header = ["corruption", "target", "PSNR, noisy", "PSNR, restored", "less than the first"]
    print(table(header, rows), end="\n\n", flush=True)
    return found


def of_pictures(run: Path) -> tuple[float, float]:
    """The run's own scores."""
    scores = last_scores(run)
    return scores["val/noisy_psnr"], scores["val/psnr"]


def diffusion(restoration: Mapping[tuple[str, str], Path], more: Sequence[str]) -> None:
    """Prints scores of diffusion models by the shards they were trained on; all are judged on clean pictures."""
    shapes = ["model=latent_unet", "callback.score.num_images=512", "seed=0", *more]
    clean = trained(NAME, "diffusion-clean", shapes)
    config = load_config(clean)
    evaluator = f"part.evaluator={config['part']['evaluator']}"  # the one that knows clean pictures judges all
    rows = [["clean", "", *_row(clean)]]
    for corruption in EXPERIMENTS:
        noisy = written("corrupt", f"{corruption}-noisy", [f"corruption={corruption}"])
        urls = f"data.urls={noisy}/*.tar"
        kinds = {
            "restored": written(
                "restore", f"{corruption}-restored", [urls, f"part.restoration={restoration[corruption, 'noisy']}"]
            ),
            "noisy": noisy,
        }
        for kind, folder in kinds.items():
            # data.make=null: these shards are not made by train.py; the validation shards stay the clean ones
            data = ["data.make=null", f"data.urls={folder}/*.tar"]
            run = trained(NAME, f"diffusion-{corruption}-{kind}", [*shapes, evaluator, *data])
            rows.append([kind, corruption, *_row(run)])
    print(table(["trained on", "corruption", *COLUMNS], rows))


def _row(run: Path) -> list[str]:
    scores = last_scores(run)
    return [f"{scores[f'val/{name}']:.3f}" for name in COLUMNS]


def main(more: Sequence[str]) -> None:
    trainings = {
        corruption: {target: [experiment, *overrides] for target, overrides in TARGETS.items()}
        for corruption, experiment in EXPERIMENTS.items()
    }
    diffusion(restorations(NAME, trainings, SEEDS, more, of_pictures), more)


if __name__ == "__main__":
    main(sys.argv[1:])
