"""How well a language model guesses tokens of held-out captions."""

import math

import torch.nn.functional as F

from carrara.callback.score import Setting, prefix
from carrara.metric.mean import Mean
from carrara.model.base import Model
from carrara.model.language_model import LanguageModelModel


class Perplexity:
    """Logs `val/perplexity`, and `val/unigram_perplexity`: what counting tokens gives on the same ones.

    It is the exponential of the mean negative log-probability of the tokens that are predicted (of a masked model: of
    the hidden ones, so its number does not compare with a causal model's).

    Args:
        num_captions: of each split; all if there are fewer.
        batch_size: captions a forward pass.
    """

    def __init__(self, num_captions: int, batch_size: int):
        self.num_captions = num_captions
        self.batch_size = batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, LanguageModelModel)
        scores = {}
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_captions]
            means = {name: Mean().to(setting.device) for name in ("perplexity", "unigram_perplexity")}
            for chunk in setting.chunks(indices, self.batch_size):
                with setting.autocast():
                    logits, ids, _ = model.predictions(setting.validation.take(chunk))
                if len(ids):
                    means["perplexity"].update(F.cross_entropy(logits.double(), ids), len(ids))
                    means["unigram_perplexity"].update(model.language_model.unigram(ids).mean(), len(ids))
            for name, mean in means.items():
                scores[f"{prefix(split)}{name}"] = math.exp(float(mean.compute()))
            scores[f"{prefix(split)}num_captions"] = float(len(indices))
        return scores
