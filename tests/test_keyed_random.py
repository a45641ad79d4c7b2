import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from carrara import keyed_random
from carrara.keyed_random import SMALLEST, normal, spread, uniform

N = 40_000


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize("positions", [torch.arange(N), torch.arange(N) * 1024 + 7, torch.arange(N) + 2**40])
def test_uniforms_of_a_stream_are_uniform(positions):
    assert stats.kstest(uniform(0, positions, "time").numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("start", [0, 12345, 2**40])
@pytest.mark.parametrize("size", [16, 64, 1000])
def test_spread_uniforms_leave_no_gap_in_any_batch(start, size):
    """Golden-ratio sequences have gaps of at most φ²/n (independent uniforms: about log(n)/n)."""
    u = spread(0, torch.arange(start, start + size), "time").sort().values.double()
    gaps = torch.cat([u, u[:1] + 1]).diff()
    assert gaps.max() < 2.62 / size
    assert u.min() > 0 and u.max() < 1


def test_spread_uniforms_are_keyed_by_position_seed_and_purpose():
    positions = torch.tensor([3, 17, 2**33, 0, 9])
    together = spread(0, positions, "time")
    assert torch.equal(together, torch.cat([spread(0, positions[k : k + 1], "time") for k in range(5)]))
    assert torch.equal(together, spread(0, positions, "time"))
    for other in (spread(1, positions, "time"), spread(0, positions, "other"), spread(0, positions + 1, "time")):
        assert not torch.isclose(together, other).any()
    caption_drops = uniform(0, torch.arange(N), "caption_dropout")
    assert abs(correlation(spread(0, torch.arange(N), "time"), caption_drops)) < 4 / math.sqrt(N)


def test_uniforms_of_a_sample_are_uniform():
    assert stats.kstest(uniform(0, torch.tensor([5]), "time", (N,))[0].numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4)])
def test_normals_are_normal(shape):
    draws = normal(0, torch.arange(N // math.prod(shape)), "noise", shape).flatten()
    assert stats.kstest(draws.numpy(), "norm").pvalue > 0.01
    assert abs(float((draws**4).mean()) - 3) < 0.15  # the tails


def test_purposes_positions_and_seeds_are_independent():
    positions = torch.arange(N)
    u = uniform(0, positions, "time")
    others = [
        uniform(0, positions, "noise"),
        uniform(1, positions, "time"),
        uniform(0, positions + 1, "time"),
        uniform(0, positions + 1024, "time"),
        uniform(0, positions, "time", (2,))[:, 1],
    ]
    for other in others:
        assert not torch.equal(u, other)
        assert abs(correlation(u, other)) < 4 / math.sqrt(N)
        table = torch.histogramdd(torch.stack([u, other], 1), bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
        assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-3  # jointly, too


def test_the_two_normals_of_a_pair_are_independent():
    x = normal(0, torch.arange(N), "noise", (2,))
    assert abs(correlation(x[:, 0], x[:, 1])) < 4 / math.sqrt(N)
    assert abs(correlation(x[:, 0] ** 2, x[:, 1] ** 2)) < 4 / math.sqrt(N)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_receives_the_same_in_any_batch(draw):
    positions = torch.tensor([3, 17, 2**33, 0, 9])
    together = draw(0, positions, "noise", (3, 2))
    alone = torch.cat([draw(0, positions[k : k + 1], "noise", (3, 2)) for k in range(5)])
    turned = draw(0, positions.flip(0), "noise", (3, 2)).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, turned)
    assert torch.equal(together.flatten(1), draw(0, positions, "noise", (6,)))


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    first = normal(0, torch.arange(4), "noise", (5,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(normal(0, torch.arange(4), "noise", (5,)), first)


@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63)])
def test_the_ends_of_the_interval_are_never_reached(monkeypatch, bits):
    monkeypatch.setattr(
        keyed_random, "_bits", lambda seed, positions, purpose, count: torch.full((len(positions), count), bits)
    )
    u = uniform(0, torch.arange(1), "time")
    assert SMALLEST <= float(u) <= 1 - SMALLEST < 1
    assert normal(0, torch.arange(1), "noise", (2,)).isfinite().all()


def test_the_generator_is_splitmix64():
    """Reference output of Vigna's splitmix64.c for seed 1234567, which pins shifts, constants and overflow."""
    states = (1234567 + torch.arange(1, 4) * keyed_random._GOLDEN).long()
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % 2**64 for value in keyed_random._mix(states).tolist()] == expected


def test_the_numbers_stay_what_they_are():
    """A run that goes on with another version of the code must not get other noise."""
    assert uniform(0, torch.tensor([0, 1]), "time").tolist() == pytest.approx([0.5541922450, 0.7913433909], abs=1e-7)
    draws = normal(7, torch.tensor([123]), "noise", (3,))[0]
    assert draws.tolist() == pytest.approx([1.2696744, 0.6432211, -0.1730680], abs=1e-5)
