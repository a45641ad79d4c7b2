"""A codebook that follows the latents by moving averages instead of by gradient."""

import torch
from torch import Tensor, nn


class Codebook(nn.Module):
    """Each code is the moving average of the latents nearest to it (van den Oord et al. 2017, appendix A.1):

        N_k ← γ N_k + (1 − γ) n_k,    m_k ← γ m_k + (1 − γ) Σ_j z_kj,    e_k = m_k / N_k

    with the n_k latents z_kj that chose code k in a step, on all ranks together. A code that has come to be chosen far
    less than the average one is dead: it starts again at a latent of that step, drawn in proportion to the squared
    distance from its code (as k-means++ does, Arthur & Vassilvitskii 2007), so that it goes where codes are missing.
    So the first step puts them among the latents.

    A step whose latents are not all finite on all ranks changes nothing on any.

    Args:
        num_codes: K.
        width: C, features of a code.
        decay: γ.
        restart_below: a code is dead once N_k is less than this share of the average over all codes; 0 never restarts.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, width: int, decay: float, restart_below: float):
        super().__init__()
        self.decay = decay
        self.restart_below = restart_below
        self.register_buffer("codes", torch.randn(num_codes, width))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, width))
        # of the micro-batches of this step; no buffers, which DDP would overwrite with those of rank 0
        self._statistics: list[Tensor] = []
        self._candidates: list[Tensor] = []

    def nearest(self, z: Tensor) -> Tensor:
        """The codes (n,) int64 nearest to z (n, C); of several equally near the first."""
        mode = "donot_use_mm_for_euclid_dist"  # the other way cancels, and rounds to TF32 on a GPU
        rows = z.float().split(_ROWS)
        return torch.cat([torch.cdist(part, self.codes, compute_mode=mode).argmin(1) for part in rows])

    @torch.no_grad()
    def collect(self, z: Tensor, tokens: Tensor, gumbel: Tensor) -> None:
        """Take in a micro-batch of this rank for the next `update`.

        Args:
            z: (n, C) float32.
            tokens: (n,) of `nearest`.
            gumbel: (n,) standard Gumbel numbers, by which places for dead codes are drawn.
        """
        statistics = z.new_zeros(len(self.codes), 1 + z.shape[1])
        self._statistics.append(statistics.index_add_(0, tokens, torch.cat([torch.ones_like(z[:, :1]), z], dim=1)))
        # the largest of log p + Gumbel are a sample without replacement (Vieira 2014; Kool et al. 2019, sec. 2.3)
        score = (z - self.codes[tokens]).square().sum(1).log() + gumbel
        self._candidates.append(_best(torch.cat([score[:, None], z], dim=1), len(self.codes)))

    @torch.no_grad()
    def update(self) -> None:
        """Once after the micro-batches of a step, on all ranks."""
        if not self._statistics:
            return
        statistics, candidates = _sum_of_ranks(torch.stack(self._statistics).sum(0)), torch.cat(self._candidates)
        self._statistics, self._candidates = [], []
        if not statistics.isfinite().all():
            return
        counts, sums = statistics[:, 0], statistics[:, 1:]
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        average = counts.sum() / len(self.codes)
        dead = self.counts < self.restart_below * average
        if dead.any():  # on all ranks or on none
            places = _best(_of_all_ranks(_best(candidates, len(self.codes))), int(dead.sum()))[:, 1:]
            restarted = dead.nonzero()[: len(places), 0]
            self.counts[restarted] = average  # time to prove itself
            self.sums[restarted] = average * places[: len(restarted)]
        alive = self.counts > 0
        self.codes[alive] = self.sums[alive] / self.counts[alive, None]


_ROWS = 8192  # latents whose distances to all codes are held at once


def _best(candidates: Tensor, count: int) -> Tensor:
    """The `count` rows with the highest scores, best first, without those that are on a code already (score −∞)."""
    order = candidates[:, 0].argsort(descending=True, stable=True)[:count]
    best = candidates[order]
    return best[best[:, 0] > -torch.inf]


def _sum_of_ranks(statistics: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(statistics)
    return statistics


def _of_all_ranks(candidates: Tensor) -> Tensor:
    """The candidates of every rank, in the ranks' order; ranks may have different numbers of them."""
    if not torch.distributed.is_initialized():
        return candidates
    world = torch.distributed.get_world_size()
    numbers = [torch.zeros(1, dtype=torch.int64, device=candidates.device) for _ in range(world)]
    torch.distributed.all_gather(numbers, torch.tensor([len(candidates)], device=candidates.device))
    most = max(int(number) for number in numbers)
    padded = candidates.new_zeros(most, candidates.shape[1])
    padded[: len(candidates)] = candidates
    gathered = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([rows[: int(number)] for rows, number in zip(gathered, numbers, strict=True)])
