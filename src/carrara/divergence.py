"""Kullback-Leibler divergences KL(p‖q) = E_p[log p − log q], in nats."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def kl_diagonal(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) of diagonal Gaussians, summed over the last dimension.

    All (..., D), broadcast; result (...). Written in terms that are each >= 0, so that rounding keeps it so.
    """
    log_ratio = logvar1 - logvar2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean1 - mean2).square() * torch.exp(-logvar2)).sum(dim=-1)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(0, 1)) per sample, a VAE's regulariser. Kingma & Welling 2014, appendix B.

    mean and logvar (B, ...), at least computed in float32; result (B,), summed over all other dimensions.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(dtype).flatten(1), logvar.to(dtype).flatten(1)
    zero = torch.zeros_like(mean)
    return kl_diagonal(mean, logvar, zero, zero)


def kl_to_uniform(logits: Tensor, dim: int) -> Tensor:
    """KL(softmax(logits) ‖ uniform) = log K − entropy over the K entries of `dim`, which the result lacks."""
    log_p = logits.log_softmax(dim)
    return (log_p.exp() * log_p).sum(dim) + math.log(logits.shape[dim])


def kl_gaussian(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """KL(N(mean1, cov1) ‖ N(mean2, cov2)), a float64 scalar; mean (D,), cov (D, D) positive definite.

    Raises torch.linalg.LinAlgError when a covariance is singular: the divergence is infinite or undefined.
    """
    factor1, factor2 = torch.linalg.cholesky(cov1.double()), torch.linalg.cholesky(cov2.double())
    # With A = factor2⁻¹ factor1, triangular: tr(cov2⁻¹ cov1) = |A|², log det(cov2⁻¹ cov1) = 2 Σ log A_ii.
    ratio = torch.linalg.solve_triangular(factor2, factor1, upper=False)
    shift = torch.linalg.solve_triangular(factor2, (mean1 - mean2).double()[:, None], upper=False)
    log_diagonal = 2 * ratio.diagonal().log()
    spread = (torch.expm1(log_diagonal) - log_diagonal).sum() + ratio.tril(-1).square().sum()
    return 0.5 * (spread + shift.square().sum())


def kl_monte_carlo(
    log_p: Callable[[Tensor], Tensor], log_q: Callable[[Tensor], Tensor], samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate of KL(p‖q) and its standard error, from `samples` (n, ...) of p; float64 scalars.

    log_p, log_q: samples -> log densities (n,). The plain mean of log p − log q: unbiased, and unlike
    estimators in q/p it has a finite variance when q has the heavier tails; within its error it may fall
    below 0.
    """
    difference = log_p(samples).double() - log_q(samples).double()
    return difference.mean(), difference.std() / len(difference) ** 0.5
