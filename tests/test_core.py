"""colm_core.py against its slow twins in naive.py, on sizes and values that are easy to get wrong."""

import ast
import io
import json
import math
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colm_core
from colm_batches import (
    LabelledLogits,
    LossKernels,
    MicroBatch,
    TokenCrossEntropy,
    collate,
    micro_batch_losses,
    pack,
    unpack,
)
from colm_core import (
    AdamMoments,
    Coreset,
    allocate_budget,
    cosines,
    example_losses,
    facility_location,
    fresh_first,
    pairwise_similarity,
    select_coreset,
    small_sources,
    sparsify,
    spsa_gradients,
    tf_idf,
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
        ({"a": 8, "b": 0, "c": 5}, {"c"}),  # the mean of two
        ({"a": 8, "b": 0, "c": 8}, set()),
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
            order = torch.randperm(sources, generator=generator(budget)).tolist()  # who goes first where shares tie
            shares = allocate_budget(counts, budget, generator(budget))
            assert shares.tolist() == naive.allocate_budget(counts.tolist(), budget, order), (counts, budget)
            assert int(shares.sum()) == min(budget, int(counts.sum()))
            assert bool((shares <= counts).all())


def test_a_remainder_goes_to_the_smallest_budgets():
    def shares(counts, budget):  # in all the ways that ties can fall
        counts = torch.tensor(counts, dtype=torch.long)
        return {tuple(allocate_budget(counts, budget, generator(seed)).tolist()) for seed in range(40)}

    assert shares([10, 3, 3, 10], 7) == {(3, 1, 1, 2), (2, 1, 1, 3)}  # from floors 2, 0, 0, 2
    assert shares([6, 2, 6], 5) == {(2, 1, 2)}
    assert shares([4, 4, 4], 4) == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert shares([0, 1, 9], 1) == {(0, 1, 0), (0, 0, 1)}  # nobody is there to be picked in the first
    assert shares([], 3) == {()}


def test_equal_sources_have_equal_chances_wherever_they_stand():
    """280 sources of one row, a pool of 28 and a coreset of 14: every tenth of the file is trained on alike."""
    trained = torch.zeros(280)
    for step in range(400):
        sources = torch.randperm(280, generator=generator(step))[:28]
        coreset = select_coreset(normal(28, 3, seed=step), sources, 14, generator=generator(step, 1))
        trained[sources[coreset.index]] += 1
    tenths = trained.view(10, 28).sum(1)  # 5600 rows in ten parts: 560 +- 17 if they were drawn freely
    assert int(tenths.sum()) == 5600 and (tenths - 560).abs().max() < 85
    counts = torch.full((20,), 6)
    total = sum(allocate_budget(counts, 64, generator(seed)) for seed in range(500))  # 3.2 each
    assert (total - 1600).abs().max() < 50  # 0.4 x sqrt(500) = 9 is one deviation


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


@pytest.mark.parametrize("n", [128, 150])
def test_no_row_is_picked_twice_however_large_the_features(n):
    """Without history features are +-1: what gains may differ by then exceeds what a picked row adds again, nothing."""
    features = sparsify(AdamMoments().normalize(normal(n, 1) * normal(1, 4096)), 2560)
    coreset = select_coreset(features, torch.zeros(n), n // 2)
    assert len(set(coreset.index.tolist())) == n // 2
    large = torch.ones(8, 4) * 1e5
    expected = naive.select_coreset(large.tolist(), [0] * 8, 3)
    assert select_coreset(large, torch.zeros(8, dtype=torch.long), 3).index.tolist() == expected[0] == [0, 1, 2]


def test_rows_that_differ_by_rounding_alone_go_to_the_lowest():
    features = torch.ones(9, 50) + 1e-7 * normal(9, 50)
    coreset = select_coreset(features, torch.zeros(9), 4)
    assert coreset.index.tolist() == [0, 1, 2, 3] and coreset.weight.tolist() == [6, 1, 1, 1]


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(2, slice(None)), (slice(None), 2), (1, 3)])
def test_similarities_that_are_not_finite_are_refused(value, place):
    """No gain would be the largest, and one row would be picked k times."""
    similarity = pairwise_similarity(normal(5, 4))
    similarity[place] = value
    with pytest.raises(ValueError, match="a similarity is not finite"):
        facility_location(similarity, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_medoids_of_half_precision_are_not_chosen_by_its_rounding(dtype):
    for seed in range(5):
        x = normal(123, 13, seed=seed).to(dtype)
        coreset = select_coreset(x, torch.zeros(123), 12)
        assert torch.equal(coreset.index, select_coreset(x.double(), torch.zeros(123), 12).index)
        similarity = pairwise_similarity(x).to(dtype)
        index, weight = facility_location(similarity, 12)
        assert (index.tolist(), weight.tolist()) == naive.facility_location(similarity.tolist(), 12)


@pytest.mark.parametrize(("n", "dims"), [(1, 7), (7, 53), (53, 123), (123, 7)])
def test_sparsify_matches_the_twin(n, dims):
    for x in (integers(n, dims, largest=1), normal(n, dims)):  # the first ties almost everywhere
        for h in (1, dims // 2, dims - 1, dims, dims + 5):
            assert sparsify(x, h).tolist() == naive.sparsify(x.tolist(), h)


def test_sparsify_looks_at_magnitude_and_keeps_everything_when_h_is_large():
    x = torch.tensor([[1.0, -5.0, 2.0, -2.0], [1.0, -5.0, 2.0, -2.0]])
    assert sparsify(x, 3).tolist() == [[-5.0, 2.0, -2.0]] * 2
    assert sparsify(x, 4) is x
    assert sparsify(torch.tensor([[0.0, 3.0, -3.0]]), 2).tolist() == [[3.0, -3.0]]


def test_equal_means_keep_the_lowest_coordinates():
    moments = AdamMoments((0.5, 0.75), eps=0.0)  # without history every feature is exactly the gradient's sign
    g = torch.tensor([[2.0, -4.0, 1.0, 8.0], [-1.0, -2.0, 4.0, -1.0]])
    assert sparsify(moments.normalize(g), 3).tolist() == [[-1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]]


def test_rows_that_are_not_finite_count_for_nothing_and_stay_so():
    x, good = normal(53, 7), torch.ones(53, dtype=torch.bool)
    good[[0, 17, 52]] = False
    for column in range(7):  # chosen as a coordinate or not
        spoilt = x.clone()
        spoilt[0, column], spoilt[17, 6 - column], spoilt[52] = math.nan, math.inf, -math.inf
        features = sparsify(spoilt, 3)
        assert torch.equal(features[good], sparsify(x[good], 3))
        assert not features[~good].isfinite().any()


def test_two_ranks_keep_the_coordinates_of_one():
    x = normal(53, 23)
    for first in (0, 1, 20):  # also a rank without rows
        parts = (x[:first], x[first:])
        sent = [x[:first].sum(0), x[first:].sum(0)]
        together = [sparsify(part, 5, lambda _, sent=sent: sent[0] + sent[1]) for part in parts]
        assert torch.equal(torch.cat(together), sparsify(x, 5))


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


def test_the_history_of_two_ranks_is_that_of_one():
    one, ranks = AdamMoments(), [AdamMoments(), AdamMoments()]
    for seed, first in enumerate((2, 0, 7)):
        g = normal(7, 5, seed=seed)
        one.update(g)
        sent = [[], []]
        for part, out in zip((g[:first], g[first:]), sent, strict=True):
            AdamMoments().update(part, lambda tensor, out=out: out.append(tensor) or tensor, count=7)
        for moments, part in zip(ranks, (g[:first], g[first:]), strict=True):
            both = iter([a + b for a, b in zip(*sent, strict=True)])
            moments.update(part, lambda tensor, both=both: next(both), count=7)
    for moments in ranks:
        moments.update(torch.zeros(0, 5), count=0)
        close(moments.m, one.m)
        close(moments.v, one.v)
        assert moments.updates == one.updates == 3


def test_a_copy_keeps_the_history_of_before():
    moments = AdamMoments()
    moments.update(normal(7, 5))
    later = copy(moments)
    m = moments.m.clone()
    later.update(normal(7, 5, seed=1))
    assert torch.equal(moments.m, m) and moments.updates == 1 and later.updates == 2


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


# ------------------------------------------------------------------------------------------------ gradients, features


@pytest.mark.parametrize("directions", [1, 3])
def test_spsa_gradients_match_the_twin(directions):
    derivatives, z = normal(53, directions), normal(directions, 3, 4)
    expected = [naive.spsa_gradient(d, z.flatten(1).tolist()) for d in derivatives.tolist()]
    close(spsa_gradients(derivatives, z), expected)


@pytest.mark.parametrize(("n", "dims", "h"), [(1, 7, 3), (7, 7, 7), (53, 23, 5), (123, 7, 50)])
def test_normalised_and_sparsified_features_match_the_twin(n, dims, h):
    g, moments, twin = normal(n, dims), AdamMoments((0.8, 0.95)), naive.AdamMoments(dims, (0.8, 0.95))
    sources = torch.randint(0, 3, (n,), generator=generator(n))
    moments.update(normal(5, dims, seed=8))
    twin.update(normal(5, dims, seed=8).tolist())
    features = torch.zeros(n, min(h, dims))
    for source in sources.unique():
        features[sources == source] = sparsify(moments.normalize(g[sources == source]), h)
    close(features, naive.sparse_features(g.tolist(), sources.tolist(), twin, h), tolerance=2e-5)


# --------------------------------------------------------------------------------------------------------- the coreset


def drawn(sources: int) -> list[int]:
    """The order in which budgets that tie are served, for `generator=generator(9)`."""
    return torch.randperm(sources, generator=generator(9)).tolist()


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize(("n", "keep"), [(7, ()), (53, (1, 4)), (123, (0,)), (53, (9,))])
def test_coresets_match_the_twin(metric, n, keep):
    features, sources = integers(n, 6), torch.randint(0, 5, (n,), generator=generator(n))
    sources[n // 2] = 7  # a source of one
    kept = int(torch.isin(sources, torch.tensor(keep, dtype=torch.long)).sum())
    for k in sorted({kept + 1, (kept + n) // 2, n - 1, n}):
        coreset = select_coreset(features, sources, k, keep, h=4, metric=metric, generator=generator(9))
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k, keep, 4, metric, drawn)
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
        coreset = select_coreset(features, sources, 5, h=h, generator=generator(9))
        expected = naive.select_coreset(features.tolist(), sources.tolist(), 5, h=h, order=drawn)
        assert (coreset.index.tolist(), coreset.weight.tolist()) == expected


@pytest.mark.parametrize("metric", METRICS)
def test_coresets_of_real_numbers_match_the_twin(metric):
    for sources in (torch.arange(53) % 3, (normal(53).square() * 3).long()):  # even sources; one large, many small
        features, keep = normal(53, 6), {1}
        k = int((sources == 1).sum()) + 9
        coreset = select_coreset(features, sources, k, keep, h=4, metric=metric, generator=generator(9))
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k, keep, 4, metric, drawn)
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
        coreset = select_coreset(features, sources, k, generator=generator(9))
        expected = naive.select_coreset(features.tolist(), sources.tolist(), k, order=drawn)
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
    plain = select_coreset(features, sources, 8, keep={1}, generator=generator(9))
    features[sources == 1] = math.nan
    coreset = select_coreset(features, sources, 8, keep={1}, generator=generator(9))
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
    select_coreset(normal(12, 4), torch.arange(12) % 2, 4, generator=generator(1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_a_coreset_size_outside_the_pool_is_refused(k):
    with pytest.raises(ValueError, match=rf"k = {k} of a pool of 5: k must lie in 1\.\.5"):
        select_coreset(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), k)


# ------------------------------------------------------------------------------ a random draw that passes over copies


def token_rows(rows: int, seed: int = 0, vocabulary: int = 30) -> list[list[int]]:
    """Short rows of tokens, each with token 7; the first is one token long and the last a copy of the one before."""
    g = generator(seed, rows)
    made = [[7]]
    while len(made) < rows:
        length = int(torch.randint(1, 9, (), generator=g))
        made.append([7, *torch.randint(0, vocabulary, (length,), generator=g).tolist()])
    if rows > 2:
        made[-1] = made[-2][::-1]  # a bag has no order
    return made


def bags_of(rows: list[list[int]]):
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return tf_idf(torch.tensor(sum(rows, []), dtype=torch.int32), offsets)


@pytest.mark.parametrize("rows", [1, 2, 7, 53])
def test_cosines_of_bags_match_the_twin(rows):
    made = token_rows(rows)
    bags, twin = bags_of(made), naive.tf_idf(made)
    some, others = torch.arange(0, rows, 2), torch.randperm(rows, generator=generator(rows))
    found = cosines(bags, some, others)
    assert found.shape == (len(some), rows) and found.dtype == torch.float32
    expected = [[naive.cosine(twin[a], twin[b]) for b in others.tolist()] for a in some.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    assert not found[some == 0].any()  # its only token is in every row, and weighs nothing
    if rows > 2:
        assert cosines(bags, torch.tensor([rows - 1]), torch.tensor([rows - 2])).item() == pytest.approx(1)


def test_bags_of_many_rows_are_those_of_the_twin():
    """They are made 1,024 at a time: rows on both sides of an edge, and the last ones."""
    made = token_rows(2500)
    bags = bags_of(made)
    having = [sum(token in set(row) for row in made) for token in range(30)]
    for row in (0, 1, 1023, 1024, 2047, 2048, 2499):
        tokens, weights, sizes = bags.of(torch.tensor([row]))
        assert tokens.tolist() == sorted(set(made[row])) and sizes.tolist() == [len(tokens)]
        expected = torch.tensor([made[row].count(token) * math.log(2500 / having[token]) for token in tokens.tolist()])
        close(weights, expected / expected.norm().clamp_min(1e-9))
    assert bags.offsets[-1] == len(bags.tokens) == sum(len(set(row)) for row in made)


@pytest.mark.parametrize(
    ("n", "sources", "density"), [(1, 1, 0.0), (7, 2, 0.3), (53, 4, 0.0), (53, 4, 0.02), (53, 4, 0.2), (123, 9, 1)]
)
def test_fresh_rows_match_the_twin(n, sources, density):
    for k in {0, 1, n // 2, n}:
        g = generator(n, k)
        order, source = torch.randperm(n, generator=g), 3 * torch.randint(-1, sources, (n,), generator=g)
        alike = torch.rand(n, n, generator=g) < density
        alike |= alike.T.clone()
        seen = torch.rand(n, generator=g) < 3 * density
        before = seen.clone()
        picked = fresh_first(order, source, k, seen, alike).tolist()
        lists = [x.tolist() for x in (order, source, seen, alike)]
        expected = naive.fresh_first(*lists[:2], k, *lists[2:])
        assert sorted(picked) == sorted(expected) and len(picked) == k
        assert picked == [i for i in order.tolist() if i in picked]  # in the order given
        assert sorted(source[picked].tolist()) == sorted(source[order[:k]].tolist())  # the mixture of a plain draw
        assert torch.equal(seen, before)
        if density == 0:
            assert picked == order[:k].tolist()


def test_seen_rows_come_last_and_only_for_others_of_their_source():
    order, source = torch.arange(6), torch.tensor([0, 0, 1, 0, 1, 0])
    no, alike = torch.zeros(6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    assert fresh_first(order, source, 3, no, alike).tolist() == [0, 1, 2]
    alike[0, 1] = alike[1, 0] = True  # the second gives way to the next of its source, not to the nearest row
    assert fresh_first(order, source, 3, no, alike).tolist() == [0, 2, 3]
    seen = torch.tensor([True, False, True, False, True, False])
    assert fresh_first(order, source, 3, seen, alike).tolist() == [1, 2, 3]  # all of source 1 are seen: the first
    assert fresh_first(order, source, 6, seen, alike).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("k", [-1, 4])
def test_more_fresh_rows_than_the_pool_has_are_refused(k):
    none = torch.zeros(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"k = {k} of a pool of 3: k must lie in 0\.\.3"):
        fresh_first(torch.arange(3), torch.zeros(3), k, none[0], none)


def test_official_outputs():
    """Budgets and objective as published; the same medoids and cluster sizes wherever no gain ties."""
    compared = 0
    for case in json.loads((Path(__file__).parent / "official_selection.json").read_text())["cases"]:
        features, sources = torch.tensor(case["features"]), torch.tensor(case["sources"])
        objective = 0.0
        for q, budget in case["per_source_budget"].items():
            rows = (sources == int(q)).nonzero()[:, 0].tolist()
            similarity = pairwise_similarity(features[rows], case["metric"])
            index, sizes = facility_location(similarity, budget)
            objective += naive.objective(similarity.tolist(), index.tolist())
            if not has_ties(similarity.tolist(), budget, None):
                picks = dict(zip([rows[i] for i in index], sizes.tolist(), strict=True))
                assert picks == {i: case["cluster_sizes"][str(i)] for i in case["selected"] if i in rows}
                compared += budget
        assert objective == pytest.approx(case["objective"], rel=1e-5)
        coreset = select_coreset(features, sources, case["budget"], h=10**6, metric=case["metric"])
        official = sorted(case["per_source_budget"].values())
        budgets = torch.bincount(sources[coreset.index], minlength=len(official))
        assert sorted(budgets.tolist()) == official  # ours draws who comes first where budgets tie
    assert compared >= 20


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


@pytest.mark.parametrize("rows_at_once", [1, 5, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7, 53])
def test_token_losses_and_their_gradients_match_pytorch(rows, rows_at_once):
    targets = torch.randint(0, 97, (rows,), generator=generator(rows))
    weights = normal(rows, seed=1)
    logits, reference = ((10 * normal(rows, 97)).requires_grad_() for _ in range(2))
    losses = TokenCrossEntropy.apply(logits, targets, LossKernels(rows_at_once))
    expected = F.cross_entropy(reference, targets, reduction="none")
    close(losses, expected)
    close(losses, [naive.cross_entropy(x, t) for x, t in zip(logits.tolist(), targets.tolist(), strict=True)])
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    close(logits.grad, reference.grad)


def test_token_losses_match_pytorch_in_float64_and_go_back_once():
    logits = normal(7, 11, dtype=torch.float64).requires_grad_()
    targets, weights = torch.randint(0, 11, (7,), generator=generator(0)), normal(7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((F.cross_entropy(logits, targets, reduction="none") * weights).sum(), logits)
    loss = (TokenCrossEntropy.apply(logits * 1, targets, LossKernels(3)) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it lies where the logits lay
        loss.backward()


def test_half_precision_logits_give_float32_losses():
    logits, targets = (10 * normal(53, 97)).bfloat16().requires_grad_(), torch.arange(53)
    reference = logits.detach().clone().requires_grad_()
    losses, expected = (
        TokenCrossEntropy.apply(logits, targets, LossKernels()),
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
    losses = TokenCrossEntropy.apply(logits, torch.tensor([0, 2]), LossKernels())
    close(losses, [0.0, math.log(3)], tolerance=1e-3)
    losses.sum().backward()
    assert logits.grad.isfinite().all()


EXAMPLES = [(9, 3), (5, 1), (14, 6), (7, 0), (4, 4), (3, 2), (6, 9)]  # (tokens, prompt); two have nothing to learn


def examples(sizes=EXAMPLES, vocabulary: int = 23) -> list[tuple[Tensor, Tensor]]:
    """(ids, supervised) pairs: all but the prompt's tokens carry loss, and but a first token that nothing predicts."""
    g = generator(3)
    return [(torch.randint(1, vocabulary, (n,), generator=g), torch.arange(n) >= max(prompt, 1)) for n, prompt in sizes]


@pytest.mark.parametrize("sizes", [EXAMPLES, EXAMPLES[3:4], [(1, 0)], [(1, 0), (2, 0)]])
def test_collate_supervises_completion_tokens_alone(sizes):
    rows = examples(sizes)
    batch = collate(rows, pad_id=22)
    width = max(n for n, _ in sizes)
    positions, targets, owners = [], [], []
    for b, (ids, supervised) in enumerate(rows):
        for t in range(len(ids)):
            if supervised[t]:
                positions.append(b * width + t - 1)
                targets.append(int(ids[t]))
                owners.append(b)
        assert batch.input_ids[b].tolist() == ids.tolist() + [22] * (width - len(ids))
    assert batch.positions.tolist() == positions
    assert batch.targets.tolist() == targets
    assert batch.owner.tolist() == owners
    assert batch.counts.tolist() == [owners.count(b) for b in range(len(rows))]
    assert isinstance(batch.to("cpu"), MicroBatch)
    assert all(t.dtype == torch.long for t in batch[:5])


def test_collate_widens_small_integer_ids():
    ids = torch.tensor([3, 4, 5], dtype=torch.int32)
    assert collate([(ids, torch.tensor([False, True, True]))]).input_ids.dtype == torch.long


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
    for field in ("targets", "owner", "counts"):
        assert torch.equal(getattr(batch, field), getattr(padded, field))
    within = padded.positions - padded.owner * 14
    assert batch.positions.tolist() == [
        starts[b] + t for b, t in zip(batch.owner.tolist(), within.tolist(), strict=True)
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
def test_example_losses_are_means_over_supervised_tokens(copies):
    model, rows = Bigram(copies), [(ids, mask) for ids, mask in examples() if mask.any()]
    rows[2][1][7:9] = False  # a gap, as between the turns of a chat
    batch = collate(rows)
    losses = micro_batch_losses(model, LabelledLogits(model), batch)
    assert losses.shape == (copies, len(rows))
    assert model.seen == [(copies, len(batch.targets), 23)]  # logits exist only where labels do
    for c in range(copies):
        for b, (ids, mask) in enumerate(rows):
            logits = model.head(model.embedding(ids) * (c + 1)).tolist()
            tokens = [naive.cross_entropy(logits[t - 1], int(ids[t])) for t in range(1, len(ids)) if mask[t]]
            close(losses[c, b], sum(tokens) / len(tokens))
    plain = {"input_ids": batch.input_ids, "labels": torch.full_like(batch.input_ids, -100)}  # the form to copy
    for b, (ids, mask) in enumerate(rows):
        plain["labels"][b, : len(ids)][mask] = ids[mask]
    close(example_losses(model, plain), losses)


def test_an_example_without_labels_has_loss_0_and_no_gradient():
    """As rows have whose answer was cut away: their mean over nothing would make the whole coreset's loss NaN."""
    model = Bigram()
    ids = torch.randint(0, 23, (3, 8), generator=generator(0))
    labels = ids.clone()
    labels[1] = -100
    losses = example_losses(model, {"input_ids": ids, "labels": labels})[0]
    alone = example_losses(model, {"input_ids": ids[[0, 2]], "labels": ids[[0, 2]]})[0]
    close(losses, [alone[0], 0.0, alone[1]])
    without, within = (torch.autograd.grad(x.sum(), [*model.parameters()]) for x in (alone, losses))
    for a, b in zip(without, within, strict=True):
        close(b, a)


def test_labelled_logits_leave_other_forwards_alone():
    model = Bigram()
    labelled_logits, batch = LabelledLogits(model), collate(examples())
    micro_batch_losses(model, labelled_logits, batch)
    assert model(batch.input_ids).logits.shape == (7, 14, 23)
    labelled_logits.handle.remove()
    assert not model.head._forward_pre_hooks


def test_a_model_that_never_calls_its_head_is_refused():
    model = Bigram(calls_head=False)
    with pytest.raises(RuntimeError, match="did not call its output embedding.*head module"):
        micro_batch_losses(model, LabelledLogits(model), collate(examples()))


def test_the_core_stands_alone():
    """People copy this one file: wherever it imports, it is from the standard library or torch."""
    names = set()
    for node in ast.walk(ast.parse(Path(colm_core.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch"}
    assert Coreset._fields == ("index", "weight")


def step_of_the_docstring() -> str:
    lines = colm_core.__doc__.splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def step_of_the_readme() -> str:
    """Its diff after the change, with imports before it and a loader of one batch."""
    readme = (Path(colm_core.__file__).parent / "README.md").read_text()
    diff = readme.split("```diff\n")[1].split("```")[0].splitlines()
    lines = [line[1:] for line in diff if not line.startswith("-")]
    return "\n".join(["rows_per_source, loader = counts, [pool | {'source': sources}]", *lines])


@pytest.mark.parametrize("step", [step_of_the_docstring, step_of_the_readme])
def test_the_steps_to_copy_run(step):
    from models import tiny_model

    model, g = tiny_model("llama"), torch.Generator().manual_seed(0)
    lengths = torch.tensor([6 + i % 5 for i in range(80)])
    column = torch.arange(10)
    ids = torch.randint(0, 97, (80, 10), generator=g)
    real = column < lengths[:, None]
    pool = {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real | (column < 2), -100)}
    names = vars(colm_core) | {"model": model, "pool": pool, "counts": {0: 900, 1: 900, 2: 10}}
    names["optimizer"] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    names["sources"] = torch.tensor([0, 1] * 38 + [2] * 4)
    exec(step(), names)
    index = names["coreset"].index.tolist()
    assert len(index) == 64 and index[:4] == [76, 77, 78, 79]
    expected = AdamMoments()
    expected.update(names["g"][index[4:]])  # of the 60 medoids of big sources alone
    assert names["moments"].updates == 1 and torch.equal(names["moments"].m, expected.m)
    assert torch.equal(names["batch"]["input_ids"], ids[index])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
