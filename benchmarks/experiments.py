"""Selections to try out in benchmarks/convergence.py without touching the trainer.

EXPERIMENTS maps a setting's name to function(run, pool, step, clock) -> train_colm.Choice, called in place of
train_colm.choose_coreset. The weights of the choice are trained with; `run.memory` is a dict for what a selection keeps
between steps. Each one here keeps the small sources whole and picks the other rows by the exact gradients of the last V
projection (--probe grad), or by those of all LoRA weights: what could be had at all, at a price no trainer would pay.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_colm  # noqa: E402
from colm_core import example_losses  # noqa: E402


def last_v_gradients(run, rows) -> torch.Tensor:
    """Exact gradients of the last V projection, [n, D], at the price of a forward pass."""
    gradients, order = train_colm.probe_pool(run, rows, 0)
    return torch.cat([part for _, part in gradients.chunks(run.device)])[order.argsort().to(run.device)]


def lora_gradients(run, rows) -> torch.Tensor:
    """Exact gradients of all LoRA weights, [n, D]: a forward and backward pass and n x D numbers, for oracles only."""
    modules = [m for name, m in run.inner.named_modules() if ".lora_A." in name or ".lora_B." in name]
    modules = [m for m in modules if isinstance(m, torch.nn.Linear)]
    inputs, deltas, parts, order = {}, {}, [], []

    def tape(module, args, output):
        inputs[module] = args[0].detach()
        output.register_hook(lambda delta: deltas.update({module: delta}))

    handles = [m.register_forward_hook(tape) for m in modules]
    run.mode(training=False)
    for items, batch, _ in run.micro_batches(run.train, rows.tolist(), run.args.max_tokens_per_micro_batch):
        with run.accelerator.autocast():
            losses = example_losses(run.inner, run.hook, batch)[0]
        torch.autograd.grad(losses.sum(), run.trained)
        pairs = ((batch.per_example(deltas[m]).float(), batch.per_example(inputs[m]).float()) for m in modules)
        parts.append(torch.cat([torch.einsum("blo,bli->boi", *pair).flatten(1) for pair in pairs], 1))
        order += items
    for handle in handles:
        handle.remove()
    return torch.cat(parts)[torch.tensor(order).argsort().to(run.device)]


def matched(pick, gradients=last_v_gradients):
    """A selection from pick(run, g [n, D], k) -> (rows [k], weights [k]), weights relative to a kept row's 1."""

    @functools.wraps(pick)
    def choose(run, pool, step, clock) -> train_colm.Choice:
        is_kept = torch.isin(run.train.sources[pool], torch.tensor(sorted(run.keep), dtype=torch.long))
        kept, others = is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]
        room = min(run.args.coreset_size, len(pool)) - len(kept)
        if room <= 0:
            return train_colm.choose_coreset(run, pool, step, clock)  # draws from the kept rows, without a probe
        g = gradients(run, pool[others])
        clock.mark("probe")
        finite = g.isfinite().all(1).nonzero()[:, 0]
        rows, weights = pick(run, g[finite], min(room, len(finite)))
        index = torch.cat([kept, others[finite.cpu()[rows.cpu()]]])
        weights = torch.cat([torch.ones(len(kept)), weights.float().cpu()])
        tokens = sum(map(run.train.length, pool[others].tolist()))
        return train_colm.Choice(index, weights, kept, tokens, len(others) - len(finite))

    return choose


def largest_norms(run, g, k):
    """The k largest gradients."""
    return g.norm(dim=1).topk(k).indices, torch.ones(k)


def herding(run, g, k, target=None):
    """Greedily, k rows whose mean stays close to `target` [D], by default the mean of all."""
    g, target = g.double(), g.double().mean(0) if target is None else target.double()
    gram, to_target = (g @ g.T).cpu(), (g @ target).cpu()
    taken, of_chosen, rows = torch.zeros(len(g), dtype=torch.bool), torch.zeros(len(g)).double(), []
    for t in range(1, k + 1):  # the row that brings the sum of the chosen closest to t * target
        gain = t * to_target - of_chosen - gram.diagonal() / 2
        rows.append(int(gain.masked_fill(taken, -math.inf).argmax()))
        taken[rows[-1]] = True
        of_chosen += gram[rows[-1]]
    return torch.tensor(rows, dtype=torch.long), torch.ones(k)


def nonnegative_omp(run, g, k):
    """Non-negative orthogonal matching pursuit of the sum of all rows (Lawson-Hanson's algorithm, ended at k rows)."""
    gram = torch.cat([g.double() @ part.double().T for part in g.split(16)], 1).cpu()
    to_target, weights, support = gram.sum(1), torch.zeros(len(g)).double(), torch.zeros(len(g), dtype=torch.bool)
    ridge = 1e-9 * gram.diagonal().mean()
    for _ in range(3 * k):
        slope = (to_target - gram @ weights).masked_fill(support, 0)
        if support.sum() == k or slope.max() <= 1e-9 * to_target.abs().max():
            break
        support[slope.argmax()] = True
        while True:
            s, fit = support.nonzero()[:, 0], torch.zeros_like(weights)
            fit[s] = torch.linalg.solve(gram[s][:, s] + ridge * torch.eye(len(s)).double(), to_target[s])
            if (fit[s] > 0).all():
                break
            negative = support & (fit <= 0)  # walk towards the fit until the first weight reaches 0
            share = weights / (weights - fit).clamp_min(1e-300)
            first = share.masked_fill(~negative, math.inf).argmin()
            weights = weights + share[first] * (fit - weights)
            weights[first], support[first] = 0, False
        weights = fit
    return support.nonzero()[:, 0], weights[support]


def error_feedback(run, g, k, decay=0.9):
    """Herding towards the mean gradient plus what earlier coresets left out, which fades with `decay`."""
    target = g.mean(0) + run.memory.get("residual", 0)
    rows, weights = herding(run, g, k, target)
    run.memory["residual"] = decay * (target - g[rows.to(g.device)].mean(0))
    return rows, weights


EXPERIMENTS = {
    "keep+norms": matched(largest_norms),
    "keep+herding": matched(herding),
    "omp": matched(nonnegative_omp),
    "feedback": matched(error_feedback),
    "oracle": matched(nonnegative_omp, lora_gradients),
    "oracle-nokeep": matched(nonnegative_omp, lora_gradients),
}
