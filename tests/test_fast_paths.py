"""What makes a step fast must not change it: compiled layers and packed rows against the plain ones."""

import pytest
import torch
from torch._dynamo.utils import counters

import train_colm

POOLS = 3


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
        loss = train_colm.train_on(run, pool[choice.index], torch.ones(len(choice.index)), step)
        gradient = torch.cat([p.grad.flatten() for p in run.trained])
        run.optimizer.zero_grad()
        run.moments.update_from_sums(*choice.history)
        out.append((choice.index.tolist(), loss.item(), gradient))
    return out


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
            rows = train_colm.draw_pool(len(run.train), 13 + step, budget, step)
            train_colm.train_on(run, rows, torch.ones(len(rows)), step)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] <= 10  # with and without gradients, the first layer and the others, one row and several; loss
    assert graphs[-1] == graphs[1]


@pytest.mark.parametrize("checkpointing", ["--gradient_checkpointing", "--no-gradient_checkpointing"])
def test_compiled_layers_go_back_through_the_dropout_they_went_forward_through(tmp_path, checkpointing):
    torch._dynamo.reset()
    run = one_run(tmp_path, "--compile", checkpointing, "--lora_dropout", "0.5")
    rows, ones = torch.arange(16), torch.ones(16)
    train_colm.train_on(run, rows, ones, 0)
    gradient = [p.grad.clone() for p in run.trained]
    losses = []
    for sign in (1, -2):  # along the gradient, there and back
        with torch.no_grad():
            for p, g in zip(run.trained, gradient, strict=True):
                p += sign * 1e-2 * g
        losses.append(train_colm.train_on(run, rows, ones, 0))
    slope = (losses[0] - losses[1]).item() / 2e-2
    assert slope == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=2e-2)


def test_switching_the_mode_is_what_train_does(tmp_path):
    run = one_run(tmp_path)
    for training in (True, False):
        run.mode(training)
        assert {module.training for module in run.model.modules()} == {training}
