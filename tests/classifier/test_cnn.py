import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carrara.callback.classification import Classification
from carrara.classifier.cnn import CNN
from carrara.metric.extractor import OwnExtractor
from carrara.metric.frechet import FrechetDistance
from carrara.metric.kernel_distance import kernel_distance
from carrara.network.labels import Labels
from tests.tiny import Stream, classifier_model, setting, trainer

CLASSES = [f"{color} {size}" for size in ("small", "large") for color in ("red", "green", "blue")]


def squares(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, 16, 16) of one square of one of 3 colours and 2 sizes; its label says which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (n,), generator=generator).tolist()
    images = torch.full((n, 3, 16, 16), 40, dtype=torch.uint8)
    for image, label, corner in zip(images, labels, torch.randint(0, 7, (n, 2), generator=generator), strict=True):
        side = 4 if label < 3 else 8
        top, left = corner.tolist()
        image[label % 3, top : top + side, left : left + side] = 220
    return images, [CLASSES[label] for label in labels]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> CNN:
    """Trained as `model=classifier` does, on 60 batches of squares."""
    torch.manual_seed(0)
    model = classifier_model(CLASSES, channels=[8, 16, 32, 64], max_steps=60)
    rows = []
    for step in range(60):
        images, captions = squares(32, seed=step)
        rows.append({"images": images, "captions": captions, "positions": torch.arange(32) + 32 * step})
    trainer(tmp_path_factory.mktemp("cnn"), max_steps=60).fit(model, Stream(rows))
    return model.classifier.eval()


def noised(images: Tensor, level: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + level * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, times: int) -> Tensor:
    values = images.float()
    for _ in range(times):
        values = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return values.round().to(torch.uint8)


@torch.no_grad()
def test_learns_the_labels(classifier):
    images, captions = squares(128, seed=1000)
    answers = classifier(images.float() / 127.5 - 1).argmax(1)
    assert (answers == classifier.labels(captions)).double().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize(
    ("damage", "levels"), [(noised, (5, 10, 20, 40, 80)), (blurred, (1, 2, 4, 8, 16))], ids=["noise", "blur"]
)
def test_distances_rise_with_damage(classifier, damage, levels):
    extractor = OwnExtractor(classifier.features, classifier.feature_dim)
    images, _ = squares(200, seed=1001)  # against themselves: other squares differ by more than the least damage
    real = extractor(images)
    assert real.shape == (200, 64)
    frechet, kernel = [], []
    for damaged in (images, *(damage(images, level) for level in levels)):
        features = extractor(damaged)
        metric = FrechetDistance(64, num_images=200)
        metric.update(real, real=True)
        metric.update(features, real=False)
        frechet.append(float(metric.compute()))
        kernel.append(float(kernel_distance(real, features)))
    for scores in (frechet, kernel):
        assert all(low < high for low, high in zip(scores, scores[1:]))  # noqa: RUF007 (pairwise reads worse)


@torch.no_grad()
def test_accuracy_is_the_share_of_right_answers(monkeypatch):
    model = classifier_model(["a", "b"]).eval()
    monkeypatch.setattr(Labels, "forward", lambda self, captions: torch.zeros(len(captions), dtype=torch.int64))
    answers = iter([[0, 0, 1], [1], [0, 1, 1], [0]])  # chunks of 4 held-out, then of 4 seen pictures
    monkeypatch.setattr(CNN, "forward", lambda self, images: F.one_hot(torch.tensor(next(answers)), 2).float())
    scores = Classification(num_images=4, batch_size=3)(model, setting(20))
    assert scores == {
        "val/accuracy": 0.5, "val/num_images": 4, "val_seen/accuracy": 0.5, "val_seen/num_images": 4,
    }  # fmt: skip
