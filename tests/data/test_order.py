"""The order of samples: every one once an epoch, and a function of seed and epoch alone."""

from itertools import pairwise

import numpy as np
import pytest

from carrara.data.order import Stream, epoch_order, uniforms
from carrara.errors import UserError

SIZES = [7, 0, 30, 1, 12, 5, 20]  # uneven, and one shard without samples
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
MASK = np.random.default_rng(1).random(STARTS[-1]) < 0.7
IDS = np.flatnonzero(MASK)


def stream(seed=0, **options):
    return Stream(MASK, STARTS, seed, **options)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_an_epoch_holds_every_eligible_sample_once(window):
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(epoch_order(MASK, STARTS, 0, epoch, window)), IDS)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(MASK, STARTS, 5, 2).tolist() == epoch_order(MASK, STARTS, 5, 2).tolist()
    others = [epoch_order(MASK, STARTS, seed, epoch) for seed, epoch in ((5, 2), (5, 3), (6, 2), (-5, 2))]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert np.mean(a == b) < 0.3  # two random permutations agree in one place on average


def test_the_shards_are_permuted_anew_in_every_epoch():
    orders = []
    for epoch in range(4):
        shard = np.searchsorted(STARTS, epoch_order(MASK, STARTS, 0, epoch, window=1), side="right") - 1
        orders.append(tuple(shard[np.append(True, np.diff(shard) != 0)].tolist()))
        assert sorted(orders[-1]) == [0, 2, 3, 4, 5, 6]
    assert len(set(orders)) == 4


def test_the_order_is_the_one_of_earlier_versions():
    order = epoch_order(np.ones(12, dtype=bool), np.array([0, 5, 12]), seed=7, epoch=3, window=1)
    assert order.tolist() == [8, 11, 7, 6, 10, 9, 5, 2, 3, 4, 1, 0]


def test_samples_are_mixed_within_a_window_of_shards():
    shard = np.searchsorted(STARTS, epoch_order(MASK, STARTS, 0, 0, window=2), side="right") - 1
    used = [s for s in range(len(SIZES)) if MASK[STARTS[s] : STARTS[s + 1]].any()]
    changes = np.flatnonzero(np.diff(shard)) + 1
    first, last = ({s: f(np.flatnonzero(shard == s)) for s in used} for f in (np.min, np.max))
    for s in used:  # at most one other shard overlaps with it
        assert sum(first[o] <= last[s] and first[s] <= last[o] for o in used if o != s) <= 1
    assert len(changes) > len(used)  # they are mixed, not read one after the other


@pytest.mark.parametrize("options", [{"window": 2}, {"window": 3, "groups": 3, "global_batch": 12}])
def test_any_slice_is_that_of_the_whole(options):
    whole = stream(**options).take(0, 300)
    rng = np.random.default_rng(0)
    jumping = stream(**options)
    for _ in range(50):
        start, stop = np.sort(rng.integers(0, 300, 2)).tolist()
        np.testing.assert_array_equal(jumping.take(start, stop), whole[start:stop])


def test_the_stream_is_the_epochs_end_to_end():
    n = len(IDS)
    expected = np.concatenate([epoch_order(MASK, STARTS, 3, epoch, 2) for epoch in range(3)])
    np.testing.assert_array_equal(stream(3, window=2).take(0, 3 * n), expected)
    assert len(stream()) == n


def test_groups_read_their_own_shards_in_equal_parts_of_every_batch():
    groups, batch = 3, 12
    ids = stream(groups=groups, global_batch=batch, window=1).take(0, 40 * batch).reshape(40, groups, -1)
    shards = np.searchsorted(STARTS, ids, side="right") - 1
    parts = [set(shards[:, g].ravel().tolist()) for g in range(groups)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6
    for g in range(groups):
        of_group = [i for i in IDS.tolist() if int(np.searchsorted(STARTS, i, side="right")) - 1 in parts[g]]
        epoch = ids[:, g].ravel()[: len(of_group)]
        assert sorted(epoch.tolist()) == of_group


def test_groups_that_cannot_be_dealt_are_refused():
    with pytest.raises(UserError, match="does not divide"):
        stream(groups=5, global_batch=12)
    with pytest.raises(UserError, match="more than the 6 shards"):
        stream(groups=12, global_batch=12)
    with pytest.raises(UserError, match="shuffle_window"):
        stream(window=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [2, 4, 100])
def test_the_shards_ahead_are_those_of_the_next_window(window, groups):
    """Every shard is told before it is read, but those of the first windows (and of one that a single batch reads)."""
    one = stream(window=window, groups=groups, global_batch=2)
    told: set[int] = set()
    missed: set[int] = set()
    for position in range(0, 4 * len(one), 2):
        shards = set((np.searchsorted(STARTS, one.take(position, position + 2), side="right") - 1).tolist())
        missed |= shards - told - missed if position >= len(one) else set()
        told |= set(one.ahead(position, position + 2).tolist())
        assert len(one.ahead(position, position + 2)) <= window * groups
    assert not missed and told == {0, 2, 3, 4, 5, 6}


def test_a_node_is_told_the_shards_of_its_group_alone():
    one = stream(window=1, groups=3, global_batch=12)
    shards = np.flatnonzero([MASK[a:b].any() for a, b in pairwise(STARTS.tolist())])
    for group in range(3):
        told = [one.ahead(12 * k + 4 * group, 12 * k + 4 * group + 4).tolist() for k in range(40)]
        assert {shard for ahead in told for shard in ahead} == set(shards[group::3].tolist())
    assert sorted(one.ahead(0, 12)) == sorted(shard for g in range(3) for shard in one.ahead(4 * g, 4 * g + 4))


@pytest.mark.parametrize("options", [{"window": 2}, {"window": 1, "groups": 3, "global_batch": 12}])
def test_a_substitute_is_eligible_and_always_the_same(options):
    found = [stream(**options).substitute(p, a) for p in range(200) for a in range(6)]
    one = stream(**options)
    assert found == [one.substitute(p, a) for p in range(200) for a in range(6)]
    assert set(found) == set(IDS.tolist())


@pytest.mark.parametrize("options", [{}, {"groups": 3, "global_batch": 12}])
def test_a_substitute_is_first_looked_for_where_the_sample_is(options):
    """A shard that lies far away would be fetched for it alone."""
    one = stream(window=1, **options)
    for position, sample in enumerate(one.take(0, 2 * len(IDS)).tolist()):
        found = [sample, *(one.substitute(position, attempt) for attempt in range(3))]
        shards = (np.searchsorted(STARTS, found, side="right") - 1).tolist()
        alone = np.count_nonzero(MASK[STARTS[shards[0]] : STARTS[shards[0] + 1]]) == 1
        assert alone or (len(set(shards)) == 1 and sample not in found[1:])


def test_uniforms_belong_to_a_position():
    together = uniforms(3, 1000, 64)
    assert together.shape == (64, 4)
    np.testing.assert_array_equal(together[10:20], uniforms(3, 1010, 10))
    assert not np.isclose(together, uniforms(4, 1000, 64)).any()
    many = uniforms(0, 0, 20_000)
    assert 0 <= many.min() < 0.001 and 0.999 < many.max() < 1
    np.testing.assert_allclose(many.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(many, rowvar=False), np.eye(4), atol=0.03)
