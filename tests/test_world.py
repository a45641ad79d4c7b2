import os

import pytest

from carrara.errors import UserError
from carrara.world import World, outside_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


def test_alone_there_is_no_world():
    assert outside_world({}) is None


def test_torchruns_world():
    assert outside_world(TORCHRUN) == World(rank=5, size=8, local_size=4)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12]", "gpu07"), ("gpu07,gpu08", "gpu07"), ("a-1", "a-1"), ("n[3,5]x", "n3")],
)
def test_sruns_world_is_written_as_torchruns(monkeypatch, nodes, first):
    for key in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(key, "")  # so that what is written is taken back
        monkeypatch.delenv(key)
    assert outside_world({**SRUN, "SLURM_STEP_NODELIST": nodes}) == World(rank=5, size=8, local_size=4)
    assert {key: os.environ[key] for key in TORCHRUN} == TORCHRUN
    assert os.environ["MASTER_ADDR"] == first
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("changed", [{"SLURM_STEP_ID": "batch"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_shell_in_an_allocation_is_alone(changed):
    assert outside_world({**SRUN, **changed}) is None


def test_devices_are_filled_in_or_agree():
    world = World(rank=0, size=8, local_size=4)
    trainer = {"devices": 1, "num_nodes": 1, "batch_size": 8}
    assert world.fill_in(trainer, set()) == {"devices": 4, "num_nodes": 2, "batch_size": 8}
    assert world.fill_in({**trainer, "devices": 4}, {"trainer.devices"})["num_nodes"] == 2
    with pytest.raises(UserError, match=r"trainer\.num_nodes=1, but 2 were started"):
        world.fill_in(trainer, {"trainer.num_nodes"})
