"""The codebook's moving averages, its restarts, and that the ranks of a run keep one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from carrara.autoencoder.codebook import Codebook
from carrara.autoencoder.discrete import gumbel

CODES, WIDTH = 12, 3


def codebook(decay: float = 0.9, restart_below: float = 0.0) -> Codebook:
    torch.manual_seed(0)
    return Codebook(CODES, WIDTH, decay, restart_below)


def latents(step: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Latents (n, C) in a few clusters, and their standard Gumbel numbers (n,)."""
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(count, WIDTH, generator=generator) * 0.1 + torch.arange(count)[:, None] % 4
    return z, gumbel(torch.randn(count, generator=generator))


def step(book: Codebook, z: Tensor, noise: Tensor) -> Tensor:
    tokens = book.nearest(z)
    book.collect(z, tokens, noise)
    book.update()
    return tokens


def state(book: Codebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in book.state_dict().items()}


def test_nearest_is_nearest():
    book, z = codebook(), torch.randn(50, WIDTH)
    book.codes[7] = book.codes[2]
    wanted = [min(range(CODES), key=lambda k: sum((row - book.codes[k]) ** 2).item()) for row in z]  # first of equals
    assert book.nearest(z).tolist() == wanted and 7 not in wanted
    assert book.nearest(z.bfloat16()).tolist() == book.nearest(z.bfloat16().float()).tolist()


def test_far_from_the_origin_it_still_tells_codes_apart():
    """|z|² − 2 z·e + |e|² in float32 would not."""
    book = codebook()
    book.codes.mul_(0.01).add_(1000.0)
    assert torch.equal(book.nearest(book.codes), torch.arange(CODES))


def test_the_averages_are_the_papers():
    book = codebook()
    codes, counts, sums = book.codes.clone(), [0.0] * CODES, [torch.zeros(WIDTH) for _ in range(CODES)]
    for k in range(5):
        z, noise = latents(k)
        tokens = step(book, z, noise)
        for code in range(CODES):
            chosen = [row for row, token in zip(z, tokens, strict=True) if token == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(chosen)
            sums[code] = 0.9 * sums[code] + 0.1 * sum(chosen, torch.zeros(WIDTH))
            if counts[code]:
                codes[code] = sums[code] / counts[code]
        torch.testing.assert_close(book.codes, codes)
    assert 0 < sum(count == 0 for count in counts) < CODES  # some were never chosen, and stayed


def test_micro_batches_are_one_step():
    whole, parts = codebook(restart_below=0.1), codebook(restart_below=0.1)
    for k in range(3):
        z, noise = latents(k)
        step(whole, z, noise)
        for half in (slice(25), slice(25, None)):
            parts.collect(z[half], parts.nearest(z[half]), noise[half])
        parts.update()
    torch.testing.assert_close(state(parts), state(whole))


def test_dead_codes_start_again_at_latents():
    book = codebook(restart_below=0.1)
    book.codes[3:] += 100.0
    z, noise = latents(0)
    tokens = step(book, z, noise)
    dead = sorted(set(range(CODES)) - set(tokens.tolist()))
    assert len(dead) >= 9
    distance = (book.codes[dead][:, None] - z).norm(dim=2)
    assert (distance.min(1).values < 1e-6).all() and len(set(distance.argmin(1).tolist())) == len(dead)
    assert (book.counts[dead] == 60 / CODES).all()
    before = state(book)
    step(book, *latents(1))
    assert ((book.codes - before["codes"])[dead].norm(dim=1) < 1).all()  # not dead at once again


def test_a_code_used_enough_stays():
    book = codebook(restart_below=0.1)
    for k in range(60):
        step(book, *latents(k))
    before = state(book)
    tokens = step(book, *latents(60))
    used = torch.bincount(tokens, minlength=CODES)
    kept = book.counts >= 0.1 * 60 / CODES
    torch.testing.assert_close(book.counts[kept & (used > 0)], (0.9 * before["counts"] + 0.1 * used)[kept & (used > 0)])
    assert (used > 0).float().mean() > 0.9  # twelve codes for four clusters, and none is left over


def test_restarts_go_where_codes_are_missing():
    """Among many latents that sit near a code and few that do not, the few are drawn."""
    book = codebook(restart_below=0.1)
    book.codes[:] = 100.0
    book.codes[0] = 0.0
    z = torch.cat([torch.full((2000, WIDTH), 1e-3), torch.full((20, WIDTH), 2.0)])
    z[2000:] += 0.01 * torch.arange(20)[:, None]
    step(book, z, gumbel(torch.randn(len(z), generator=torch.Generator().manual_seed(0))))
    assert (book.codes[1:] > 1.0).all() and (book.codes[1:] < 3.0).all()


def test_a_latent_on_a_code_is_no_place_for_another():
    book = codebook(restart_below=0.1)
    far = book.codes[5:].clone()
    z = book.codes[:5].clone()
    step(book, z, torch.zeros(5))
    torch.testing.assert_close(book.codes[5:], far)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    book = codebook(restart_below=0.1)
    step(book, *latents(0))
    before = state(book)
    z, noise = latents(1)
    z[3, 1] = bad
    step(book, z, noise)
    assert all(torch.equal(value, before[name]) for name, value in state(book).items())
    step(book, *latents(2))
    assert not torch.equal(book.codes, before["codes"]) and book.codes.isfinite().all()


# --- ranks ---

SPLIT = (slice(23), slice(23, None))  # uneven; in the last step the second has fewer latents than there are codes
STEPS = 6


def train(rank: int | None) -> Codebook:
    """The codebook after some steps on all latents, or on this rank's share; one step is not finite on rank 1."""
    book = codebook(restart_below=0.3)
    for k in range(STEPS):
        z, noise = latents(k, 60 if k < STEPS - 1 else 30)
        if k == 3:
            z[40] = torch.nan
        share = slice(None) if rank is None else SPLIT[rank]
        step(book, z[share], noise[share])
    return book


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(train(rank).state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_keep_the_codebook_of_one(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = train(None).state_dict()
    assert first.keys() == second.keys() == alone.keys() == {"codes", "counts", "sums"}
    assert all(torch.equal(first[name], second[name]) for name in alone)
    torch.testing.assert_close(first, dict(alone), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
