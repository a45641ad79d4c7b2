import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest

from carrara import world as world_module
from carrara.errors import UserError
from carrara.world import Relay, World, outside_world

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


@pytest.mark.parametrize(
    "changed", [{"SLURM_STEP_ID": "batch"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PTY_PORT": "4711"}]
)
def test_a_shell_in_an_allocation_is_alone(changed):
    assert outside_world({**SRUN, **changed}) is None


def test_devices_are_filled_in_or_agree():
    world = World(rank=0, size=8, local_size=4)
    trainer = {"devices": 1, "num_nodes": 1, "batch_size": 8}
    assert world.fill_in(trainer, set()) == {"devices": 4, "num_nodes": 2, "batch_size": 8}
    assert world.fill_in({**trainer, "devices": 4}, {"trainer.devices"})["num_nodes"] == 2
    with pytest.raises(UserError, match=r"trainer\.num_nodes=1, but 2 were started"):
        world.fill_in(trainer, {"trainer.num_nodes"})


# --- words between ranks ---


@pytest.fixture
def relays(monkeypatch) -> tuple[Relay, Relay]:
    """Rank 0 and rank 1 of two, in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: Relay(World(rank, 2, 2)), range(2))
    return first, second


def test_rank_0_ends_after_the_others_have_heard_so(relays):
    """Under srun the store lives in its process: ranks still listening would lose it."""
    first, second = relays
    first.send("runs/a")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(first.end)
        words = second.receive()
        assert next(words) == "runs/a"
        with pytest.raises(TimeoutError):
            ending.result(timeout=0.5)
        assert list(words) == []
        ending.result(timeout=10)


def test_a_dead_rank_is_not_waited_for(relays, monkeypatch):
    monkeypatch.setattr(Relay, "_PATIENCE", timedelta(seconds=0.2))
    relays[0].end()


def test_a_rank_whose_run_ends_it_is_not_waited_for(relays):
    first, second = relays
    first.send("runs/a")

    def train() -> None:
        with closing(second.receive()) as folders:
            for _ in folders:
                raise SystemExit(138)

    with pytest.raises(SystemExit):
        train()
    begun = time.monotonic()
    first.end(failed=True)
    assert time.monotonic() - begun < 5


def test_a_restart_hears_nothing_of_what_was_said_before(relays, monkeypatch):
    """torchrun's agent keeps its store."""
    stores = [relay._store.underlying_store for relay in relays]  # two: one that waits does nothing else
    relays[0].send("runs/part")
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url, rank, *_, **__: iter([(stores[rank], rank, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again, other = Relay(World(0, 2, 2)), Relay(World(1, 2, 2))
    with ThreadPoolExecutor(1) as pool:
        hearing = pool.submit(next, other.receive())
        time.sleep(0.3)
        again.send("runs/b")
        assert hearing.result(timeout=10) == "runs/b"


def test_ranks_that_never_start_are_told_of(monkeypatch):
    monkeypatch.setattr(world_module, "_MEETING", timedelta(seconds=0.5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    with pytest.raises(UserError, match=r"rank 0 has not met all 2 ranks within 0:00:00\.5"):
        Relay(World(0, 2, 2))


def test_the_others_hear_of_a_failure(relays):
    first, second = relays
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(first.end, failed=True)
        with pytest.raises(ConnectionError, match="rank 0 failed"):
            list(second.receive())
        ending.result(timeout=10)
