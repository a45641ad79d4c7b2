import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carrara.errors import UserError
from carrara.metric.cnn import CNNExtractor, SmallCNN, train_classifier
from carrara.metric.frechet import FrechetDistance
from carrara.metric.kernel_distance import kernel_distance


def squares(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 16, 16) of one square of one of 3 colours and 2 sizes; its label says which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (n,), generator=generator)
    images = torch.full((n, 3, 16, 16), 40, dtype=torch.uint8)
    for image, label, corner in zip(images, labels, torch.randint(0, 7, (n, 2), generator=generator), strict=True):
        side = 4 if label < 3 else 8
        top, left = corner.tolist()
        image[label % 3, top : top + side, left : left + side] = 220
    return images, labels


@pytest.fixture(scope="module")
def network() -> SmallCNN:
    return train_classifier(*squares(256, seed=0), steps=60, batch_size=32, width=8)


def noised(images: Tensor, level: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + level * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, times: int) -> Tensor:
    values = images.float()
    for _ in range(times):
        values = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return values.round().to(torch.uint8)


def test_learns_the_labels(network):
    images, labels = squares(128, seed=1)
    assert (network(images).argmax(1) == labels).double().mean() > 0.9


def test_training_is_reproducible_and_leaves_the_global_random_state(network):
    state = torch.get_rng_state()
    again = train_classifier(*squares(256, seed=0), steps=60, batch_size=32, width=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert CNNExtractor(again).hash == CNNExtractor(network).hash
    other = train_classifier(*squares(256, seed=0), steps=2, batch_size=32, width=8, seed=1)
    assert CNNExtractor(other).hash != CNNExtractor(network).hash


@pytest.mark.parametrize(
    ("damage", "levels"), [(noised, (5, 10, 20, 40, 80)), (blurred, (1, 2, 4, 8, 16))], ids=["noise", "blur"]
)
def test_distances_rise_with_damage(network, damage, levels):
    extractor = CNNExtractor(network)
    reference, _ = squares(200, seed=2)
    images, _ = squares(200, seed=3)
    real = extractor(reference)
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


def test_a_saved_extractor_comes_back_under_the_same_hash(network, tmp_path):
    extractor = CNNExtractor(network)
    extractor.save(tmp_path / "cnn.safetensors")
    state = torch.get_rng_state()
    loaded = CNNExtractor.load(tmp_path / "cnn.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    images, _ = squares(8, seed=4)
    assert loaded.hash == extractor.hash
    features = extractor(images)
    assert torch.equal(loaded(images), features)
    assert not loaded.train().training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loaded(images), features)


def test_a_damaged_or_missing_file_is_refused(network, tmp_path):
    path = tmp_path / "cnn.safetensors"
    CNNExtractor(network).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        CNNExtractor.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"was not written by CNNExtractor\.save"):
        CNNExtractor.load(path)
    with pytest.raises(UserError, match=r"was not written by CNNExtractor\.save"):
        CNNExtractor.load(tmp_path / "missing.safetensors")
