"""What makes a step fast must not change it: compiled layers and packed rows against the plain ones."""

import math
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import tiny_model
from torch._dynamo.utils import counters

import train_colm
from colm_batches import LabelledLogits, PackingCheck, plan_micro_batches

POOLS = 3
DROPOUT = ("--lora_dropout", "0.5")


def one_run(tmp_path, *flags: str) -> train_colm.Run:
    """The demo's run, as train_colm.main builds it."""
    flags = ("--output_dir", str(tmp_path), "--lora_dropout", "0", "--max_tokens_per_micro_batch", "700", *flags)
    args = train_colm.parse_args([*flags])
    tokenizer = train_colm.load_tokenizer(args)
    train, _, keep = train_colm.load_data(args, tokenizer, show=False)
    accelerator = train_colm.make_accelerator(args)
    model = train_colm.load_model(args, accelerator, tokenizer)
    with torch.no_grad():  # as if some steps had been made: LoRA's B starts at zero
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return train_colm.build_run(args, accelerator, tokenizer, model, train, None, keep)


def steps(run: train_colm.Run) -> list[tuple]:
    """Coreset, loss and gradients of some pools, from the same weights."""
    out = []
    for step in range(POOLS):
        pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, step)
        choice = train_colm.choose_coreset(run, pool, step, train_colm.Clock(run.device))
        loss = train_colm.accumulate_gradients(run, pool, choice, step)
        gradient = torch.cat([p.grad.flatten() for p in run.trained])
        run.optimizer.zero_grad()
        run.moments = choice.moments
        out.append((choice.index.tolist(), loss.item(), gradient))
    return out


def train_on(run: train_colm.Run, rows: torch.Tensor, step: int) -> torch.Tensor:
    """Gradient of the mean loss of all `rows`."""
    everything = torch.arange(len(rows))
    choice = train_colm.Choice(everything, torch.ones(len(rows)), everything < 0, run.moments)
    return train_colm.accumulate_gradients(run, rows, choice, step)


def same(fast: list[tuple], plain: list[tuple]) -> None:
    for (index, loss, gradient), (index_, loss_, gradient_) in zip(fast, plain, strict=True):
        assert index == index_
        assert loss == pytest.approx(loss_, rel=1e-5)
        assert float((gradient - gradient_).norm() / gradient_.norm()) < 1e-4


@pytest.mark.parametrize("flags", [("--probe", "grad"), ("--num_directions", "2")], ids=["grad", "spsa"])
def test_packed_rows_train_and_select_as_padded_ones_do(tmp_path, flags):
    same(steps(one_run(tmp_path, "--packing", *flags)), steps(one_run(tmp_path, *flags)))


@pytest.mark.parametrize("probe, checkpointing", [("spsa", "--gradient_checkpointing"), ("grad", "--no-packing")])
def test_compiled_layers_train_and_select_as_plain_ones_do_without_endless_recompiling(tmp_path, probe, checkpointing):
    flags = ("--probe", probe, checkpointing)
    plain = steps(one_run(tmp_path, *flags))
    torch._dynamo.reset()
    counters.clear()
    run = one_run(tmp_path, "--compile", *flags)
    same(steps(run), plain)
    graphs = []
    for budget in (300, 200, 400, 120):  # other numbers of rows, down to one, and other lengths
        run.args.max_tokens_per_micro_batch = budget
        for step in range(3):
            train_on(run, train_colm.draw_pool(len(run.train), 13 + step, budget, step), step)
        graphs.append(counters["stats"]["unique_graphs"])
    # the layers with and without gradients, for one row and for several, and as SPSA's copies; two of the loss
    assert 0 < graphs[-1] <= (7 if probe == "spsa" else 5)
    assert graphs[-1] == graphs[1]


class DropoutOfItsOwn(torch.nn.Module):
    """An activation that calls the function `dropout`, as the layers of some models do."""

    def forward(self, x):
        return torch.nn.functional.dropout(torch.nn.functional.silu(x), 0.5, self.training)


@pytest.mark.parametrize("own", [True, False], ids=["function", "module"])
@pytest.mark.parametrize("checkpointing", ["--gradient_checkpointing", "--no-gradient_checkpointing"])
def test_compiled_layers_go_back_through_the_dropout_they_went_forward_through(
    tmp_path, monkeypatch, checkpointing, own
):
    torch._dynamo.reset()
    if own:
        monkeypatch.setitem(transformers.activations.ACT2FN, "silu", DropoutOfItsOwn)
    run = one_run(tmp_path, "--compile", checkpointing, "--lora_dropout", "0" if own else "0.5")
    assert own == any(isinstance(module, DropoutOfItsOwn) for module in run.modules)
    rows = torch.arange(16)
    train_on(run, rows, 0)
    gradient = [p.grad.clone() for p in run.trained]
    losses = []
    for sign in (1, -2):  # along the gradient, there and back
        with torch.no_grad():
            for p, g in zip(run.trained, gradient, strict=True):
                p += sign * 1e-2 * g
        losses.append(train_on(run, rows, 0))
    slope = (losses[0] - losses[1]).item() / 2e-2
    assert slope == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=2e-2)


def test_only_one_graph_with_gradients_serves_all_layers_and_no_other_number_of_tokens_needs_another(
    tmp_path, monkeypatch
):
    deep = transformers.LlamaConfig.__init__

    def init(self, **sizes):
        deep(self, **(sizes | {"num_hidden_layers": 6}))

    monkeypatch.setattr(transformers.LlamaConfig, "__init__", init)
    torch._dynamo.reset()
    counters.clear()
    run = one_run(tmp_path, "--compile", "--probe", "grad", "--max_tokens_per_micro_batch", "400", *DROPOUT)
    assert len(train_colm.decoder_layers(run)) == 6
    steps(run)
    run.set_training(False)
    for max_tokens in (400, 300):
        for _, batch, _ in run.micro_batches(run.train, torch.arange(32), max_tokens):
            with torch.no_grad():  # as an evaluation does
                train_colm.micro_batch_losses(run.inner, run.labelled_logits, batch)
    assert counters["stats"]["unique_graphs"] == 4  # layers with and without gradients, and two kernels of the loss


def dropped(p: float, seed: tuple[int, int], own_seed=(77, -88), shape=(512, 640)) -> torch.Tensor:
    """The elements that HashedDropout drops, [rows, columns] bool."""
    dropout = train_colm.HashedDropout(p)
    dropout.seed, dropout.own_seed = torch.tensor([seed, own_seed], dtype=torch.int32)
    x = torch.ones(1, *shape, requires_grad=True)
    out = dropout(x)
    out.sum().backward()
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert torch.equal(x.grad, out)  # the derivative is the mask, scaled
    return out[0] == 0


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("seed", [(0, 0), (0, 1), (1, 0), (-(2**31), 2**31 - 1), (123456789, -987654321)])
def test_hashed_dropout_is_as_good_as_a_drawn_one(p, seed):
    mask = dropped(p, seed)
    assert torch.equal(mask, dropped(p, seed))
    other = dropped(p, (seed[0], seed[1] ^ 4))
    another = dropped(p, (seed[0] ^ 4, seed[1]))
    other_module, another_module = dropped(p, seed, (78, -88)), dropped(p, seed, (77, -87))
    unit = (mask.double() - p) / (p * (1 - p)) ** 0.5  # mean 0 and variance 1, were it drawn
    n = mask.numel()
    sums = {"share": unit.sum()}
    others = {"other seed": other, "another seed": another}
    others |= {"other module": other_module, "another module": another_module}
    for name, mask_of in others.items():
        sums[name] = (unit * (mask_of.double() - p) / (p * (1 - p)) ** 0.5).sum()
    for lag in (1, 2, 64, 640, 641):  # neighbours in a row, in a column, and across
        sums[f"lag {lag}"] = (unit.flatten()[lag:] * unit.flatten()[:-lag]).sum()
    for name, value in sums.items():
        assert abs(value) < 4.5 * n**0.5, name  # standard deviations of a sum of n independent ones
    for dim in (0, 1):  # no row and no column is favoured
        totals = unit.sum(dim) / mask.shape[dim] ** 0.5
        assert abs(totals.square().mean() - 1) < 4.5 * (2 / len(totals)) ** 0.5


def test_compiled_layers_drop_by_hash_and_draw_new_seeds_for_every_micro_batch(tmp_path):
    run = one_run(tmp_path, "--compile", "--max_tokens_per_micro_batch", "300", *DROPOUT)
    kinds = {type(module).__name__ for layer in train_colm.decoder_layers(run) for module in layer.modules()}
    assert "HashedDropout" in kinds and "Dropout" not in kinds
    hashed = [module for module in run.model.modules() if isinstance(module, train_colm.HashedDropout)]
    assert len(hashed) > 1
    seeds = []

    def watch(model, args):  # called after the hook that draws
        seeds.append(torch.stack([module.seed ^ module.own_seed for module in hashed]))

    run.inner.register_forward_pre_hook(watch)
    for step in (0, 0, 1):
        train_on(run, torch.arange(16), step)
    third = len(seeds) // 3
    assert third > 1  # micro-batches of a step
    assert torch.equal(torch.stack(seeds[:third]), torch.stack(seeds[third : 2 * third]))  # a step again is the same
    different = torch.cat(seeds[third:])
    assert len(different.unique(dim=0)) == len(different)  # every module, micro-batch and step has seeds of its own
    run.set_training(False)
    x = torch.randn(3, 128)
    assert all(module(x) is x for module in hashed)


def test_set_training_does_what_train_does(tmp_path):
    run = one_run(tmp_path)
    for training in (True, False):
        run.model.train(not training)  # as if nobody had called set_training
        run.set_training(training)
        assert all(module.training == training for module in run.model.modules())
        assert len(run.modules) == len(list(run.model.modules())) > 50


@pytest.mark.parametrize("weights, power", [("uniform", 0), ("sqrt", 0.5), ("tokens", 1)])
def test_example_weights_train_on_the_weighted_mean_of_the_losses(tmp_path, weights, power):
    run = one_run(tmp_path, "--selection", "random_keep", "--example_weights", weights)
    pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, 0)
    choice = train_colm.choose_coreset(run, pool, 0, train_colm.Clock(run.device))
    rows = pool[choice.index].tolist()
    run.set_training(False)
    losses, tokens = [], []
    for row in rows:  # one row at a time, from the model's own logits
        ids, supervised = run.train.example(row)
        with torch.no_grad():
            logits = run.inner(ids.long()[None]).logits[0, :-1].double()
        start = int(supervised.int().argmax())
        losses.append(torch.nn.functional.cross_entropy(logits[start - 1 :], ids.long()[start:]).item())
        tokens.append(len(ids) - start)
    expected = sum(n**power * loss for n, loss in zip(tokens, losses, strict=True)) / sum(n**power for n in tokens)
    loss = train_colm.accumulate_gradients(run, pool, choice, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len(set(tokens)) > 1


@pytest.mark.parametrize("selection", ["random_keep", "fresh", "colm"])
def test_keep_share_lies_between_the_pool_s_mixture_and_whole_small_sources(tmp_path, selection):
    counts = {}
    for share in ("0", "0.5", "1"):
        run = one_run(tmp_path, "--selection", selection, "--probe", "grad", "--keep_share", share)
        pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, 3)
        choice = train_colm.choose_coreset(run, pool, 3, train_colm.Clock(run.device))
        assert len(set(choice.index.tolist())) == len(choice.index) == run.args.coreset_size
        small = {i for i, q in enumerate(run.train.sources[pool].tolist()) if q in run.keep}
        kept = set(choice.kept.nonzero()[:, 0].tolist())
        assert kept == small & set(choice.index.tolist())
        n, k, s = len(pool), run.args.coreset_size, float(share)
        assert len(kept) == -int(-len(small) * (s + (1 - s) * k / n) // 1)
        counts[share] = len(kept)
        assert choice.skipped_probes == 0  # rows that are left out were not probed
    assert counts["0"] < counts["0.5"] < counts["1"] == len(small)


@pytest.mark.parametrize("share", ["0", "0.1", "0.7"])
def test_keep_share_is_not_rounded_up_by_floating_point(share):
    """K of N rows of N small ones are K: 7 / 100 * 100 is 7.000000000000001 in floating point."""
    for pool, k in ((100, 7), (25, 7), (128, 64), (10, 3)):
        for n in (1, 3, pool):
            small = torch.arange(pool) < n
            run = SimpleNamespace(args=SimpleNamespace(keep_share=float(share), coreset_size=k, seed=0))
            s = Fraction(share)
            expected = math.ceil(n * (s + (1 - s) * Fraction(k, pool)))
            kept = train_colm.thinned(run, small, 0)
            assert int(kept.sum()) == expected and not (kept & ~small).any()


@pytest.mark.parametrize(("probe", "packing"), [("grad", "--packing"), ("spsa", "--no-packing")])
def test_stand_ins_count_for_nothing(tmp_path, monkeypatch, probe, packing):
    """A rank that runs out of examples runs one beside the others' last micro-batch, with no trace in any result."""
    run = one_run(tmp_path, "--probe", probe, packing)
    run.held_out = train_colm.load_data(run.args, run.tokenizer, show=False)[1]
    pool, original = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, 0), train_colm.plan_micro_batches
    by_length = torch.tensor([run.train.length(row) for row in pool.tolist()]).argsort()
    probed = torch.zeros(len(pool), dtype=torch.bool)
    probed[by_length[1:20]] = True

    def results() -> list[torch.Tensor]:
        gradients = train_colm.probe_pool(run, pool, probed, 0)
        assert torch.equal(gradients.held, probed)
        choice = train_colm.uniform_choice(run, pool, probed.nonzero()[:, 0], probed)
        loss = train_colm.accumulate_gradients(run, pool, choice, 0)
        trained = torch.cat([p.grad.flatten() for p in run.trained])
        run.optimizer.zero_grad()
        losses = train_colm.evaluate(run)
        per_source = torch.tensor([*losses.pop("eval_loss_of").values()])
        return [gradients.values, loss, trained, torch.tensor([*losses.values()]), per_source]

    without = results()
    monkeypatch.setattr(train_colm, "plan_micro_batches", lambda *args: [[*mine, []] for mine in original(*args)])
    for a, b in zip(without, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)

    def k_means(states, rows, *_):
        assert len(states) == len(rows) and torch.equal(rows.sort().values, torch.arange(len(run.train)))
        return rows

    monkeypatch.setattr(train_colm, "k_means", k_means)
    monkeypatch.setattr(train_colm, "use_clusters", lambda run, clusters: None)
    run.train = run.held_out  # fewer rows to cluster
    train_colm.cluster_rows(run, 0)


@pytest.mark.parametrize("leaky", [False, True])
def test_the_check_sees_what_passes_from_one_packed_example_to_the_next(leaky):
    """By comparing equal shapes: where half precision hides the other differences, this one is left."""
    model = tiny_model("llama")

    def recurrent(module, args, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.9 * state + x[:, t]
            states.append(state)
        return x + 0.3 * torch.stack(states, 1)

    if leaky:  # a state that nobody resets where the next example begins
        model.get_input_embeddings().register_forward_hook(recurrent)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (20 + i,), generator=g) for i in range(7)]
    check = PackingCheck(model, LabelledLogits(model), nullcontext, 1000, 64, torch.float32)
    found = check.differences(rows, packed=True)
    assert found.problem == "" and found.ahead <= train_colm.AHEAD
    assert (found.leaks > 100 * train_colm.LEAKS) == leaky and (found.leaks == 0) != leaky


@pytest.mark.parametrize("ranks", [2, 4])
def test_padded_examples_are_dealt_there_and_back(ranks):
    """Dealt in one direction alone, the first rank would get the longest example of every turn."""
    plan = plan_micro_batches([*range(1, 65)], 200, ranks, packed=False)
    tokens = [sum(i + 1 for micro_batch in micro_batches for i in micro_batch) for micro_batches in plan]
    assert tokens == [64 * 65 // 2 // ranks] * ranks


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ("--probe grad", 1400),  # twice --max_tokens_per_micro_batch, which is 700: no layer keeps its activations
        ("--probe grad --gradient_checkpointing", 700),
        ("--num_directions 1", 1400),
        ("--num_directions 8", 175),  # the head sees two copies of a row for each direction
        ("--num_directions 9999", 1),
    ],
)
def test_the_probe_holds_no_more_tokens_than_memory_has_room_for(tmp_path, monkeypatch, flags, tokens):
    run = one_run(tmp_path, *flags.split())
    pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, 0)
    asked = []

    def plan(lengths, max_tokens, ranks, packed):
        asked.append(max_tokens)
        raise InterruptedError  # before the model runs

    monkeypatch.setattr(train_colm, "plan_micro_batches", plan)
    with pytest.raises(InterruptedError):
        train_colm.probe_pool(run, pool, torch.ones(len(pool), dtype=torch.bool), 0)
    assert asked == [tokens]


def test_ranks_take_the_fresh_rows_of_the_main_process(tmp_path, monkeypatch):
    """Unlike processors may round a cosine to both sides of ALIKE."""
    run = one_run(tmp_path, "--selection", "fresh")
    pool = train_colm.draw_pool(len(run.train), run.args.pool_size, 0, 0)
    monkeypatch.setattr(train_colm.Run, "broadcast", lambda self, index: torch.arange(len(index)))
    choice = train_colm.choose_coreset(run, pool, 0, train_colm.Clock(run.device))
    taken = list(range(run.args.coreset_size))
    assert choice.index.tolist() == choice.weight.nonzero()[:, 0].tolist() == taken
    assert set(choice.kept.nonzero()[:, 0].tolist()) <= set(taken)


def test_keep_share_of_nothing_to_share_is_refused(tmp_path):
    with pytest.raises(train_colm.UserError, match="--keep_share 1.5 is out of range: give 0 to 1"):
        train_colm.parse_args(["--keep_share", "1.5"])
    with pytest.raises(train_colm.UserError, match="--keep_share has no effect with --selection random: drop one"):
        train_colm.parse_args(["--keep_share", "0.5", "--selection", "random"])
