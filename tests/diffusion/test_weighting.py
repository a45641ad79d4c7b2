import pytest
import torch

from carrara.diffusion.parameterization import X0, Epsilon, Flow, Parameterization, V
from carrara.diffusion.weighting import MinSNR, Unweighted

SNR = torch.tensor([1e-4, 0.5, 4.9, 5.1, 1e6], dtype=torch.float64)


@pytest.mark.parametrize(
    ("p", "divisor"),
    [(Epsilon(), SNR), (X0(), torch.ones_like(SNR)), (V(), SNR + 1), (Flow(), (SNR.sqrt() + 1) ** 2)],
    ids=["epsilon", "x0", "v", "flow"],
)
def test_min_snr_of_every_target(p: Parameterization, divisor: torch.Tensor):
    torch.testing.assert_close(MinSNR(5)(SNR.log(), p), SNR.clamp(max=5) / divisor)


@pytest.mark.parametrize("p", [Epsilon(), X0(), V(), Flow()], ids=lambda p: p.name)
def test_min_snr_weights_the_same_x0_loss_whatever_the_target(p: Parameterization):
    alpha, sigma = torch.tensor(0.9).double(), torch.tensor(0.2).double()
    x_t, guess, truth = torch.randn(3, 1000, dtype=torch.float64)
    error = (p.x0_hat(guess, x_t, alpha, sigma) - p.x0_hat(truth, x_t, alpha, sigma)).square().mean()
    weight = MinSNR(5)(2 * (alpha / sigma).log(), p)
    torch.testing.assert_close(weight * (guess - truth).square().mean(), 5 * error)


@pytest.mark.parametrize("p", [X0(), V(), Flow()], ids=lambda p: p.name)
def test_min_snr_is_zero_where_there_is_no_signal_and_finite_where_there_is_no_noise(p: Parameterization):
    weight = MinSNR()(torch.tensor([-torch.inf, torch.inf]), p)
    assert weight[0] == 0
    assert weight[1].isfinite()


def test_unweighted_is_one_everywhere():
    assert torch.equal(Unweighted()(SNR.log(), Epsilon()), torch.ones_like(SNR))


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma"):
        MinSNR(0)
