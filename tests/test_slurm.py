"""docs/slurm.sh, with stand-ins for Slurm's programs."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (138, True), (1, False), (2, False), (143, False)])
def test_a_job_goes_back_into_the_queue_when_its_time_was_up(tmp_path, code, requeued):
    for name, body in (("srun", f'echo "$@" > args; exit {code}'), ("scontrol", 'echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "model=latent_unet", "data.urls=a b"], cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == code
    told = (tmp_path / "args").read_text()
    assert told == "--kill-on-bad-exit=1 python train.py resume=auto model=latent_unet data.urls=a b\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
