"""colm_core.py against its slow twins in naive.py, on sizes and values that are easy to get wrong."""

import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colm_core
from colm_core import (
    AdamMoments,
    Coreset,
    LabelledLogits,
    MicroBatch,
    PoolGradients,
    TokenCrossEntropy,
    allocate_budget,
    collate,
    example_losses,
    facility_location,
    groups_of,
    largest_coordinates,
    pack,
    pairwise_similarity,
    select_coreset,
    small_sources,
    sparse_features,
    sparsify,
    unpack,
)

ODD_SIZES = (1, 2, 7, 53, 123)
METRICS = ("l1", "l2", "cosine")


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(s * 1009**i for i, s in enumerate(seed)))


def integers(*shape: int, seed: int = 0, largest: int = 2) -> Tensor:
    """Small whole numbers as floats: their sums are exact, and rows and gains tie often."""
    return torch.randint(-largest, largest + 1, shape, generator=generator(seed, *shape)).float()


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, *shape), dtype=dtype)


def close(actual, expected, tolerance: float = 2e-6) -> None:
    """Equal up to `tolerance` of the largest expected magnitude."""
    expected = torch.as_tensor(expected).detach().double()
    atol = tolerance * float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=max(atol, 1e-30))


# ------------------------------------------------------------------------------------------------ sources and budgets


@pytest.mark.parametrize(
    ("counts", "small"),
    [
        ({"a": 10, "b": 2, "c": 3}, {"b", "c"}),
        ({"a": 5, "b": 5, "c": 5}, set()),  # exactly the mean is not small
        ({"a": 3, "b": 4, "c": 5}, {"a"}),
        ({"a": 1}, set()),
        ({}, set()),
        ({0: 2**53, 1: 2**53 + 1}, {0}),  # whole numbers, compared without rounding
    ],
)
def test_small_sources_lie_below_the_mean(counts, small):
    assert small_sources(counts) == small == naive.small_sources(counts)


@pytest.mark.parametrize("sources", [1, 2, 5, 14])
def test_budgets_match_the_twin_for_every_budget(sources):
    for seed in range(6):
        counts = torch.randint(0, 12, (sources,), generator=generator(seed, sources))
        for budget in range(int(counts.sum()) + 3):
            shares = allocate_budget(counts, budget)
            assert shares.tolist() == naive.allocate_budget(counts.tolist(), budget), (counts, budget)
            assert int(shares.sum()) == min(budget, int(counts.sum()))
            assert bool((shares <= counts).all())


def test_a_remainder_goes_to_the_smallest_budgets_and_then_to_the_first():
    assert allocate_budget(torch.tensor([10, 3, 3, 10]), 7).tolist() == [3, 1, 1, 2]  # from floors 2, 0, 0, 2
    assert allocate_budget(torch.tensor([6, 2, 6]), 5).tolist() == [2, 1, 2]
    assert allocate_budget(torch.tensor([4, 4, 4]), 4).tolist() == [2, 1, 1]
    assert allocate_budget(torch.tensor([0, 1, 9]), 1).tolist() == [
        0,
        1,
        0,
    ]  # nobody is there to be picked in the first
    assert allocate_budget(torch.zeros(0, dtype=torch.long), 3).tolist() == []


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget -1 is negative.*0 or more"):
        allocate_budget(torch.tensor([3, 4]), -1)


# ------------------------------------------------------------------------------------------------------------- medoids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [1, 2, 7, 53])
def test_similarity_matches_the_twin(metric, n):
    for x in (normal(n, 13), integers(n, 3)):
        close(pairwise_similarity(x, metric), naive.pairwise_similarity(x.tolist(), metric))


def test_similarity_of_nothing_is_empty_and_an_unknown_metric_is_refused():
    for metric in METRICS:
        assert pairwise_similarity(torch.zeros(0, 3), metric).shape == (0, 0)
    with pytest.raises(ValueError, match="metric 'dot' is unknown: use l1, l2 or cosine"):
        pairwise_similarity(torch.zeros(2, 3), "dot")


def test_l1_similarity_keeps_small_distances_of_large_rows():
    x = torch.tensor([[1000.0, 0.0], [1000.0, 0.001], [1001.0, 0.0]])  # |a|^2 + |b|^2 - 2ab would lose the second row
    for metric in ("l1", "l2"):
        close(pairwise_similarity(x, metric), naive.pairwise_similarity(x.tolist(), metric), tolerance=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", ODD_SIZES)
def test_facility_location_matches_the_twin(metric, n):
    for x in (integers(n, 3), normal(n, 5)):  # the first has duplicate rows and many ties
        similarity = pairwise_similarity(x, metric)
        for k in {1, n // 2, min(n, 17), n if n < 100 else 1}:
            index, weight = facility_location(similarity, k)
            assert (index.tolist(), weight.tolist()) == naive.facility_location(similarity.tolist(), k)
            assert int(weight.sum()) == (n if k else 0)


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5])
def test_rounding_does_not_choose_the_medoids(noise):
    """One SPSA direction puts the rows on a line, where every point between two medians serves equally well."""
    moments, history = AdamMoments(), normal(1, 800)
    moments.update(history * normal(20, 1))
    for seed in range(20):
        derivatives, z = normal(40, 1, seed=seed, dtype=torch.double), normal(1, 800, seed=seed, dtype=torch.double)
        picks = []
        for error in (0, noise):
            f = moments.normalize(derivatives * (1 + error * normal(40, 1, seed=seed + 1)) @ z)
            picks.append(facility_location(pairwise_similarity(f.float()), 12)[0].tolist())
        assert picks[0] == picks[1]


@pytest.mark.parametrize("sizes", [(128,), (130, 120), (150, 3, 2)])
def test_no_row_is_picked_twice_however_large_the_features(sizes):
    """Without history features are +-1: what gains may differ by then exceeds what a picked row adds again, nothing."""
    sources = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    derivatives, z = normal(len(sources), 1), normal(1, 4096)
    gradients = PoolGradients(4096, derivatives, z)
    features = features_of(gradients, sources, AdamMoments(), 2560)
    coreset = select_coreset(features, sources, len(sources) // 2)
    assert len(set(coreset.index.tolist())) == len(sources) // 2
    large = torch.ones(8, 4) * 1e5
    expected = naive.select_coreset(large.tolist(), [0] * 8, 3)
    assert select_coreset(large, torch.zeros(8, dtype=torch.long), 3).index.tolist() == expected[0] == [0, 1, 2]


def test_rows_that_differ_by_rounding_alone_go_to_the_lowest():
    features = torch.ones(9, 50) + 1e-7 * normal(9, 50)
    assert select_coreset(features, torch.zeros(9), 4).index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [7, 53])
def test_facility_location_matches_the_twin_where_similarities_are_negative(n):
    similarity = integers(n, n, largest=5) / 8  # not even symmetric; a row that nobody serves counts 0
    for k in (0, 1, n // 2, n):
        index, weight = facility_location(similarity, k)
        assert (index.tolist(), weight.tolist()) == naive.facility_location(similarity.tolist(), k)


def test_ties_go_to_the_lowest_index_and_duplicates_serve_themselves_when_picked():
    similarity = pairwise_similarity(torch.ones(5, 3))
    index, weight = facility_location(similarity, 3)
    assert index.tolist() == [0, 1, 2]
    assert weight.tolist() == [3, 1, 1]  # rows 3 and 4 stay with the first
    x = torch.tensor([[0.0], [4.0], [4.0], [0.0], [9.0]])
    index, weight = facility_location(pairwise_similarity(x), 3)
    assert index.tolist() == [1, 0, 4]
    assert weight.tolist() == [2, 2, 1]


def test_a_row_that_no_medoid_serves_still_belongs_to_the_nearest():
    similarity = torch.tensor([[1.0, -0.5, -0.9], [-0.5, 1.0, -0.1], [-0.9, -0.1, 0.2]])  # row 2 is far from both
    index, weight = facility_location(similarity, 2)
    assert index.tolist() == [0, 1]
    assert weight.tolist() == [1, 2]


def test_every_row_a_medoid_weighs_one_each():
    index, weight = facility_location(pairwise_similarity(normal(53, 4)), 53)
    assert sorted(index.tolist()) == list(range(53))
    assert weight.tolist() == [1] * 53


@pytest.mark.parametrize("k", [-1, 4])
def test_more_medoids_than_rows_are_refused(k):
    with pytest.raises(ValueError, match=rf"k = {k} medoids of 3 rows: k must lie in 0\.\.3"):
        facility_location(torch.zeros(3, 3), k)


@pytest.mark.parametrize(("n", "dims"), [(1, 7), (7, 53), (53, 123), (123, 7)])
def test_sparsify_matches_the_twin(n, dims):
    for x in (integers(n, dims, largest=1), normal(n, dims)):  # the first ties almost everywhere
        for h in (1, dims // 2, dims - 1, dims, dims + 5):
            assert sparsify(x, h).tolist() == naive.sparsify(x.tolist(), h)


def test_sparsify_looks_at_magnitude_and_keeps_everything_when_h_is_large():
    x = torch.tensor([[1.0, -5.0, 2.0, -2.0], [1.0, -5.0, 2.0, -2.0]])
    assert sparsify(x, 3).tolist() == [[-5.0, 2.0, -2.0]] * 2
    assert sparsify(x, 4) is x
    assert largest_coordinates(torch.tensor([[0.0, 3.0, -3.0], [2.0, 0.0, -4.0]]), 2).tolist() == [[1, 2], [2, 0]]


# -------------------------------------------------------------------------------------------------- Adam normalisation


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_adam_features_match_the_twin_at_every_age_of_the_history(betas, eps):
    dims = 53
    moments, twin = AdamMoments(betas, eps), naive.AdamMoments(dims, betas, eps)
    for age, selected in enumerate((7, 1, 0, 123)):
        g = normal(7, dims, seed=age)
        close(moments.normalize(g), twin.normalize(g.tolist()), tolerance=2e-5)  # 1 - 0.999 in float32
        chosen = normal(selected, dims, seed=10 + age)
        moments.update(chosen)
        twin.update(chosen.tolist())
        close(moments.m, twin.m, tolerance=1e-5)
        close(moments.v, twin.v, tolerance=1e-5)
        assert moments.updates == twin.updates
    assert moments.updates == 3  # an update with nothing selected is none


def test_without_history_a_feature_is_the_sign_of_the_gradient():
    g = torch.tensor([[3.0, -1e-3, 0.0]])
    close(AdamMoments().normalize(g), [[1.0, -1.0, 0.0]], tolerance=2e-5)


def test_normalising_changes_neither_gradients_nor_history():
    moments, g = AdamMoments(), normal(7, 5)
    moments.update(g)
    before = g.clone(), moments.m.clone(), moments.v.clone()
    first = moments.normalize(g)
    assert all(map(torch.equal, before, (g, moments.m, moments.v)))
    assert torch.equal(first, moments.normalize(g))


def test_history_from_sums_is_the_history_from_rows():
    rows, sums = AdamMoments(), AdamMoments()
    for seed in range(3):
        g = normal(7, 5, seed=seed)
        rows.update(g)
        parts = g[:2], g[2:]  # as two ranks would add them up
        sums.update_from_sums(sum(p.sum(0) for p in parts), sum(p.square().sum(0) for p in parts), 7)
    sums.update_from_sums(torch.zeros(5), torch.zeros(5), 0)
    close(sums.m, rows.m)
    close(sums.v, rows.v)
    assert sums.updates == rows.updates == 3


@pytest.mark.parametrize("updates", [0, 3])
def test_moments_survive_a_checkpoint(updates):
    moments = AdamMoments((0.8, 0.95), eps=0.1)
    for seed in range(updates):
        moments.update(normal(7, 5, seed=seed))
    file = io.BytesIO()
    torch.save(moments.state_dict(), file)
    file.seek(0)
    restored = AdamMoments((0.8, 0.95), eps=0.1)
    restored.load_state_dict(torch.load(file))
    for m in (moments, restored):
        m.update(normal(3, 5, seed=9))
    g = normal(7, 5, seed=10)
    assert torch.equal(moments.normalize(g), restored.normalize(g))
    assert restored.updates == updates + 1


# ---------------------------------------------------------------------------------------- features of a pool, in chunks


def pool_case(n: int, dims: int, num_sources: int = 4) -> tuple[Tensor, Tensor, AdamMoments]:
    """Gradients, sources (source 2 has no row where n allows it) and moments with some history."""
    g, moments = normal(n, dims), AdamMoments((0.8, 0.95))
    sources = torch.randint(0, num_sources, (n,), generator=generator(n))
    sources[sources == 2] = 3
    moments.update(normal(5, dims, seed=8))
    return g, sources, moments


def stored(g: Tensor, *sizes: int, device_bytes: int = 1 << 30) -> PoolGradients:
    gradients = PoolGradients(g.shape[1], device_bytes=device_bytes)
    for block in g.split(sizes):
        gradients.add(block)
    return gradients


def features_of(gradients, sources, moments, h, **kwargs) -> Tensor:
    return sparse_features(gradients, sources, 4, moments, h, torch.device("cpu"), **kwargs)


@pytest.mark.parametrize(("n", "dims", "h"), [(1, 7, 3), (7, 7, 7), (53, 23, 5), (123, 7, 50)])
@pytest.mark.parametrize("chunk", [1, 30, 1 << 25])
def test_chunked_features_match_the_twin_and_the_direct_formula(monkeypatch, n, dims, h, chunk):
    monkeypatch.setattr(PoolGradients, "CHUNK", chunk)
    g, sources, moments = pool_case(n, dims)
    features = features_of(stored(g, n // 2, n - n // 2), sources, moments, h)
    assert features.shape == (n, min(h, dims))
    twin = naive.AdamMoments(dims, (0.8, 0.95))
    twin.update(normal(5, dims, seed=8).tolist())
    close(features, naive.sparse_features(g.tolist(), sources.tolist(), twin, h), tolerance=2e-5)
    for q in sources.unique():
        rows = moments.normalize(g)[sources == q]
        kept = largest_coordinates(rows.sum(0, keepdim=True), h)[0]
        assert torch.equal(features[sources == q], rows[:, kept])
        if h < dims:
            assert torch.equal(features[sources == q], sparsify(rows, h))


def test_features_of_float64_gradients_are_float64():
    g, sources, moments = pool_case(53, 23)
    wide = AdamMoments(moments.betas)
    wide.update(normal(5, 23, seed=8).double())
    features = features_of(stored(g.double(), 20, 33), sources, wide, 5)
    assert features.dtype == torch.float64
    close(features, features_of(stored(g, 20, 33), sources, moments, 5), tolerance=1e-5)


def test_small_blocks_of_gradients_are_joined_up_to_a_chunk(monkeypatch):
    monkeypatch.setattr(PoolGradients, "CHUNK", 5 * 7)
    gradients = stored(normal(12, 7), 2, 3, 4, 2, 1)
    chunks = [(rows.start, rows.stop, len(part)) for rows, part in gradients.chunks("meta")]
    assert chunks == [(0, 5, 5), (5, 9, 4), (9, 12, 3)]
    slices, parts = zip(*gradients.chunks("cpu"), strict=True)
    assert slices == (slice(0, 2), slice(2, 5), slice(5, 9), slice(9, 11), slice(11, 12))
    assert torch.equal(torch.cat(parts), normal(12, 7))
    groups = groups_of(gradients.blocks, 5)
    assert [len(group) for group in groups] == [2, 1, 2] and groups_of([], 5) == []
    assert torch.equal(torch.cat([part for group in groups for part in group]), normal(12, 7))
    gradients.blocks[:4] = [block.to("meta") for block in gradients.blocks[:4]]  # the last lies on the host
    list(gradients.chunks("meta"))
    assert [len(block) for block in gradients.blocks] == [5, 4, 2, 1] and gradients.blocks[-1].device.type == "cpu"


@pytest.mark.parametrize("directions", [1, 3])
def test_derivatives_stand_for_explicit_gradients(monkeypatch, directions):
    monkeypatch.setattr(PoolGradients, "CHUNK", 5 * 12)
    _, sources, moments = pool_case(53, 12)
    derivatives, z = normal(53, directions), normal(directions, 3, 4)
    g = torch.tensor([naive.spsa_gradient(d, z.flatten(1).tolist()) for d in derivatives.tolist()])
    gradients = PoolGradients(12, derivatives, z)
    chunks = list(gradients.chunks("cpu"))
    assert [(rows.start, rows.stop) for rows, _ in chunks] == [(i, min(i + 5, 53)) for i in range(0, 53, 5)]
    close(torch.cat([part for _, part in chunks]), g)
    close(features_of(gradients, sources, moments, 5), features_of(stored(g, 53), sources, moments, 5), tolerance=1e-5)
    mask = sources == 3
    for actual, expected in zip(gradients.sums(mask, "cpu"), (g[mask].sum(0), g[mask].square().sum(0)), strict=True):
        close(actual, expected, tolerance=1e-5)


def test_gradients_beyond_the_device_budget_move_to_the_host_and_change_nothing(monkeypatch):
    monkeypatch.setattr(PoolGradients, "CHUNK", 3 * 7)
    g, sources, moments = pool_case(53, 7)
    near = stored(g, 20, 20, 13)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "cpu", lambda t: t.clone())  # on the CPU a move is not a copy: make it one
        far, part = stored(g, 20, 20, 13, device_bytes=0), stored(g, 20, 20, 13, device_bytes=g[:20].nbytes)
    shared = {True: [True] * 3, False: [False] * 3}
    assert [b.data_ptr() == a.data_ptr() for a, b in zip(near.blocks, far.blocks, strict=True)] == shared[False]
    assert [b.data_ptr() == a.data_ptr() for a, b in zip(near.blocks, part.blocks, strict=True)] == [True, False, False]
    features = features_of(near, sources, moments, 3)
    for other in (far, part):
        assert torch.equal(features_of(other, sources, moments, 3), features)
        assert all(map(torch.equal, other.sums(sources == 1, "cpu"), near.sums(sources == 1, "cpu")))


def test_rows_that_are_not_finite_count_for_nothing_and_stay_so():
    g, sources, moments = pool_case(53, 7)
    good = torch.ones(53, dtype=torch.bool)
    good[[0, 17, 52]] = False
    bad = g.clone()
    bad[0, 3], bad[17, 6], bad[52] = math.nan, math.inf, -math.inf
    gradients, clean = stored(bad, 53), stored(g[good], 50)
    features = features_of(gradients, sources, moments, 3)
    assert torch.equal(features[good], features_of(clean, sources[good], moments, 3))
    assert torch.equal(features.isfinite().all(1), good)
    for column in range(7):  # chosen as a coordinate or not
        spoilt = g.clone()
        spoilt[17, column] = math.nan
        assert not features_of(stored(spoilt, 53), sources, moments, 3)[17].isfinite().any()
    expected = clean.sums(sources[good] == 3, "cpu")
    for actual, sums in zip(gradients.sums(good & (sources == 3), "cpu"), expected, strict=True):
        close(actual, sums)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_derivative_that_is_not_finite_spoils_its_own_row_alone(value):
    derivatives, z, sources = normal(7, 2), normal(2, 5, 1), torch.zeros(7, dtype=torch.long)
    good = torch.arange(7) != 4
    features = features_of(PoolGradients(5, derivatives[good], z), sources[good], AdamMoments(), 3)
    derivatives[4, 1] = value
    spoilt = features_of(PoolGradients(5, derivatives, z), sources, AdamMoments(), 3)
    assert torch.equal(spoilt[good], features)
    assert torch.equal(spoilt.isfinite().all(1), good)


def test_two_ranks_choose_the_coordinates_and_the_history_of_one():
    g, sources, moments = pool_case(53, 23)
    one = stored(g, 53)
    whole = features_of(one, sources, moments, 5)
    shares = [torch.arange(0, 53, 2), torch.arange(1, 53, 2)]
    ranks, sums = [stored(g[rows], len(rows)) for rows in shares], []
    for gradients, rows in zip(ranks, shares, strict=True):  # first what each rank would send
        features_of(gradients, sources[rows], moments, 5, reduce=lambda t: sums.append(t) or t)
    for gradients, rows in zip(ranks, shares, strict=True):
        split = features_of(gradients, sources[rows], moments, 5, reduce=lambda t: sums[0] + sums[1])
        assert torch.equal(split, whole[rows])

    chosen = sources == 3
    parts = [gradients.sums(chosen[rows], "cpu") for gradients, rows in zip(ranks, shares, strict=True)]
    together, alone = AdamMoments(), AdamMoments()
    together.update_from_sums(*(a + b for a, b in zip(*parts, strict=True)), int(chosen.sum()))
    alone.update(g[chosen])
    close(together.m, alone.m)
    close(together.v, alone.v)


def test_a_rank_without_rows_still_takes_part():
    _, _, moments = pool_case(1, 7)
    nothing = torch.zeros(0, dtype=torch.long)
    for gradients in (PoolGradients(7), PoolGradients(7, torch.zeros(0, 2), normal(2, 7, 1))):
        seen = []
        features = features_of(gradients, nothing, moments, 3, reduce=lambda t, seen=seen: seen.append(t.shape) or t)
        assert features.shape == (0, 3) and seen == [(4, 7)]
        assert [s.tolist() for s in gradients.sums(nothing.bool(), "cpu")] == [[0.0] * 7] * 2


def test_equal_means_keep_the_lowest_coordinates():
    moments = AdamMoments((0.5, 0.75), eps=0.0)  # without history every feature is exactly the gradient's sign
    g = torch.tensor([[2.0, -4.0, 1.0, 8.0], [-1.0, -2.0, 4.0, -1.0]])
    assert features_of(stored(g, 2), torch.tensor([0, 0]), moments, 3).tolist() == [[-1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]]


# --------------------------------------------------------------------------------------------------------- the coreset


@pytest.mark.parametrize("chunk", [0, 1 << 25])  # source by source, or all at once
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize(("n", "keep"), [(7, ()), (53, (1, 4)), (123, (0,)), (53, (9,))])
def test_coresets_match_the_twin(monkeypatch, chunk, metric, n, keep):
    monkeypatch.setattr(PoolGradients, "CHUNK", chunk)
    features, sources = integers(n, 6), torch.randint(0, 5, (n,), generator=generator(n))
    sources[n // 2] = 7  # a source of one
    kept = int(torch.isin(sources, torch.tensor(keep, dtype=torch.long)).sum())
    for k in sorted({kept + 1, (kept + n) // 2, n - 1, n}):
        coreset = select_coreset(features, sources, k, keep, h=4, metric=metric)
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k, keep, 4, metric)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == expected
        assert len(set(coreset.index.tolist())) == len(coreset.weight) == k
        if k == n:
            assert coreset.weight.tolist() == [1] * n


@pytest.mark.parametrize("sizes", [(300,), (300, 2), (256, 1), (257, 130)])
def test_coresets_of_sources_large_and_small_match_the_twin(sizes):
    sources = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    sources = sources[torch.randperm(len(sources), generator=generator(len(sources)))]
    features = integers(len(sources), 3)
    for h in (2, 3):
        coreset = select_coreset(features, sources, 5, h=h)
        expected = naive.select_coreset(features.tolist(), sources.tolist(), 5, h=h)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == expected


@pytest.mark.parametrize("metric", METRICS)
def test_coresets_of_real_numbers_match_the_twin(metric):
    for sources in (torch.arange(53) % 3, (normal(53).square() * 3).long()):  # even sources; one large, many small
        features, keep = normal(53, 6), {1}
        k = int((sources == 1).sum()) + 9
        coreset = select_coreset(features, sources, k, keep, h=4, metric=metric)
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k, keep, 4, metric)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == expected


def test_a_pool_of_one():
    for keep in ((), {5}):
        coreset = select_coreset(torch.ones(1, 3), torch.tensor([5]), 1, keep)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == ([0], [1])


def test_weights_count_the_rows_that_a_medoid_stands_for():
    sources = torch.arange(53) % 3
    coreset = select_coreset(normal(53, 4), sources, 30, keep={2})
    for q in range(3):
        assert int(coreset.weight[sources[coreset.index] == q].sum()) == int((sources == q).sum())


def test_rows_that_are_not_finite_are_never_medoids():
    features, sources = integers(53, 4), torch.arange(53) % 3
    bad = torch.tensor([0, 1, 7, 30, 52])
    features[bad] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])[:, None]
    for k in (1, 20, 48, 53):
        coreset = select_coreset(features, sources, k)
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == expected
        assert not torch.isin(coreset.index, bad).any()
        assert len(coreset.index) == min(k, 48)


def test_a_source_without_usable_rows_leaves_its_share_to_the_others():
    features, sources = normal(12, 4), torch.arange(12) % 3
    features[sources == 1] = math.nan
    coreset = select_coreset(features, sources, 6)
    assert sorted(sources[coreset.index].tolist()) == [0, 0, 0, 2, 2, 2]
    coreset = select_coreset(torch.full((12, 4), math.nan), sources, 6, keep={2})
    assert coreset.index.tolist() == [2, 5, 8, 11]


def test_kept_rows_come_first_whole_and_unread():
    features, sources = normal(12, 4), torch.arange(12) % 3
    plain = select_coreset(features, sources, 8, keep={1})
    features[sources == 1] = math.nan
    coreset = select_coreset(features, sources, 8, keep={1})
    assert all(map(torch.equal, coreset, plain))
    assert coreset.index[:4].tolist() == [1, 4, 7, 10]
    assert coreset.weight[:4].tolist() == [1, 1, 1, 1]


def test_kept_rows_beyond_the_coreset_are_drawn_uniformly_from_the_generator():
    features, sources = normal(12, 4), torch.arange(12) % 2
    drawn = torch.zeros(12)
    for seed in range(300):
        coreset = select_coreset(features, sources, 4, keep={1}, generator=generator(seed))
        again = select_coreset(features, sources, 4, keep={1}, generator=generator(seed))
        assert torch.equal(coreset.index, again.index)
        assert coreset.index.tolist() == sorted(set(coreset.index.tolist())) and len(coreset.index) == 4
        assert coreset.weight.tolist() == [1] * 4
        drawn[coreset.index] += 1
    assert drawn[sources == 0].tolist() == [0] * 6
    assert (drawn[sources == 1] - 200).abs().max() < 40  # 300 draws of 4 in 6: 200 +- 8, five deviations
    exact = select_coreset(features, sources, 6, keep={1})
    assert exact.index.tolist() == [1, 3, 5, 7, 9, 11]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    select_coreset(normal(12, 4), torch.arange(12) % 2, 4, keep={1}, generator=generator(1))
    select_coreset(normal(12, 4), torch.arange(12) % 2, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_a_coreset_size_outside_the_pool_is_refused(k):
    with pytest.raises(ValueError, match=rf"k = {k} of a pool of 5: k must lie in 1\.\.5"):
        select_coreset(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), k)


@pytest.mark.skipif("COLM_GOLDEN" not in os.environ, reason="COLM_GOLDEN names no file of official outputs")
def test_official_outputs():
    """Budgets and objective as published; the same medoids and cluster sizes wherever no gain ties."""
    compared = tied = 0
    for case in json.loads(Path(os.environ["COLM_GOLDEN"]).read_text())["cases"]:
        features, sources = torch.tensor(case["features"]), torch.tensor(case["sources"])
        metric = {"euclidean": "l2"}.get(case["metric"], case["metric"])
        coreset, objective = select_coreset(features, sources, case["budget"], h=10**6, metric=metric), 0.0
        sizes = dict(zip(coreset.index.tolist(), coreset.weight.tolist(), strict=True))
        for q in sources.unique().tolist():
            rows = (sources == q).nonzero()[:, 0].tolist()
            mine, official = ([i for i in rows if i in picks] for picks in (sizes, case["selected"]))
            assert len(mine) == case["per_source_budget"][str(q)]
            similarity = naive.pairwise_similarity(features[rows].tolist(), metric)
            objective += naive.objective(similarity, [rows.index(i) for i in mine])
            if has_ties(similarity, len(mine), naive.row_norm(features[rows].tolist(), metric)):
                tied += 1
                continue
            assert mine == official
            assert [sizes[i] for i in mine] == [case["cluster_sizes"][str(i)] for i in mine]
            compared += 1
        assert objective == pytest.approx(case["objective"], rel=1e-5)
    assert compared > 2 * tied


def has_ties(similarity: list, k: int, scale: float | None) -> bool:
    """Does the greedy pick ever have a rival with the same gain?"""
    best, picks = [0.0] * len(similarity), naive.facility_location(similarity, k, scale)[0]
    for i, pick in enumerate(picks):
        gains = {c: naive.facility_gain(similarity, best, c) for c in range(len(similarity)) if c not in picks[:i]}
        if any(c != pick and abs(gains[pick] - gain) <= naive.tie(similarity, scale) for c, gain in gains.items()):
            return True
        best = [max(b, row[pick]) for b, row in zip(best, similarity, strict=True)]
    return False


# ---------------------------------------------------------------------------------------------------- losses and labels


@pytest.mark.parametrize("chunk", [1, 5, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7, 53])
def test_token_losses_and_their_gradients_match_pytorch(monkeypatch, rows, chunk):
    monkeypatch.setattr(TokenCrossEntropy, "chunk", chunk)
    targets = torch.randint(0, 97, (rows,), generator=generator(rows))
    weights = normal(rows, seed=1)
    logits, reference = ((10 * normal(rows, 97)).requires_grad_() for _ in range(2))
    losses = TokenCrossEntropy.apply(logits, targets)
    expected = F.cross_entropy(reference, targets, reduction="none")
    close(losses, expected)
    close(losses, [naive.cross_entropy(x, t) for x, t in zip(logits.tolist(), targets.tolist(), strict=True)])
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    close(logits.grad, reference.grad)


def test_token_losses_match_pytorch_in_float64_and_go_back_once(monkeypatch):
    monkeypatch.setattr(TokenCrossEntropy, "chunk", 3)
    logits = normal(7, 11, dtype=torch.float64).requires_grad_()
    targets, weights = torch.randint(0, 11, (7,), generator=generator(0)), normal(7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((F.cross_entropy(logits, targets, reduction="none") * weights).sum(), logits)
    loss = (TokenCrossEntropy.apply(logits * 1, targets) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it lies where the logits lay
        loss.backward()


def test_half_precision_logits_give_float32_losses():
    logits, targets = (10 * normal(53, 97)).bfloat16().requires_grad_(), torch.arange(53)
    reference = logits.detach().clone().requires_grad_()
    losses, expected = (
        TokenCrossEntropy.apply(logits, targets),
        F.cross_entropy(reference.float(), targets, reduction="none"),
    )
    assert losses.dtype == torch.float32 and expected.dtype == torch.float32
    close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    exact = torch.autograd.grad(
        F.cross_entropy(x := logits.detach().double().requires_grad_(), targets, reduction="sum"), x
    )[0]
    own, baseline = ((g.double() - exact).norm() for g in (logits.grad, reference.grad))
    assert own <= 1.01 * baseline  # no worse than rounding PyTorch's float32 gradient to bfloat16


def test_enormous_logits_do_not_overflow():
    logits = torch.tensor([[1e30, 0.0, -math.inf], [3e4, 3e4, 3e4]], requires_grad=True)
    losses = TokenCrossEntropy.apply(logits, torch.tensor([0, 2]))
    close(losses, [0.0, math.log(3)], tolerance=1e-3)
    losses.sum().backward()
    assert logits.grad.isfinite().all()


EXAMPLES = [(9, 3), (5, 1), (14, 6), (7, 0), (4, 4), (3, 2), (6, 9)]  # (tokens, prompt); two have nothing to learn


def examples(sizes=EXAMPLES, vocabulary: int = 23) -> list[tuple[Tensor, int]]:
    g = generator(3)
    return [(torch.randint(1, vocabulary, (n,), generator=g), prompt) for n, prompt in sizes]


@pytest.mark.parametrize("sizes", [EXAMPLES, EXAMPLES[3:4], [(1, 0)], [(1, 0), (2, 0)]])
def test_collate_supervises_completion_tokens_alone(sizes):
    rows = examples(sizes)
    batch = collate(rows, pad_id=22)
    width = max(n for n, _ in sizes)
    positions, targets, owners = [], [], []
    for b, (ids, prompt) in enumerate(rows):
        for t in range(len(ids)):
            if t >= prompt and t > 0:  # the first token of a row has nothing before it that could predict it
                positions.append(b * width + t - 1)
                targets.append(int(ids[t]))
                owners.append(b)
        assert batch.input_ids[b].tolist() == ids.tolist() + [22] * (width - len(ids))
    assert batch.positions.tolist() == positions
    assert batch.targets.tolist() == targets
    assert batch.rows.tolist() == owners
    assert batch.counts.tolist() == [owners.count(b) for b in range(len(rows))]
    assert isinstance(batch.to("cpu"), MicroBatch)
    assert all(t.dtype == torch.long for t in batch[:5])


def test_collate_widens_small_integer_ids():
    ids = torch.tensor([3, 4, 5], dtype=torch.int32)
    assert collate([(ids, 1)]).input_ids.dtype == torch.long


@pytest.mark.parametrize(("multiple", "slots"), [(1, 1), (10, 4), (64, 32), (48, 3)])
def test_packed_examples_are_the_same_examples_end_to_end(multiple, slots):
    rows = examples()
    batch, padded, total = pack(rows, 14, multiple, slots), collate(rows), sum(n for n, _ in EXAMPLES)
    size = batch.input_ids.shape[1]
    assert batch.input_ids.shape[0] == 1 and size % multiple == 0 and total <= size < total + multiple
    assert batch.input_ids[0, :total].tolist() == [int(t) for ids, _ in rows for t in ids]
    assert len(batch.offsets) % slots == 0 and batch.offsets.dtype == torch.int32
    starts = [sum(n for n, _ in EXAMPLES[:b]) for b in range(len(rows) + 1)]
    assert batch.offsets.tolist() == starts + [size] * (len(batch.offsets) - len(starts))
    assert len(batch.offsets) > len(starts)  # the filler, empty or not, ends somewhere
    assert batch.position_ids[0, :total].tolist() == [t for n, _ in EXAMPLES for t in range(n)]
    assert int(batch.position_ids.max()) < 14
    for field in ("targets", "rows", "counts"):
        assert torch.equal(getattr(batch, field), getattr(padded, field))
    within = padded.positions - padded.rows * 14
    assert batch.positions.tolist() == [
        starts[b] + t for b, t in zip(batch.rows.tolist(), within.tolist(), strict=True)
    ]


def test_unpacking_lets_no_neighbour_through():
    x = torch.tensor([1.0, torch.nan, 3.0])[:, None]
    assert unpack(x, torch.tensor([0, 1, 2, 3]), 2)[[0, 2]].flatten().tolist() == [1, 0, 3, 0]


def test_unpacking_pads_with_zeros():
    x, offsets = normal(9, 2), torch.tensor([0, 4, 5, 9])
    rows = unpack(x, offsets, 5)
    assert rows.shape == (3, 5, 2)
    for i, (start, end) in enumerate([(0, 4), (4, 5), (5, 9)]):
        assert torch.equal(rows[i, : end - start], x[start:end])
        assert not rows[i, end - start :].any()
    spoilt = x.clone()
    spoilt[4] = 7.0
    assert torch.equal(unpack(spoilt, offsets, 5)[[0, 2]], rows[[0, 2]])


class Bigram(nn.Module):
    """The smallest causal model with a head: an embedding, then the head; `copies` perturbed copies like SPSA's."""

    def __init__(self, copies: int = 1, calls_head: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(23, 6), nn.Linear(6, 23)
        self.copies, self.calls_head, self.seen = copies, calls_head, []

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=True):
        hidden = torch.cat([self.embedding(input_ids) * (c + 1) for c in range(self.copies)])  # [C * B, T, d]
        if not self.calls_head:
            return SimpleNamespace(logits=F.linear(hidden, self.head.weight, self.head.bias))
        logits = self.head(hidden)
        self.seen.append(tuple(logits.shape))
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("copies", [1, 2, 6])
def test_example_losses_are_means_over_completion_tokens(copies):
    model, rows = Bigram(copies), [(ids, p) for ids, p in examples() if len(ids) > max(p, 1)]
    batch = collate(rows)
    losses = example_losses(model, LabelledLogits(model), batch)
    assert losses.shape == (copies, len(rows))
    assert model.seen == [(copies, len(batch.targets), 23)]  # logits exist only where labels do
    for c in range(copies):
        for b, (ids, prompt) in enumerate(rows):
            logits = model.head(model.embedding(ids) * (c + 1)).tolist()
            tokens = [naive.cross_entropy(logits[t - 1], int(ids[t])) for t in range(max(prompt, 1), len(ids))]
            close(losses[c, b], sum(tokens) / len(tokens))


def test_the_logits_hook_sleeps_outside_example_losses():
    model = Bigram()
    hook, batch = LabelledLogits(model), collate(examples())
    example_losses(model, hook, batch)
    assert model(batch.input_ids).logits.shape == (7, 14, 23)
    hook.handle.remove()
    assert not model.head._forward_pre_hooks


def test_a_model_that_never_calls_its_head_is_refused():
    model = Bigram(calls_head=False)
    with pytest.raises(RuntimeError, match="did not call its output embedding.*head module"):
        example_losses(model, LabelledLogits(model), collate(examples()))


def test_the_core_stands_alone():
    """People copy this one file: it imports the standard library and torch."""
    names = {
        line.split()[1].split(".")[0]
        for line in Path(colm_core.__file__).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert names == {"__future__", "math", "collections", "contextlib", "typing", "torch"}
    assert Coreset._fields == ("index", "weight")


def test_the_step_in_the_docstring_runs():
    from models import tiny_model

    lines = colm_core.__doc__.splitlines()
    step = "\n".join(line[4:] for line in lines if line.startswith("    "))
    model, g = tiny_model("llama"), torch.Generator().manual_seed(0)
    pool = [(torch.randint(0, 97, (6 + i % 5,), generator=g), 2) for i in range(80)]
    names = vars(colm_core) | {"model": model, "pool": pool, "device": "cpu", "counts": {0: 900, 1: 900, 2: 10}}
    names["optimizer"] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    names["sources"] = torch.tensor([0, 1] * 38 + [2] * 4)
    exec(step, names)
    assert len(names["picked"]) == 64 and names["picked"][:4] == [76, 77, 78, 79]
    assert names["moments"].updates == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
