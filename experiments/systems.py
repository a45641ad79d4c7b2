"""Every system of README, each from one command at the demo's length: what it took, what it scores, how it looks.

`python -m experiments.systems` prints the table of experiments/README.md and draws docs/systems/*.png. One system's
name trains that alone; more arguments go to every training: `trainer.max_steps=2`, say, only to see that it runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from carrara.run_folder import load_config
from experiments.tools import ROOT, last_scores, table, trained

NAME = "systems"
PICTURES = ("val/fd_evaluator", "val/clip_score", "val/prompt_accuracy/all")
SYSTEMS = {
    "stable_diffusion": ("model=latent_unet", PICTURES),
    "enlarger": ("model=autoencoder autoencoder=enlarger", ("val/psnr", "val/psnr_bicubic")),
    "super_resolution": (
        "model=super_resolution",
        ("val/psnr", "val/psnr_bicubic", "val/fd_evaluator", "val/fd_evaluator_bicubic"),
    ),
    "imagen": ("model=imagen", (*PICTURES, "small_pictures val/fd_evaluator")),
    "dalle": (
        "model=dalle",
        (
            *PICTURES,
            *(f"val/bits_per_token/image{one}" for one in ("", "_unigram", "_uniform")),
            "autoencoder val/codebook_use",
        ),
    ),
    "dalle2": ("model=dalle2", (*PICTURES, "prior val/prior_cosine", "prior val/text_cosine")),
    "autoregressive_prior": ("model=autoregressive_prior", ("val/prior_cosine", "val/text_cosine")),
    "gan": ("model=gan", PICTURES),
    "vae": ("model=vae", (*PICTURES, "val/bits_per_dim")),
    "latent_flow": ("model=latent_flow", PICTURES),
    "pixel_flow": ("model=pixel_flow", PICTURES),
    "noise2noise": ("experiment=noise2noise", ("val/noisy_psnr", "val/psnr")),
}
"""By name: what follows `train.py`, and its figures; those of a part begin with its name."""


def parts(run: Path) -> dict[str, Path]:
    """The runs that a run's parts come from, and theirs."""
    found = {
        name: Path(folder).parent for name, folder in (load_config(run).get("part") or {}).items() if folder is not None
    }
    return {name: one for part in found.values() for name, one in parts(part).items()} | found


def minutes(run: Path) -> float:
    """From its first file to its scores; if it was stopped and went on, the pause as well."""
    first = min(path.stat().st_mtime for path in run.iterdir())  # config.yaml is written anew at every start
    return ((run / "scores.json").stat().st_mtime - first) / 60


def figure(run: Path, name: str) -> str:
    *part, score = name.split(" ")
    value = last_scores(parts(run)[part[0]] if part else run)[score]
    return f"{name.replace('val/', '').replace('prompt_accuracy/', 'accuracy/')} {value:.{2 if abs(value) > 9 else 3}f}"


def picture(run: Path, name: str) -> None:
    """The run's last samples, twice as large."""
    newest = max((run / "samples").glob("[!s]*=*.png"), default=None, key=lambda path: path.name)
    if newest is not None:
        image = Image.open(newest)
        out = ROOT / "docs" / NAME / f"{name}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(out)


def main(arguments: Sequence[str]) -> None:
    names = [one for one in arguments if one in SYSTEMS] or list(SYSTEMS)
    more = [one for one in arguments if one not in SYSTEMS]
    lines = []
    for name in names:
        command, figures = SYSTEMS[name]
        run = trained(NAME, name, [*command.split(), *more])
        if not more:
            picture(run, name)
        whole = {str(one): minutes(one) for one in [*parts(run).values(), run]}
        lines.append(
            [
                f"`{command}`", f"{minutes(run):.1f}", f"{sum(whole.values()):.1f}",
                ", ".join(figure(run, one) for one in figures),
            ]
        )  # fmt: skip
        print(table(["`python train.py`", "minutes", "with all parts", "held out"], lines), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
