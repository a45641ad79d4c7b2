"""Vocabularies are learned before the first step: once, on rank 0."""

from collections.abc import Callable, Iterable

import lightning
from lightning.pytorch.callbacks import Callback

from carrara.network.vocabulary import Vocabulary


class LearnVocabularies(Callback):
    """Trains every vocabulary of the model that has not been trained yet, and gives it to all ranks.

    Args:
        many: gives so many captions that more add nothing to a vocabulary, in one order.
        every: gives all there are, for those that have to be complete.
    """

    def __init__(self, many: Callable[[], Iterable[str]], every: Callable[[], Iterable[str]]):
        self.many, self.every = many, every

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Not in `setup`: here a resumed run has its checkpoint's, and no captions are read again."""
        for module in pl_module.modules():
            if isinstance(module, Vocabulary) and not module.trained:
                if trainer.is_global_zero:
                    module.train_on((self.every if module.complete else self.many)())
                module.set_extra_state(trainer.strategy.broadcast(module.get_extra_state()))
