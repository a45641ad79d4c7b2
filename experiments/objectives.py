"""Schedule × target × times: equal steps of one network, and so equal minutes, over several seeds.

`python -m experiments.objectives` prints the table of experiments/README.md.
"""

from itertools import product

from experiments.tools import last_scores, spread, table, trained

SCHEDULES, TARGETS, TIMES, SEEDS = ("cosine", "flow"), ("epsilon", "v", "flow"), ("uniform", "logit_normal"), (0, 1, 2)
COLUMNS = ("prompt_accuracy/all", "fd_evaluator", "clip_score")


def main() -> None:
    rows = []
    for schedule, target, times in product(SCHEDULES, TARGETS, TIMES):
        if (schedule, target) == ("flow", "epsilon"):
            continue  # singular: refused when it is built
        runs = [
            trained(
                "objectives",
                f"{schedule}-{target}-{times}-{seed}",
                [
                    "experiment=objectives", f"diffusion/schedule={schedule}", f"diffusion/parameterization={target}",
                    f"diffusion/time_sampling={times}", f"seed={seed}",
                ],
            )
            for seed in SEEDS
        ]  # fmt: skip
        found = [last_scores(run) for run in runs]
        values = [spread([one[f"val/{name}"] for one in found]) for name in COLUMNS]
        rows.append([schedule, target, times, *values])
    print(table(["schedule", "target", "times", *COLUMNS], rows))


if __name__ == "__main__":
    main()
