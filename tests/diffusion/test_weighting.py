import pytest
import torch

from carrara.diffusion.parameterization import EDM as EDMTarget
from carrara.diffusion.parameterization import X0, Epsilon, Flow, Parameterization, Score, V
from carrara.diffusion.weighting import EDM, P2, LossWeighting, MinSNR, Noise, Sigmoid, Unweighted
from tests.diffusion.oracle import TARGETS

SNR = torch.tensor([1e-4, 0.5, 4.9, 5.1, 1e6], dtype=torch.float64)
ALPHA, SIGMA = torch.sqrt(SNR / (1 + SNR)), torch.sqrt(1 / (1 + SNR))
every_weighting = pytest.mark.parametrize(
    "weighting", [Noise(), MinSNR(), EDM(), Sigmoid(), P2()], ids=lambda w: type(w).__name__
)


def weights(weighting: LossWeighting, p: Parameterization) -> torch.Tensor:
    return weighting(SNR.log(), p.log_sensitivity(ALPHA, SIGMA))


@pytest.mark.parametrize(
    ("p", "divisor"),
    [
        (Epsilon(), SNR),
        (X0(), torch.ones_like(SNR)),
        (V(), SNR + 1),
        (Flow(), (SNR.sqrt() + 1) ** 2),
        (EDMTarget(0.5), SNR + 4),
        (Score(), SNR / SIGMA**2),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_min_snr_of_every_target(p: Parameterization, divisor: torch.Tensor):
    torch.testing.assert_close(weights(MinSNR(5), p), SNR.clamp(max=5) / divisor)


def test_the_papers_tables():
    sigma = 1 / SNR.sqrt()  # as EDM's, where alpha is 1
    torch.testing.assert_close(weights(EDM(0.5), X0()), (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2)  # its lambda
    torch.testing.assert_close(weights(EDM(0.5), EDMTarget(0.5)), torch.ones_like(SNR))  # lambda c_out^2
    torch.testing.assert_close(weights(Sigmoid(2), Epsilon()), torch.sigmoid(2 - SNR.log()))
    torch.testing.assert_close(weights(P2(1, 0.5), Epsilon()), 1 / (1 + SNR).sqrt())
    torch.testing.assert_close(weights(P2(), V()), SNR / (1 + SNR) ** 2)
    torch.testing.assert_close(weights(Noise(), Epsilon()), torch.ones_like(SNR))
    torch.testing.assert_close(weights(Noise(), Score()), SIGMA**2)


@pytest.mark.parametrize("p", TARGETS, ids=lambda p: p.name)
@every_weighting
def test_the_same_x0_loss_is_weighted_whatever_the_target(weighting: LossWeighting, p: Parameterization):
    alpha, sigma = torch.tensor(0.9).double(), torch.tensor(0.2).double()
    logsnr = 2 * (alpha / sigma).log()
    x_t, guess, truth = torch.randn(3, 1000, dtype=torch.float64)
    error = (p.x0_hat(guess, x_t, alpha, sigma) - p.x0_hat(truth, x_t, alpha, sigma)).square().mean()
    of_x0 = weighting(logsnr, X0().log_sensitivity(alpha, sigma))
    of_target = weighting(logsnr, p.log_sensitivity(alpha, sigma))
    torch.testing.assert_close(of_target * (guess - truth).square().mean(), of_x0 * error)


@pytest.mark.parametrize("p", [X0(), V(), Flow(), EDMTarget()], ids=lambda p: p.name)
@pytest.mark.parametrize("weighting", [MinSNR(), Sigmoid(), P2()], ids=lambda w: type(w).__name__)
def test_without_signal_the_weight_is_zero(weighting: LossWeighting, p: Parameterization):
    weight = weighting(torch.tensor(-torch.inf), p.log_sensitivity(torch.zeros(()), torch.ones(())))
    assert weight == 0


def test_unweighted_is_one_everywhere():
    assert torch.equal(weights(Unweighted(), Score()), torch.ones_like(SNR))


def test_impossible_values_are_refused():
    for build in (lambda: MinSNR(0), lambda: EDM(0), lambda: P2(k=0), lambda: P2(gamma=-1)):
        with pytest.raises(ValueError, match=r"gamma|sigma_data|k must"):
            build()
