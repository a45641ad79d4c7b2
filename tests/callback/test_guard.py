import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.callback.ema import EMA
from carrara.callback.guard import Guard
from carrara.callback.json_lines import rows
from carrara.errors import UserError
from tests.tiny import batches, diffusion_model, equal, trainer, weights

KINDS = ["nan_loss", "inf_loss", "nan_gradient"]


class Poison(Callback):
    """Spoils the loss, or one number of the gradient, of some micro-batches; keeps the weights after each."""

    def __init__(self, kind: str, at: set[int]) -> None:
        self.kind, self.at = kind, at
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        real, count = pl_module.loss, 0

        def loss(batch, u=None):
            nonlocal count
            losses = real(batch, u)
            if count in self.at and self.kind.endswith("loss"):
                # detached: the gradient by itself would be finite
                losses["loss"] = losses["loss"] + (torch.nan if self.kind == "nan_loss" else torch.inf)
            count += 1
            return losses

        pl_module.loss = loss

    def on_after_backward(self, trainer, pl_module):
        if self.kind == "nan_gradient" and trainer.fit_loop.batch_idx in self.at:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.flatten()[0] = torch.nan

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = trainer.optimizers[0]
        momenta = {
            f"{k} {name}": value.clone()
            for k, state in enumerate(optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        self.weights.append({name: value.clone() for name, value in weights(pl_module).items()} | momenta)


def guarded(tmp_path, kind, at, steps=4, max_skipped=3, **changes) -> tuple[Guard, Poison]:
    torch.manual_seed(0)
    guard, poison, ema = Guard(tmp_path / "skipped_steps.jsonl", max_skipped), Poison(kind, at), EMA(0.9)
    run = trainer(tmp_path, poison, ema, guard, max_steps=steps, **changes)
    run.fit(diffusion_model(), batches(steps * changes.get("accumulate_grad_batches", 1)))
    assert all(value.isfinite().all() for value in ema.average.values())
    return guard, poison


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing_and_counts(tmp_path, kind):
    guard, poison = guarded(tmp_path, kind, {1})
    before, after, later = poison.weights[0], poison.weights[1], poison.weights[2]
    assert equal(after, before)
    assert not equal(later, after) and all(value.isfinite().all() for value in later.values())
    assert (guard.total, guard.in_a_row) == (1, 0)
    (line,) = [json.loads(line) for line in guard.path.read_text().splitlines()]
    assert line["step"] == 2 and line["gradient_norm"] == "nan"
    assert line["keys"] == [["4", "5", "6", "7"]]


def test_what_follows_is_as_if_the_step_had_not_been(tmp_path):
    """Its batch aside, which the stream has gone past."""
    _, poison = guarded(tmp_path, "nan_loss", {1}, steps=3)
    torch.manual_seed(0)
    model, other = diffusion_model(), Poison("none", set())
    stream = batches(3)
    del stream.rows[1]
    trainer(tmp_path, other, max_steps=2).fit(model, stream)
    assert equal(poison.weights[-1], other.weights[-1])


def test_of_accumulated_micro_batches_those_that_are_not_finite_are_named(tmp_path):
    guard, poison = guarded(tmp_path, "nan_loss", {3}, steps=3, accumulate_grad_batches=2)
    assert equal(poison.weights[3], poison.weights[1]) and not equal(poison.weights[5], poison.weights[3])
    (line,) = [json.loads(line) for line in guard.path.read_text().splitlines()]
    assert line["step"] == 2 and line["keys"] == [["12", "13", "14", "15"]]


def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 5, .* not finite; .*skipped_steps\.jsonl"):
        guarded(tmp_path, "nan_loss", {0, 2, 3, 4}, steps=9)
    guard, _ = guarded(tmp_path, "nan_loss", {0, 2, 3, 5, 6}, steps=9)
    assert guard.total == 5


def test_a_resumed_run_forgets_the_steps_it_will_make_again(tmp_path):
    path = tmp_path / "skipped_steps.jsonl"
    first = trainer(tmp_path, Guard(path, 3), Poison("nan_loss", {1}), max_steps=3)
    first.fit(diffusion_model(), batches(3))
    first.save_checkpoint(tmp_path / "checkpoint")
    with path.open("a") as file:  # a step of which there is no checkpoint
        file.write(json.dumps({"step": 4, "gradient_norm": "nan", "keys": [["killed"]]}) + "\n")
    again = trainer(tmp_path, Guard(path, 3), Poison("nan_loss", {0}), max_steps=5)
    again.fit(diffusion_model(), batches(5, 3), ckpt_path=tmp_path / "checkpoint", weights_only=True)
    keys = [["4", "5", "6", "7"], ["12", "13", "14", "15"]]
    assert [(row["step"], *row["keys"]) for row in rows(path)] == [(2, keys[0]), (4, keys[1])]


def test_the_count_goes_on_in_a_resumed_run(tmp_path):
    one, again = Guard(tmp_path / "x", 3), Guard(tmp_path / "x", 3)
    one.total, one.in_a_row = 5, 2
    again.load_state_dict(one.state_dict())
    assert (again.total, again.in_a_row) == (5, 2)
