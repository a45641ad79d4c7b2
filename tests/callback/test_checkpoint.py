import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback import checkpoint as checkpoint_module
from carrara.callback.checkpoint import Checkpoints, best_score, retention
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, checkpoint_step, checkpoints, newest_valid
from carrara.callback.ema import EMA
from carrara.corruption.text import Text
from carrara.errors import UserError
from tests.tiny import batches, diffusion_model, equal, kl, restoration_model, trainer, weights


def run(folder: Path, max_steps: int, *others: Callback, start: int = 0, resume: Path | None = None, **changes):
    keep = retention(changes.pop("newest", 2), changes.pop("every", None), 0, dict)
    ema = EMA(0.9)
    model = changes.pop("model", None) or diffusion_model(changes.pop("autoencoder", None))
    settings = {"minutes": 1e9, "epoch_steps": 1000, "batch_size": 4} | changes
    checkpoints = Checkpoints(folder, keep=keep, ema=ema, **settings)
    one = trainer(folder, ema, checkpoints, *others, max_steps=max_steps, plugins=[VerifiedCheckpointIO()])
    one.fit(model, batches(max_steps, start), ckpt_path=resume, weights_only=True)
    return model


def steps(folder: Path) -> list[int]:
    return list(checkpoints(folder))


def test_the_newest_are_kept_with_their_checksums(tmp_path):
    run(tmp_path, 5, epoch_steps=1, newest=2)
    assert steps(tmp_path) == [4, 5]
    assert len(list(tmp_path.glob("*.sha256"))) == 2


def test_what_is_kept():
    scores = {10: 0.1, 20: 0.9, 30: 0.2, 40: 0.9}
    steps = [10, 20, 30, 40, 50, 60]
    assert retention(1, None, 0, lambda: pytest.fail("not needed"))(steps) == {60}
    assert retention(2, None, 0, dict)(steps) == {50, 60}
    assert retention(1, 30, 0, dict)(steps) == {30, 60}
    assert retention(1, None, 1, lambda: scores)(steps) == {40, 60}  # of equals the newer
    assert retention(1, 30, 3, lambda: scores)(steps) == {20, 30, 40, 60}
    assert retention(9, None, 0, dict)(steps) == set(steps)


def test_the_best_are_so_by_a_score_that_there_is(caplog):
    evaluated = {10: {"val/psnr": 20.0, "val/loss": 0.3}, 20: {"val/psnr": 25.0}}
    assert best_score(evaluated, "val/psnr", highest=True) == {10: 20.0, 20: 25.0}
    assert best_score(evaluated, "val/loss", highest=False) == {10: -0.3}
    assert best_score({}, "val/typo", highest=True) == {} and not caplog.text  # before the first evaluation
    assert best_score(evaluated, "val/typo", highest=True) == {}
    assert "trainer.best_score=val/typo is none of val/psnr" in caplog.text


def test_damaged_checkpoints_do_not_count_among_the_newest(tmp_path, caplog):
    """They are set aside when an older one is resumed from: otherwise the whole ones would go, and they stay."""
    run(tmp_path, 6, epoch_steps=1, newest=3)
    for step in (5, 6):
        path = tmp_path / f"step={step:08d}.ckpt"
        path.write_bytes(path.read_bytes()[:-1])
    foreign = tmp_path / "step=00000009 (copy).ckpt"
    foreign.touch()
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint_step(checkpoint) == 4
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 5, start=4, resume=checkpoint, newest=1)
    assert newest_valid(tmp_path) == tmp_path / "step=00000005.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step=00000005.ckpt", "step=00000005.ckpt.rejected", "step=00000005.ckpt.sha256",
        "step=00000006.ckpt.rejected", foreign.name,
    ]  # fmt: skip
    assert "step=00000006.ckpt is set aside" in caplog.text


def test_what_has_just_been_written_stays_beside_a_newer_one(tmp_path):
    (tmp_path / "step=00000099.ckpt").touch()  # somebody is copying it there
    run(tmp_path, 1, newest=1)
    assert steps(tmp_path) == [1, 99]


def test_checkpoints_at_multiples_stay(tmp_path):
    run(tmp_path, 5, epoch_steps=1, newest=1, every=2)
    assert steps(tmp_path) == [2, 4, 5]


class Break(Callback):
    """Makes a weight infinite at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            next(pl_module.predictor.network.parameters()).data.flatten()[0] = torch.inf


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"predictor\.network\..* is not finite after step 4"):
        run(tmp_path, 9, Break(3), epoch_steps=2)
    assert steps(tmp_path) == [2]


class Remember(Callback):
    """Its state is an object."""

    def state_dict(self):
        return {"last": Path("/")}


def test_what_could_not_be_loaded_again_ends_the_run_at_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is to hold tensors and plain data, and this has objects: .*PosixPath"):
        run(tmp_path, 4, Remember(), epoch_steps=2)
    assert list(tmp_path.iterdir()) == []


def full(checkpoint, file):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")


def test_with_a_full_disk_training_goes_on(tmp_path, monkeypatch, caplog):
    real, calls = torch.save, []

    def save(checkpoint, file):
        calls.append(checkpoint)
        (full if len(calls) == 2 else real)(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    with caplog.at_level(logging.ERROR):
        run(tmp_path, 6, epoch_steps=2, newest=9)
    assert steps(tmp_path) == [2, 6]
    assert "step 4" in caplog.text and "No space left on device" in caplog.text
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_is_not_tried_again_at_every_micro_batch(tmp_path, monkeypatch):
    calls = []

    def save(checkpoint, file):
        calls.append(checkpoint)
        full(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    ema = EMA(0.9)
    saver = Checkpoints(tmp_path, 1e9, 1, retention(2, None, 0, dict), 8, ema)
    one = trainer(tmp_path, ema, saver, max_steps=3, accumulate_grad_batches=3, plugins=[VerifiedCheckpointIO()])
    with pytest.raises(UserError, match="step 3"):
        one.fit(diffusion_model(), batches(9))
    assert len(calls) == 3


def test_the_last_checkpoint_must_succeed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"step 3 .*No space left on device; make room"):
        run(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_no_larger_than_what_it_holds(tmp_path):
    """The frozen auto-encoder is not in it."""
    model = run(tmp_path, 2, autoencoder=kl())
    path = newest_valid(tmp_path)
    assert path is not None
    saved = torch.load(path, weights_only=True)
    held = [*saved["state_dict"].values(), *saved["callbacks"]["EMA"]["average"].values()]
    for state in saved["optimizer_states"][0]["state"].values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    assert saved["state_dict"].keys() <= trained | buffers | {k for k in saved["state_dict"] if "extra_state" in k}
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    assert len(tensors) > 3 * len(trained)
    contents = sum(value.numel() * value.element_size() for value in tensors)
    # of tiny tensors the archive's own headers are most: 64 bytes to align each, some hundred to name it
    assert path.stat().st_size <= 1.1 * contents + 400 * len(tensors)


def test_the_last_step_is_saved_and_evaluations_are(tmp_path):
    run(tmp_path, 5, epoch_steps=2, newest=9)
    assert steps(tmp_path) == [2, 4, 5]


def test_the_clock_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_CLOCK_STEPS", 2)
    run(tmp_path, 5, minutes=0.0, newest=9)
    assert steps(tmp_path) == [2, 4, 5]


def test_the_clock_does_not_save_in_the_middle_of_an_accumulated_step(tmp_path, monkeypatch):
    """Such a checkpoint says that its step is made, and Lightning goes on from its half: other steps than without."""
    monkeypatch.setattr(checkpoint_module, "_CLOCK_STEPS", 2)
    ema = EMA(0.9)
    saver = Checkpoints(tmp_path, 1e9, 1000, retention(9, None, 0, dict), 8, ema)

    class Late(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:  # the first micro-batch after step 2
                saver.saved_at = -1e12

    one = trainer(
        tmp_path, ema, saver, Late(), max_steps=5, accumulate_grad_batches=2, plugins=[VerifiedCheckpointIO()]
    )
    one.fit(diffusion_model(), batches(10))
    assert steps(tmp_path) == [4, 5]


def test_accumulation_saves_once_a_step(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        VerifiedCheckpointIO, "save_checkpoint", lambda self, checkpoint, path, storage_options=None: saved.append(path)
    )
    ema = EMA(0.9)
    checkpoints = Checkpoints(tmp_path, 1e9, 1, retention(2, None, 0, dict), 8, ema)
    one = trainer(tmp_path, ema, checkpoints, max_steps=2, accumulate_grad_batches=2, plugins=[VerifiedCheckpointIO()])
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
    whole = run(tmp_path / "whole", 4, draws, epoch_steps=2, newest=9)
    checkpoint = tmp_path / "whole" / "step=00000002.ckpt"
    torch.manual_seed(999)  # another process
    resumed = run(tmp_path / "again", 4, later, start=2, resume=checkpoint)
    assert equal(weights(resumed), weights(whole))
    assert later.numbers == draws.numbers[2:]


def test_a_loss_that_depends_on_the_step_goes_on(tmp_path):
    """What text adds to the distance is taken off by the step, killed after step 3 of 4; two other versions a visit."""
    restorations = [restoration_model(corruption=Text(0.3, 0), versions="new", max_steps=4) for _ in range(2)]
    restorations[1].load_state_dict(restorations[0].state_dict())
    whole = run(tmp_path / "whole", 4, epoch_steps=3, newest=9, model=restorations[0])
    resumed = run(
        tmp_path / "again", 4, start=3, resume=tmp_path / "whole" / "step=00000003.ckpt", model=restorations[1]
    )
    assert equal(weights(resumed), weights(whole))


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
