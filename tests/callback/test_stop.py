import json
import logging
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback.checkpoint import Checkpoints, retention
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, checkpoints
from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.callback.log import JsonLines
from carrara.callback.stop import Stop
from carrara.signals import SIGNALS
from tests.tiny import Validation, batches, diffusion_model, equal, trainer, weights


class Send(Callback):
    """Signals to this process in a hook of a step."""

    def __init__(self, hook: str, step: int, *signals: signal.Signals) -> None:
        def send(trainer, *_):
            if trainer.global_step == step:
                for one in signals:
                    os.kill(os.getpid(), one)

        setattr(self, hook, send)


def run(folder, *others: Callback, start=0, resume=None, score=lambda *_: {"val/loss": 1.0}, **changes):
    log, ema = JsonLines(folder / "metrics.jsonl", 4, 3), EMA(0.9)
    saver = Checkpoints(folder, 1e9, 3, retention(9, None, 0, dict), 4, ema)
    evaluation = Evaluation([score], Validation(4), 3, ema, folder, log)  # type: ignore[arg-type]
    callbacks = [ema, saver, Stop(saver), evaluation]
    one = trainer(folder, *callbacks, *others, max_steps=6, logger=[log], plugins=[VerifiedCheckpointIO()], **changes)
    model = diffusion_model()
    micro = changes.get("accumulate_grad_batches", 1)
    one.fit(model, batches(6 * micro, start * micro), ckpt_path=resume, weights_only=True)
    return model


def steps(folder) -> list[int]:
    return list(checkpoints(folder))


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_before_zero_grad"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, hook, signum):
    handler = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, Send(hook, 1, signum, signum))  # twice
    assert stopped.value.code == 128 + signum
    assert steps(tmp_path) == [2]
    assert signal.getsignal(signum) == handler


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    torch.manual_seed(0)
    whole = run(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        run(tmp_path / "again", Send("on_train_batch_start", 3, signal.SIGTERM))
    assert steps(tmp_path / "again") == [3, 4]
    again = run(tmp_path / "again", start=4, resume=tmp_path / "again" / "step=00000004.ckpt")
    assert equal(weights(again), weights(whole))


def test_accumulated_gradients_are_finished_first(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, Send("on_train_batch_start", 0, signal.SIGTERM), accumulate_grad_batches=3)
    assert steps(tmp_path) == [1]


def full(checkpoint, file):
    raise OSError(28, "No space left on device")


def test_what_is_not_saved_is_not_said_to_be(tmp_path, monkeypatch, caplog):
    """The disk is full from the start, or after a checkpoint."""
    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        run(tmp_path / "a", Send("on_train_batch_start", 1, signal.SIGTERM))
    assert steps(tmp_path / "a") == []
    assert "SIGTERM: stopped after step 2; it is not saved, and resume=… goes on from the start" in caplog.text
    monkeypatch.undo()

    def fill(*_):
        monkeypatch.setattr(torch, "save", full)
        return {"val/loss": 1.0}

    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        run(tmp_path / "b", Send("on_train_batch_start", 4, signal.SIGTERM), score=fill)
    assert steps(tmp_path / "b") == [3]
    assert "stopped after step 5; it is not saved, and resume=… goes on from step 3" in caplog.text


def test_a_step_that_could_not_be_saved_is_not_given_up_in_an_evaluation(tmp_path, monkeypatch, caplog):
    """The next one is finished, and its checkpoint tried again."""
    monkeypatch.setattr(torch, "save", full)

    def free(*_):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        run(tmp_path, score=free)
    assert stopped.value.code == 143
    assert steps(tmp_path) == [4]
    assert "SIGTERM: stopped after step 4; resume=… goes on from there" in caplog.text


def test_an_evaluation_is_not_waited_for_and_made_up_for(tmp_path):
    def hang(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, score=hang)
    assert stopped.value.code == 143
    assert steps(tmp_path) == [3]
    assert not (tmp_path / "metrics.jsonl").exists()
    run(tmp_path, start=3, resume=tmp_path / "step=00000003.ckpt")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
