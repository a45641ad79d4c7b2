"""Optimizers and their learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def orthogonalize(updates: Tensor, steps: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by Newton–Schulz iteration (Jordan et al. 2024, "Muon").

    The quintic iteration is X <- (aI + bA + cA²)X with A = XXᵀ. For long matrices it runs on the small square side:
    it only ever multiplies X from the left by polynomials in the first A, so X itself is touched twice. That form needs
    float32: in bfloat16 eigenvalues of A that rounding brought below zero grow.

    Args:
        updates: (k, m, n) matrices with m <= n, float32.
        steps: of the iteration.
        dtype: of the products with X; bfloat16 will do.

    Returns:
        (k, m, n) of `dtype`; all but the smallest singular values are brought into about [0.7, 1.2].
    """
    return (_by_gram if updates.shape[2] >= 2 * updates.shape[1] else _directly)(updates, steps, dtype)


def _directly(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + _TINY)).to(dtype)
    for _ in range(steps):
        x = _factor(x @ x.mT) @ x
    return x


def _by_gram(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    gram = x @ x.mT
    scale = 1 / (gram.diagonal(dim1=1, dim2=2).sum(1).sqrt() + _TINY)[:, None, None]
    gram = gram * scale.square()
    total = scale * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for step in range(steps):
        factor = _factor(gram)
        total = factor @ total
        gram = factor @ gram @ factor if step < steps - 1 else gram
    return total.to(dtype) @ x.to(dtype)


def _factor(gram: Tensor) -> Tensor:
    """aI + bA + cA² of A (k, m, m), with the published coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.baddbmm(b * gram, gram, gram, alpha=c).add_(identity, alpha=a)


_TINY = 1e-7  # a gradient of zeros stays one


def _matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware: the iteration forgives the rounding."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.AdamW):
    """Muon for hidden matrices and convolution kernels flattened to (out, −1), AdamW for everything else.

    Muon: Jordan et al. 2024; the update's scale 0.2·√max(m, n) and the weight decay after Liu et al. 2025
    (arXiv 2502.16982), so that one learning rate serves both halves. `torch.optim.Muon` refuses kernels.

    Args:
        params: parameter groups; those with `muon=True` take Muon's step, the others AdamW's.
        momentum: Muon's, with Nesterov's look-ahead.
        lr, betas, weight_decay: as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        super().step()
        return loss

    def _muon_step(self, group: dict) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = {}  # matrices of one shape go through the iteration together
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
        for (rows, columns), params in by_shape.items():
            updates = torch.stack([update.flatten(1) for update in self._momentum(params, group["momentum"])])
            dtype = _matmul_dtype(updates.device)
            if rows <= columns:
                updates = orthogonalize(updates, dtype=dtype)
            else:
                updates = orthogonalize(updates.mT, dtype=dtype).mT.contiguous()
            step = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(updates, params, strict=True)], alpha=-step)

    def _momentum(self, params: list[Tensor], momentum: float) -> Sequence[Tensor]:
        """The gradients with Nesterov's momentum; the gradients are taken, so AdamW's step passes over them."""
        for p in params:
            if not self.state[p]:
                # AdamW's own state has a step, and loading looks for it
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        grads = [p.grad for p in params if p.grad is not None]
        averages = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, averages, momentum)
        for p in params:
            p.grad = None
        return updates


def parameter_groups(module: nn.Module) -> list[dict]:
    """Trainable parameters in two groups: hidden matrices and kernels (`muon=True`) and everything else.

    Hidden are the `weight`s of two or more dimensions of linear and convolution layers, except those that map from
    or to something that is not a feature: a module names them in `not_hidden`, a tuple of its attributes' names.
    A table that is an embedding's and an output layer's is the embedding's.
    """
    outer = {
        id(parameter)
        for m in module.modules()
        for name in getattr(m, "not_hidden", ())
        for parameter in getattr(m, name).parameters()
    }
    outer |= {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    seen: set[int] = set()
    for m in module.modules():
        for p in m.parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                matrix = isinstance(m, nn.Linear | nn.Conv2d) and p.ndim >= 2 and id(p) not in outer
                (hidden if matrix else other).append(p)
    return [{"params": hidden, "muon": True}, {"params": other, "muon": False, "weight_decay": 0.0}]


def warmup_cooldown(warmup_steps: int, max_steps: int, cooldown: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: linear warm-up, constant, linear to 0 over the last `cooldown` share."""
    cooldown_steps = max(cooldown * max_steps, 1e-9)

    def factor(step: int) -> float:
        return max(min((step + 1) / (warmup_steps + 1), 1.0, (max_steps - step) / cooldown_steps), 0.0)

    return factor


def adamw(params: Iterable[dict], lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on every parameter (Loshchilov & Hutter 2019); norms, biases and embeddings are not decayed."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)


def sgd(params: Iterable[dict], lr: float) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(params, lr=lr)
