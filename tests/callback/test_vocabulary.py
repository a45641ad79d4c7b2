import torch

from carrara.callback.vocabulary import LearnVocabularies
from carrara.evaluator.clip import CLIP
from carrara.model.evaluator import EvaluatorModel
from carrara.network.tokenizer import Tokenizer
from tests.tiny import CAPTIONS, batches, clip, evaluator_model, trainer


def untrained() -> EvaluatorModel:
    model = evaluator_model()
    model.evaluator.tokenizer = Tokenizer(300, 12)
    return model


def test_a_vocabulary_is_learnt_before_the_first_step(tmp_path):
    model = untrained()
    trainer(tmp_path, LearnVocabularies(lambda: CAPTIONS, list), max_steps=1).fit(model, batches(1))
    assert torch.equal(model.evaluator.tokenizer(CAPTIONS)[0], clip().tokenizer(CAPTIONS)[0])


def test_one_that_is_there_is_kept(tmp_path):
    model = evaluator_model()
    before = model.evaluator.tokenizer.get_extra_state()
    trainer(tmp_path, LearnVocabularies(lambda: ["something", "else"], list), max_steps=1).fit(model, batches(1))
    assert torch.equal(model.evaluator.tokenizer.get_extra_state(), before)


def test_a_resumed_run_keeps_the_vocabulary_of_its_checkpoint(tmp_path):
    model = untrained()
    run = trainer(tmp_path, LearnVocabularies(lambda: CAPTIONS, lambda: CAPTIONS), max_steps=1)
    run.fit(model, batches(1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = untrained()
    assert isinstance(again.evaluator, CLIP)

    def read_again() -> list[str]:  # of a million captions
        raise AssertionError

    callback = LearnVocabularies(read_again, read_again)
    trainer(tmp_path, callback, max_steps=1).fit(again, batches(1), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(again.evaluator.tokenizer.get_extra_state(), model.evaluator.tokenizer.get_extra_state())
