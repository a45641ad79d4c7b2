"""Fréchet distance and prompt accuracy against the number of calls of the network, of one trained run.

`python -m experiments.samplers RUN` prints the tables of experiments/README.md and draws experiments/samplers.png.
"""

import sys
from pathlib import Path

from experiments.tools import scores, table

CALLS = (4, 8, 16, 32)
PER_STEP = {"heun": 2, "predictor_corrector": 2}  # calls; one of the last step's is left out
SAMPLERS = (
    "ddpm", "ddpm_large", "ddim", "heun", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "unipc", "predictor_corrector",
)  # fmt: skip
COLUMNS = {"val/fd_evaluator": "Fréchet distance (evaluator)", "val/prompt_accuracy/all": "Prompt accuracy"}


def main(run: Path, num_images: int = 512) -> None:
    import matplotlib.pyplot as plt

    found = {
        name: [scores(run, num_images, {"sampler": name, "num_steps": n // PER_STEP.get(name, 1)}) for n in CALLS]
        for name in SAMPLERS
    }
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(11, 4), constrained_layout=True)
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        print(f"\n{title}\n")
        rows = [[name, *(f"{one[column]:.3f}" for one in values)] for name, values in found.items()]
        print(table(["sampler", *(f"{n} calls" for n in CALLS)], rows))
        for name, values in found.items():
            axis.plot(CALLS, [one[column] for one in values], marker="o", label=name)
        axis.set(xscale="log", xlabel="calls of the network", title=title)
        axis.set_xticks(CALLS, [str(n) for n in CALLS])
        axis.set_xticks([], minor=True)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
