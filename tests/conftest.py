"""Every test runs on one thread, from the same seeds, without a network or an account."""

import os
import random
from pathlib import Path

import pytest

pytest_plugins = ["tests.commands", "tests.shards"]

# Read when the libraries are imported, and inherited by the processes that tests start.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# A developer's account, and the ranks of a job the tests happen to run in, are not the tests'.
for variable in (
    "WANDB_API_KEY",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
):
    os.environ.pop(variable, None)
for variable in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[variable]

import numpy as np  # noqa: E402  (after the environment it reads)
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The global generators; what the project itself draws is keyed and does not touch them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def wandb_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's files and settings lie in a folder of the test session, not in ~ or the working tree."""
    folder: Path = tmp_path_factory.getbasetemp() / "wandb"
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        (folder / variable).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(variable, str(folder / variable))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
