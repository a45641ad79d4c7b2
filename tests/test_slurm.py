"""docs/slurm.sh and hydra/launcher=slurm, with stand-ins for Slurm's programs."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from carrara.command.train import main
from carrara.errors import UserError
from tests.test_runs import TINY

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "slurm.sh"


# told the time is up, srun ends by the run's code, or by that of a task which it has killed
UP = 'trap "exit {}" USR1; sleep 0.5; kill -USR1 $PPID; for i in $(seq 300); do sleep 0.1; done'


@pytest.mark.parametrize("time_is_up", [False, True])
@pytest.mark.parametrize("code", [0, 1, 2, 137, 138, 143])
def test_a_job_goes_back_into_the_queue_when_its_time_was_up(tmp_path, code, time_is_up):
    requeued = time_is_up and code != 0
    srun = f'echo "$@" > args; {UP.format(code) if time_is_up else f"exit {code}"}'
    for name, body in (("srun", srun), ("scontrol", 'echo "$@" > requeued')):
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


SLURM = {  # stand-ins: a job is its script, run at once; again where it is requeued
    "sbatch": 'cp "$1" job.sh; bash job.sh > /dev/null 2>&1 & echo "Submitted batch job 12"',
    "srun": """while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
echo $$ > pid; export SLURM_JOB_ID=12 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
exec "$@" > out 2>> err""",
    "sacct": 'echo "JobID|State|NodeList"; echo "12|RUNNING|here"',
    "scontrol": 'echo "$@" >> requeued; { while kill -0 $PPID; do sleep 0.1; done; bash job.sh; } > /dev/null 2>&1 &',
}


@pytest.mark.slow
def test_a_run_of_a_sweep_goes_on_after_its_time_was_up(tmp_path):
    """`-m hydra/launcher=slurm`, whose job is sent USR2 by Slurm."""
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm", *TINY]
    with subprocess.Popen([*command, "trainer.max_steps=200"], cwd=tmp_path, env=env) as sweep:
        try:
            (log,) = waited(lambda: list(tmp_path.glob("runs/sweeps/*/0/metrics.jsonl")))
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR2)
            assert sweep.wait(timeout=200) == 0
        finally:
            sweep.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"
    assert "\ngoing on from " in (tmp_path / "err").read_text()
    assert (log.parent / "component" / "card.json").is_file()
    script = (tmp_path / "job.sh").read_text()
    for line in ("signal=USR2@300", "gpus-per-node=1", "nodes=1", "time=1440", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in script


def waited(found: Callable[[], list[Path]]) -> list[Path]:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.parametrize(("missing", "says"), [("submitit", "pip install 'carrara[slurm]'"), ("srun", "no srun here")])
def test_what_is_missing_for_slurm_is_told(missing, says, monkeypatch):
    if missing == "submitit":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=re.escape(says)):
        main(ROOT / "conf", ["-m", "hydra/launcher=slurm", "seed=1,2"])
