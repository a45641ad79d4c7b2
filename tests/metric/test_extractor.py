import hashlib
from pathlib import Path

import pytest
import torch

from carrara.errors import UserError
from carrara.metric.extractor import INCEPTION_SHA256, InceptionExtractor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

IMAGES = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Stand(torch.nn.Module):
    """Takes what NVIDIA's file takes. Its logits are not its features, so that the flag matters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, dim)

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.linear(images.to(torch.float32).mean(dim=[2, 3]))
        return features if return_features else features[:, :10]


def script(path: Path, dim: int = 2048) -> str:
    """Saves the stand-in and returns its SHA-256."""
    torch.jit.script(Stand(dim)).save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_come_from_the_file(tmp_path):
    digest = script(tmp_path / "net.pt")
    extractor = InceptionExtractor(tmp_path / "net.pt", sha256=digest)
    features = extractor(IMAGES)
    assert features.shape == (2, 2048)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not extractor.train().training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(IMAGES), features)
    with pytest.raises(ValueError, match="uint8"):
        extractor(IMAGES.float())


def test_missing_weights_are_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"missing\.pt: download https://.*inception-2015-12-05\.pt"):
        InceptionExtractor(tmp_path / "missing.pt")


def test_any_other_file_is_refused_before_it_is_loaded(tmp_path):
    script(tmp_path / "net.pt")
    with pytest.raises(UserError, match=f"not {INCEPTION_SHA256}"):
        InceptionExtractor(tmp_path / "net.pt")


def test_a_file_that_is_no_network_or_has_other_features_is_refused(tmp_path):
    (tmp_path / "text.pt").write_bytes(b"text")
    with pytest.raises(UserError, match="not a TorchScript network"):
        InceptionExtractor(tmp_path / "text.pt", sha256=hashlib.sha256(b"text").hexdigest())
    digest = script(tmp_path / "small.pt", dim=12)
    with pytest.raises(ValueError, match="expected 2048 features"):
        InceptionExtractor(tmp_path / "small.pt", sha256=digest)(IMAGES)
