import pytest
import torch

from carrara.diffusion.sampler import Euler
from carrara.diffusion.schedule import Cosine
from carrara.diffusion.thresholding import Dynamic, Static, Unbounded


def test_unbounded_changes_nothing():
    x0_hat = 3 * torch.randn(2, 3, 4, 4)
    assert torch.equal(Unbounded()(x0_hat), x0_hat)


def test_static_clips():
    assert Static()(torch.tensor([[-3.0, -0.5, 0.5, 3.0]])).tolist() == [[-1, -0.5, 0.5, 1]]


def test_dynamic_is_imagens_for_each_sample():
    """Saharia et al. 2022, appendix: s is the percentile of |x0_hat|, at least 1."""
    x0_hat = torch.stack([0.3 * torch.randn(3, 16, 16), 4 * torch.randn(3, 16, 16)])
    bounded = Dynamic(0.9)(x0_hat)
    for sample, result in zip(x0_hat, bounded, strict=True):
        s = max(sample.abs().quantile(0.9).item(), 1)
        torch.testing.assert_close(result, sample.clamp(-s, s) / s)
    assert bounded.abs().max() <= 1
    within = 0.9 * torch.rand(1, 3, 4, 4)
    assert torch.equal(Dynamic()(within), within)


def test_a_sampler_sees_the_thresholded_estimate():
    seen = []
    denoise = Static().denoiser(lambda x, t: x * 0 + 7)
    Euler()(denoise, torch.randn(3), Cosine(), Cosine().times(3), on_step=lambda k, t, x, x0_hat: seen.append(x0_hat))
    assert all(torch.equal(x0_hat, torch.ones(3)) for x0_hat in seen)


@pytest.mark.parametrize("quantile", [0, 1.1])
def test_impossible_quantiles_are_refused(quantile: float):
    with pytest.raises(ValueError, match="quantile"):
        Dynamic(quantile)
