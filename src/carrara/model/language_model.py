"""Training a language model on captions; pictures are not looked at."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carrara import keyed_random
from carrara.language_model.transformer import MASK_ID, LanguageModel
from carrara.model.base import Model, OptimizerFactory
from carrara.model.token_loss import mean_by_caption
from carrara.network.hugging_face import EXPORTED

_CHOSEN = 0.15  # of the words, to be predicted; of these
_HIDDEN = 0.8  # are replaced by the mask token
_REPLACED = 0.1  # are replaced by any token, and the rest is left as it is


class LanguageModelModel(Model):
    """Mean cross-entropy of the predicted tokens, caption by caption: see `mean_by_caption`.

    - masked: 15 % of each caption's words, rounded, and one at least; 80 % of them are hidden, 10 % replaced at random
      and 10 % left, so that the network has to look at all of them (Devlin et al. 2019, section 3.1). All draws are
      keyed by the caption's position in the stream, so validation draws the same ones every time;
    - causal: every token, from those before it (Radford et al. 2019).

    Args:
        language_model: what is trained.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "language_model"

    def __init__(
        self,
        language_model: LanguageModel,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        self.language_model = language_model

    @property
    def hot(self) -> list[nn.Module]:
        return [self.language_model.encoder]

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":  # see `carrara.network.attention.attend`
            self.language_model.network.set_attn_implementation("eager")

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        """The loss; there is nothing for `u` to replace."""
        return {"loss": mean_by_caption(*self.predictions(batch))}

    def predictions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch's N predicted tokens: logits (N, vocab_size) float32, true ids (N,), and (B, L) bool where."""
        model = self.language_model
        ids, mask = (x.to(self.device) for x in model.tokenizer(batch["captions"]))
        targets = model.targets(ids, mask)
        if model.causal:
            hidden = model(ids[:, :-1], mask[:, :-1])
            ids, chosen = ids[:, 1:], targets[:, 1:]
        else:
            chosen = self._choose(batch, targets)
            hidden = model(self._corrupt(batch, ids, chosen), mask)
        return model.logits(hidden[chosen]).float(), ids[chosen], chosen

    def write_exported(self, folder: Path) -> None:
        self.language_model.save_pretrained(folder / EXPORTED)

    def _choose(self, batch: dict[str, Any], words: Tensor) -> Tensor:
        """(B, L) bool: which of the `words` (B, L) are predicted, those with the smallest numbers."""
        order = self._draw(batch, "chosen", words).masked_fill(~words, torch.inf).argsort(1).argsort(1)
        count = (_CHOSEN * words.sum(1)).round().clamp_min(1)
        return words & (order < count[:, None])

    def _corrupt(self, batch: dict[str, Any], ids: Tensor, chosen: Tensor) -> Tensor:
        """ids (B, L) with most of the chosen ones hidden or replaced."""
        tokenizer = self.language_model.tokenizer
        first, end = tokenizer.num_special, tokenizer.backend.get_vocab_size()
        any_token = first + (self._draw(batch, "any_token", ids) * (end - first)).long()
        u = self._draw(batch, "corrupted", ids)
        corrupted = ids.where(~chosen | (u >= _HIDDEN + _REPLACED), any_token)
        return corrupted.masked_fill(chosen & (u < _HIDDEN), MASK_ID)

    def _draw(self, batch: dict[str, Any], purpose: str, like: Tensor) -> Tensor:
        """(B, L) uniforms; a longer caption in the batch, and so a larger L, leaves a caption's first ones alone."""
        return keyed_random.uniform(self.seed, batch["positions"], purpose, (like.shape[1],)).to(like.device)
