from typing import cast

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.callback.log import JsonLines
from carrara.callback.score import Setting, prefix
from carrara.data.validation import ValidationSet
from carrara.model.base import Model
from tests.tiny import Validation, batches, diffusion_model, equal, setting, trainer, weights


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))


class Look:
    """A score that remembers the weights and modes it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], bool, Setting]] = []

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        self.seen.append((weights(model), model.training, setting))
        return {"val/loss": float(len(self.seen))}


def evaluated(tmp_path, every: int = 2, steps: int = 5, **changes) -> tuple[Evaluation, Look, Memory, EMA, Model]:
    look, memory, ema, model = Look(), Memory(), EMA(0.9), diffusion_model()
    validation = cast(ValidationSet, Validation(8))
    evaluation = Evaluation(
        [look], validation, every, ema, tmp_path / "samples", JsonLines(tmp_path / "metrics.jsonl", 4, every)
    )
    run = trainer(tmp_path, ema, evaluation, max_steps=steps, logger=[memory], **changes)
    run.fit(model, batches(steps * changes.get("accumulate_grad_batches", 1)))
    return evaluation, look, memory, ema, model


def test_scores_are_logged_every_epoch_and_at_the_end(tmp_path):
    evaluation, _, memory, _, _ = evaluated(tmp_path)
    assert memory.lines == [(2, {"val/loss": 1.0}), (4, {"val/loss": 2.0}), (5, {"val/loss": 3.0})]
    assert evaluation.latest == {"val/loss": 3.0}


def test_an_accumulated_step_is_evaluated_once(tmp_path):
    _, _, memory, _, _ = evaluated(tmp_path, every=1, steps=2, accumulate_grad_batches=3)
    assert [step for step, _ in memory.lines] == [1, 2]


def test_averaged_weights_are_scored_and_training_goes_on_with_its_own(tmp_path):
    _, look, _, ema, model = evaluated(tmp_path)
    last, training, where = look.seen[-1]
    assert not training and where.rank == 0 and where.world == 1
    assert all(torch.equal(last[name], value) for name, value in ema.average.items())
    assert not equal(last, weights(model))
    assert model.training


def test_evaluating_does_not_change_the_training(tmp_path):
    states = []
    for every in (1, 100):
        torch.manual_seed(0)
        states.append(weights(evaluated(tmp_path, every)[4]))
    assert equal(states[0], states[1])


@pytest.mark.parametrize("scored", [True, False])
def test_a_resumed_run_scores_a_step_once(tmp_path, scored):
    """Stopped after its checkpoint, before or after the evaluation of step 2."""
    log = JsonLines(tmp_path / "metrics.jsonl", 4, 2)
    look, ema, model = Look(), EMA(0.9), diffusion_model()
    first = trainer(tmp_path, ema, max_steps=2)
    first.fit(model, batches(2))
    first.save_checkpoint(tmp_path / "checkpoint")
    log.log_metrics({"train/loss": 7.0}, 2)
    if scored:
        log.log_metrics({"val/loss": 0.5}, 2)
    average = {name: value.clone() for name, value in ema.average.items()}
    ema = EMA(0.9)
    evaluation = Evaluation([look], cast(ValidationSet, Validation(8)), 2, ema, tmp_path, log)
    run = trainer(tmp_path, ema, evaluation, max_steps=4, logger=[log])
    run.fit(diffusion_model(), batches(4, 2), ckpt_path=tmp_path / "checkpoint", weights_only=True)
    assert log.scores() == {2: {"val/loss": 0.5 if scored else 1.0}, 4: {"val/loss": 1.0 if scored else 2.0}}
    if not scored:
        assert all(torch.equal(look.seen[0][0][name], value) for name, value in average.items())


def test_an_evaluation_leaves_the_ranks_random_numbers_alone(tmp_path):
    def draw(model, setting):
        torch.rand(3)
        return {"val/loss": 1.0}

    log = JsonLines(tmp_path / "metrics.jsonl", 4, 2)
    ema, one, model = EMA(0.9), trainer(tmp_path, max_steps=1), diffusion_model()
    ema.on_fit_start(one, model)
    evaluation = Evaluation([draw], cast(ValidationSet, Validation(8)), 2, ema, tmp_path, log)
    state = torch.get_rng_state()
    evaluation.evaluate(one, model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_chunks_are_the_same_on_any_number_of_ranks(world):
    indices = setting(40).validation.splits["held_out"]
    alone = [chunk.tolist() for chunk in setting(40).chunks(indices, 6)]
    shared = [[chunk.tolist() for chunk in setting(40, rank, world).chunks(indices, 6)] for rank in range(world)]
    assert sorted(chunk for chunks in shared for chunk in chunks) == alone and len(alone) == 4
    assert [index for chunk in alone for index in chunk] == indices.tolist()


def test_names_of_splits():
    assert (prefix("held_out"), prefix("seen")) == ("val/", "val_seen/")
