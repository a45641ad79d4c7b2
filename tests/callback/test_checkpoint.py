import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback import checkpoint as checkpoint_module
from carrara.callback.checkpoint import Checkpoints, VerifiedCheckpointIO, checkpoint_step, newest_valid
from carrara.errors import UserError
from tests.tiny import batches, diffusion_model, equal, trainer, weights


def save(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"step": step, "x": torch.arange(1000.0)}, path)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    loaded = VerifiedCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7 and torch.equal(loaded["x"], torch.arange(1000.0))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]
    assert checkpoint_step(path) == 7


def test_a_failed_save_leaves_nothing_and_the_old_one_whole(tmp_path, monkeypatch):
    old = save(tmp_path, 1)

    def fail(checkpoint, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, old.name + ".sha256"]
    assert newest_valid(tmp_path) == old


def test_a_checkpoint_appears_whole(tmp_path, monkeypatch):
    """Under its own name there is never a part of one, and never one without its checksum."""
    written = []
    real = torch.save

    def watch(checkpoint, file):
        real(checkpoint, file)
        written.append(sorted(p.name for p in tmp_path.glob("step=*")))

    monkeypatch.setattr(torch, "save", watch)
    path = save(tmp_path, 3)
    assert written == [[]] and path.exists()


def test_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "step=00000001.ckpt"
    torch.save({"x": Path("/")}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage):
    old, new = save(tmp_path, 90), save(tmp_path, 100)
    assert newest_valid(tmp_path) == new
    damage(new)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == old
    assert "step=00000100.ckpt" in caplog.text and "damaged" in caplog.text


def test_a_checkpoint_without_its_checksum_is_passed_over(tmp_path, caplog):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.with_name(new.name + ".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == old
    assert "is missing" in caplog.text


def test_all_damaged_is_the_users_to_know(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        newest_valid(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None


# --- in training ---


def run(folder: Path, max_steps: int, *others: Callback, start: int = 0, resume: Path | None = None, **changes):
    settings = {"minutes": 1e9, "epoch_steps": 1000, "keep": 2, "batch_size": 4} | changes
    checkpoints = Checkpoints(folder, **settings)
    model = diffusion_model()
    one = trainer(folder, checkpoints, *others, max_steps=max_steps, plugins=[VerifiedCheckpointIO()])
    one.fit(model, batches(max_steps, start), ckpt_path=resume, weights_only=True)
    return model


def steps(folder: Path) -> list[int]:
    return sorted(checkpoint_step(path) for path in folder.glob("step=*.ckpt"))


def test_the_newest_are_kept_with_their_checksums(tmp_path):
    run(tmp_path, 5, epoch_steps=1, keep=2)
    assert steps(tmp_path) == [4, 5]
    assert len(list(tmp_path.glob("*.sha256"))) == 2


def test_the_last_step_is_saved_and_evaluations_are(tmp_path):
    run(tmp_path, 5, epoch_steps=2, keep=9)
    assert steps(tmp_path) == [2, 4, 5]


def test_the_clock_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_CLOCK_STEPS", 2)
    run(tmp_path, 5, minutes=0.0, keep=9)
    assert steps(tmp_path) == [2, 4, 5]


def test_accumulation_saves_once_a_step(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        VerifiedCheckpointIO, "save_checkpoint", lambda self, checkpoint, path, storage_options=None: saved.append(path)
    )
    checkpoints = Checkpoints(tmp_path, 1e9, 1, 2, 8)
    one = trainer(tmp_path, checkpoints, max_steps=2, accumulate_grad_batches=2, plugins=[VerifiedCheckpointIO()])
    one.fit(diffusion_model(), batches(4))
    assert [path.name for path in saved] == ["step=00000001.ckpt", "step=00000002.ckpt"]


class Draws(Callback):
    """Uses the rank's generator as a network's dropout would."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.numbers.append(float(torch.rand(())))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    """Weights, optimizer, learning rate and the random state: killed after step 2 of 4."""
    draws, later = Draws(), Draws()
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", 4, draws, epoch_steps=2, keep=9)
    checkpoint = tmp_path / "whole" / "step=00000002.ckpt"
    torch.manual_seed(999)  # another process
    resumed = run(tmp_path / "again", 4, later, start=2, resume=checkpoint)
    assert equal(weights(resumed), weights(whole))
    assert later.numbers == draws.numbers[2:]


def test_a_checkpoint_holds_what_a_run_needs(tmp_path):
    run(tmp_path, 3, batch_size=64)
    saved = torch.load(tmp_path / "step=00000003.ckpt", weights_only=True)
    assert saved["samples_consumed"] == 3 * 64
    assert [sorted(state) for state in saved["random_states"]] == [["cpu"]]
    assert saved["optimizer_states"] and saved["lr_schedulers"] and saved["global_step"] == 3


def test_on_another_number_of_ranks_the_random_state_is_left(tmp_path):
    run(tmp_path, 1)
    path = tmp_path / "step=00000001.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["random_states"] *= 2
    VerifiedCheckpointIO().save_checkpoint(saved, path)
    torch.manual_seed(5)
    run(tmp_path, 2, start=1, resume=path)
    assert steps(tmp_path) == [1, 2]
