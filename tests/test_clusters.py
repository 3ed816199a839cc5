"""Sources where there are none: k-means against a plain-loop twin, and clustered runs (paper, section 5.4)."""

import math

import pytest
import torch
from models import KINDS, tiny_model

import train_colm
from colm_batches import collate, mean_hidden_states, pack
from colm_core import k_means


def points(clusters: int, each: int, seed: int = 0) -> torch.Tensor:
    """Tight groups of points far from one another, in random order."""
    g = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(clusters, 5, generator=g)
    x = (centres[:, None] + torch.randn(clusters, each, 5, generator=g)).flatten(0, 1)
    return x[torch.randperm(len(x), generator=g)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def lloyd_is_done(x: list, owner: list) -> bool:
    """Plain loops: every point is nearest to the mean of its own cluster."""
    means = {c: [math.fsum(v) / len(v) for v in zip(*(p for p, o in zip(x, owner, strict=True) if o == c), strict=True)]
             for c in set(owner)}  # fmt: skip
    return all(min(means, key=lambda c, p=p: math.dist(p, means[c])) == o for p, o in zip(x, owner, strict=True))


@pytest.mark.parametrize(("clusters", "each"), [(1, 7), (3, 5), (6, 40)])
def test_clusters_are_a_fixed_point_of_lloyds_iterations(clusters, each):
    x = points(clusters, each)
    owner = k_means(x, torch.arange(len(x)), len(x), clusters, seeded()).tolist()
    assert len(set(owner)) == clusters
    assert lloyd_is_done(x.tolist(), owner)
    assert owner == k_means(x, torch.arange(len(x)), len(x), clusters, seeded()).tolist()


def test_groups_that_lie_apart_are_found():
    x = points(4, 25)
    owner = k_means(x, torch.arange(100), 100, 4, seeded())
    assert torch.bincount(owner).tolist() == [25] * 4
    assert all(torch.cdist(x[owner == c], x[owner == c]).max() < 15 for c in range(4))


def test_a_large_common_part_does_not_hide_the_groups():
    """Whole eighths, exact in float32 with the common part too; the sums of 2000 of them are not."""
    x = torch.randint(0, 64, (2000, 3), generator=seeded()) / 8
    rows, offset = torch.arange(2000), 2.0**17
    moved = k_means(x + offset, rows, 2000, 6, seeded()) != k_means(x, rows, 2000, 6, seeded())
    assert int(moved.sum()) < 20  # without the subtraction of the mean hundreds belong elsewhere


@pytest.mark.parametrize("clusters", [1, 3, 5])
def test_equal_points_and_as_many_clusters_as_points_leave_none_empty_without_need(clusters):
    same = torch.ones(5, 2)
    assert len(k_means(same, torch.arange(5), 5, clusters, seeded())) == 5
    apart = torch.arange(5.0)[:, None]
    assert len(set(k_means(apart, torch.arange(5), 5, clusters, seeded()).tolist())) == clusters


def test_starts_are_drawn_by_squared_distance_and_an_empty_cluster_takes_the_row_served_worst(monkeypatch):
    """Points 0, 0, 10, 14, and the first three as centres: the second cluster gets no row of its own."""
    chances, starts = [], iter([1, 2])

    def multinomial(weights, number, generator):
        chances.append(weights.tolist())
        return torch.tensor([next(starts)])

    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(0))
    monkeypatch.setattr(torch, "multinomial", multinomial)
    x = torch.tensor([[0.0], [0.0], [10.0], [14.0]])
    owner = k_means(x, torch.arange(4), 4, 3, seeded())
    assert chances == [[0, 0, 100, 196], [0, 0, 100, 196]]
    assert owner.tolist() == [0, 0, 2, 1]  # 14 lay farthest from its centre, the mean of 10 and 14 after one round


@pytest.mark.parametrize("clusters", [0, 6])
def test_more_clusters_than_rows_are_refused(clusters):
    with pytest.raises(ValueError, match=rf"{clusters} clusters of 5 rows: clusters must lie in 1\.\.5"):
        k_means(torch.randn(5, 2), torch.arange(5), 5, clusters, seeded())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_cluster(value):
    x = points(4, 25)
    x[17, 2] = value
    owner = k_means(x, torch.arange(100), 100, 4, seeded())
    sizes = torch.bincount(torch.cat([owner[:17], owner[18:]])).sort().values.tolist()
    assert sizes == [24, 25, 25, 25] and 0 <= int(owner[17]) < 4


def test_two_ranks_find_the_clusters_of_one():
    """Both ranks in threads; `reduce` adds up what they hand in."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    x, slots, barrier = points(5, 30), [None, None], Barrier(2)

    def rank(r: int):
        def reduce(tensor):
            slots[r] = tensor
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        mine = torch.arange(r, len(x), 2)
        return k_means(x[mine], mine, len(x), 5, seeded(), reduce)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, k_means(x, torch.arange(len(x)), len(x), 5, seeded()))


SIZES = (9, 5, 14, 7, 12)


def examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(3, 97, (n,), generator=g), torch.arange(n) >= 2) for n in SIZES]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mistral", "stablelm")])
def test_mean_hidden_states_are_those_of_each_row_alone(kind):
    import transformers

    from colm_batches import packed_attention

    transformers.AttentionInterface.register("packed", packed_attention)
    model, rows = tiny_model(kind), examples()
    means = mean_hidden_states(model, collate(rows))
    packed = mean_hidden_states(tiny_model(kind, attn_implementation="packed"), pack(rows, 14, multiple=8))
    assert means.shape == (len(SIZES), 32)
    for i, (ids, _) in enumerate(rows):
        with torch.no_grad():
            hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
        for got in (means[i], packed[i]):
            torch.testing.assert_close(got, hidden.mean(0), rtol=1e-4, atol=1e-5)


FLAGS = "--cluster_sources 4 --cluster_warmup 2 --cluster_updates 1 --max_steps 6 "
FLAGS += "--save_every 1 --keep_checkpoints 9 --eval_every 0"


def run(folder, *flags: str) -> None:
    train_colm.cli([*FLAGS.split(), "--pool_size", "24", "--coreset_size", "12", "--output_dir", str(folder), *flags])


def test_a_clustered_run_warms_up_then_keeps_small_clusters_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seeds = []

    def seen(x, rows, total, clusters, generator, all_reduce):
        seeds.append(generator.initial_seed())
        return k_means(x, rows, total, clusters, generator, all_reduce)

    monkeypatch.setattr(train_colm, "k_means", seen)
    run(tmp_path / "whole")
    assert seeds == [train_colm.seed_of(0, "clusters", step) for step in (2, 4)]  # every clustering draws anew
    metrics = train_colm.read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [r["kept"] for r in metrics[:2]] == [0, 0] and [r["probe_s"] for r in metrics[:2]] == [0, 0]
    assert all(r["kept"] and r["probe_s"] for r in metrics[2:])
    states = {s: torch.load(tmp_path / f"whole/checkpoint-{s:06d}/state.pt")["clusters"] for s in range(1, 7)}
    assert states[1] is None and states[2] is None and states[3].unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(states[3], states[4]) and not torch.equal(states[4], states[5])
    for step in (2, 3):
        again = tmp_path / f"from-{step}"
        run(again, "--resume", str(tmp_path / f"whole/checkpoint-{step:06d}"))
        for name in ("adapter_model.safetensors",):
            assert (again / "final" / name).read_bytes() == (tmp_path / "whole/final" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cluster_sources 9999", "9999 exceeds the 1500"),
        ("--keep_sources none", "leave --keep_sources at auto"),
        ("--selection full", "no effect with --selection full"),
        ("--cluster_warmup 6", "--cluster_warmup 6 reaches the last step"),
    ],
)
def test_clusters_that_cannot_be_are_refused(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *flags.split())
    assert words in capsys.readouterr().err
