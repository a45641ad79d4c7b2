"""How well the evaluator finds a picture's caption and a caption's picture."""

from carrara.callback.score import Setting, prefix
from carrara.evaluator.clip import CLIP
from carrara.metric.recall import Recall
from carrara.model.base import Model


class Retrieval:
    """Logs `val/recall_at_1` and `val/recall_at_5` among `num_captions` distinct captions.

    Args:
        num_captions: how many; the more, the harder.
        batch_size: pairs a forward pass.
    """

    def __init__(self, num_captions: int, batch_size: int):
        self.num_captions = num_captions
        self.batch_size = batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        evaluator = model.exported
        assert isinstance(evaluator, CLIP)
        scores = {}
        for split, indices in setting.validation.splits.items():
            recall = Recall(evaluator.embedding_width, max_captions=self.num_captions).to(setting.device)
            # twice as many pairs, since captions may repeat
            for chunk in setting.chunks(indices[: 2 * self.num_captions], self.batch_size):
                batch = setting.validation.take(chunk)
                with setting.autocast():
                    image = evaluator.embed_images(batch["images"].to(setting.device).float() / 127.5 - 1)
                    text = evaluator.embed_texts(batch["captions"])
                recall.update(image, text, batch["captions"], batch["positions"])
            for key, value in recall.compute().items():
                scores[f"{prefix(split)}{key}"] = float(value)
            scores[f"{prefix(split)}num_captions"] = float(recall.num_captions)
        return scores
