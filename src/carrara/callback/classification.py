"""How often the classifier is right."""

from carrara.callback.score import Setting, prefix
from carrara.classifier.cnn import CNN
from carrara.metric.mean import Mean
from carrara.model.base import Model


class Classification:
    """Logs `val/accuracy`; a label that was not in training counts as wrong.

    Args:
        num_images: pictures of each split; all if there are fewer.
        batch_size: pictures a forward pass.
    """

    def __init__(self, num_images: int, batch_size: int):
        self.num_images = num_images
        self.batch_size = batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        classifier = model.exported
        assert isinstance(classifier, CNN)
        scores = {}
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_images]
            accuracy = Mean().to(setting.device)
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                with setting.autocast():
                    logits = classifier(batch["images"].to(setting.device).float() / 127.5 - 1)
                right = logits.argmax(1) == classifier.labels(batch["captions"]).to(setting.device)
                accuracy.update(right.double().mean(), len(chunk))
            scores[f"{prefix(split)}accuracy"] = float(accuracy.compute())
            scores[f"{prefix(split)}num_images"] = float(len(indices))
        return scores
