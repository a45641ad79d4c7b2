import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from carrara import launch as launch_module
from carrara.launch import launch, physical_cores

SRC = Path(__file__).parents[1] / "src"


def write_worker(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `stub_worker` whose run(folder) has `body`; the run's folder comes back."""
    code = f"""
        import os, signal, sys, time
        from pathlib import Path
        from carrara.command_line import RunFailed
        from carrara.errors import UserError
        from carrara.rank import rank_main

        rank = int(os.environ["RANK"])

        def wait_for(path, seconds=60):
            while not path.exists() and seconds > 0:
                time.sleep(0.02); seconds -= 0.02

        def run(folder):
            (folder / f"pid_{{rank}}").write_text(str(os.getpid()))
            (folder / f"ready_{{rank}}").touch()
{textwrap.indent(textwrap.dedent(body), " " * 12)}

        rank_main(run)
    """
    (tmp_path / "stub_worker.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", f"{SRC}{os.pathsep}{tmp_path}")
    folder = tmp_path / "a run"
    folder.mkdir()
    return folder


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid_*")]


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def test_ranks_know_their_world(tmp_path, monkeypatch):
    body = """
        keys = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
        (folder / f"world_{rank}").write_text(" ".join(os.environ[key] for key in keys))
    """
    folder = write_worker(tmp_path, body, monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch(folder, 2, module="stub_worker") == 0
    threads = max(1, physical_cores() // 2)
    worlds = [(folder / f"world_{rank}").read_text() for rank in range(2)]
    assert worlds == [f"2 {rank} 127.0.0.1 {threads} {2**32}" for rank in range(2)]
    assert not {"OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()


def test_one_device_is_launched_the_same_way(tmp_path, monkeypatch):
    body = '(folder / "world").write_text(os.environ["WORLD_SIZE"] + " " + os.environ["OMP_NUM_THREADS"])'
    folder = write_worker(tmp_path, body, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own number stays
    assert launch(folder, 1, module="stub_worker") == 0
    assert (folder / "world").read_text() == "1 3"


def test_a_killed_rank_ends_the_others(tmp_path, monkeypatch, capfd):
    body = """
        if rank == 1:
            wait_for(folder / "ready_0")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """
    folder = write_worker(tmp_path, body, monkeypatch)
    assert launch(folder, 2, module="stub_worker") == 128 + signal.SIGKILL
    assert [pid for pid in pids(folder) if alive(pid)] == []
    assert capfd.readouterr().err == "error: rank 1 was ended by SIGKILL (out of memory?)\n"


def test_the_first_error_is_shown_once(tmp_path, monkeypatch, capfd):
    body = """
        if rank == 0:
            wait_for(folder / "failing")
            time.sleep(0.05)
            raise ConnectionError("my peer is gone")
        wait_for(folder / "ready_0")
        (folder / "failing").touch()
        raise ZeroDivisionError("the cause")
    """
    folder = write_worker(tmp_path, body, monkeypatch)
    assert launch(folder, 2, module="stub_worker") == 1
    shown = capfd.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith("ZeroDivisionError: the cause\n")
    assert shown.count("Traceback") == 1


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capfd):
    folder = write_worker(tmp_path, 'raise UserError("data.urls: no such shard")', monkeypatch)
    assert launch(folder, 2, module="stub_worker") == 2
    assert capfd.readouterr().err == "error: data.urls: no such shard\n"


def launcher(folder: Path) -> subprocess.Popen[str]:
    code = f"""
from carrara.command_line import RunFailed, cli
from carrara.launch import launch
from pathlib import Path
def main(argv):
    raise RunFailed(launch(Path({str(folder)!r}), 2, module="stub_worker"))
cli(main)
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_suspended_rank_is_ended_with_the_others(tmp_path, monkeypatch, capfd):
    """It hears no signal but KILL."""
    monkeypatch.setattr(launch_module, "_TO_END", 4)
    body = """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_for(folder / "ready_1")
        raise ConnectionError("rank 1 does not answer")
    """
    folder = write_worker(tmp_path, body, monkeypatch)
    start = time.monotonic()
    assert launch(folder, 2, module="stub_worker") == 1
    assert time.monotonic() - start < 20
    assert [pid for pid in pids(folder) if alive(pid)] == []
    assert "rank 1 does not answer" in capfd.readouterr().err


FAILS = """
    attempt = len(list(folder.glob("attempt_*_0")))
    (folder / f"attempt_{attempt}_{rank}").touch()
    if rank == 0 and attempt < %d:
        %s
"""


@pytest.mark.parametrize("failure", ["os.kill(os.getpid(), signal.SIGKILL)", "raise ZeroDivisionError", "sys.exit(7)"])
@pytest.mark.parametrize(("failures", "max_restarts"), [(1, 1), (2, 3), (2, 1)])
def test_what_failed_is_started_again(tmp_path, monkeypatch, failure, failures, max_restarts):
    folder = write_worker(tmp_path, FAILS % (failures, failure), monkeypatch)
    code = launch(folder, 2, module="stub_worker", max_restarts=max_restarts)
    assert (code == 0) == (max_restarts >= failures)
    assert len(list(folder.glob("attempt_*_0"))) == 1 + min(failures, max_restarts)


@pytest.mark.parametrize(
    ("end", "code"), [('raise UserError("no such shard")', 2), ("sys.exit(128 + 15)", 143), ("sys.exit(128 + 10)", 138)]
)
def test_a_mistake_and_a_signal_are_not_started_again(tmp_path, monkeypatch, end, code):
    folder = write_worker(tmp_path, FAILS % (9, end), monkeypatch)
    assert launch(folder, 1, module="stub_worker", max_restarts=3) == code
    assert len(list(folder.glob("attempt_*_0"))) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks(tmp_path, monkeypatch, signum):
    body = """
        try:
            wait_for(folder / "never")
        except (SystemExit, KeyboardInterrupt):
            (folder / f"saved_{rank}").touch()
            raise
    """
    folder = write_worker(tmp_path, body, monkeypatch)
    process = launcher(folder)
    wait_for(folder / "ready_0")
    wait_for(folder / "ready_1")
    process.send_signal(signum)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert shown == ""
    assert (folder / "saved_0").exists()
    assert (folder / "saved_1").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_ranks_end_with_a_killed_launcher(tmp_path, monkeypatch):
    folder = write_worker(tmp_path, 'wait_for(folder / "never")', monkeypatch)
    process = launcher(folder)
    wait_for(folder / "ready_0")
    wait_for(folder / "ready_1")
    process.kill()
    process.wait()  # not for its pipes, which the ranks hold too
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids(folder)):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.02)
