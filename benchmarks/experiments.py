"""Selections to try out in benchmarks/convergence.py without touching the trainer.

EXPERIMENTS maps a setting's name to function(run, pool, step, clock) -> train_colm.Choice, called in place of
train_colm.choose_coreset. The weights of the choice are trained with; `run.memory` is a dict for what a selection keeps
between steps. A name is [structure+]score, such as norms, keep+sumnorms, half+longest:

* SCORES say how much a row is wanted, from its exact gradient of the last V projection (--probe grad, the price of a
  forward pass), from its loss (the same price) or from its length (nothing).
* STRUCTURES say how the small sources fare when the rows with the largest scores are taken.

JOINT selections weigh rows against each other instead; [keep+] keeps the small sources whole.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_colm  # noqa: E402
from colm_core import allocate_budget, example_losses  # noqa: E402


@dataclass
class Candidates:
    """What a selection may pick from at one step."""

    run: train_colm.Run
    rows: Tensor  # [n] of the data set
    step: int = 0

    @property
    def tokens(self) -> Tensor:
        return self.run.train.completion_tokens(self.rows)

    @property
    def sources(self) -> Tensor:
        return self.run.train.sources[self.rows]

    @property
    def small(self) -> Tensor:
        return torch.isin(self.sources, torch.tensor(sorted(self.run.keep), dtype=torch.long))

    def random(self, purpose: str) -> Tensor:
        generator = train_colm.generator_of(self.run.args.seed, purpose, self.step)
        return torch.rand(len(self.rows), generator=generator)


# ------------------------------------------------------------------------------------------ gradients [n, D] and losses


def last_v_gradients(c: Candidates) -> Tensor:
    """Exact gradients of the last V projection, at the price of a forward pass."""
    gradients, order = train_colm.probe_pool(c.run, c.rows, c.step)
    return torch.cat([part for _, part in gradients.chunks(c.run.device)])[order.argsort().to(c.run.device)]


def lora_gradients(c: Candidates) -> Tensor:
    """Exact gradients of all LoRA weights: a forward and backward pass and n x D numbers, for oracles only."""
    run, modules = c.run, [m for name, m in c.run.inner.named_modules() if ".lora_A." in name or ".lora_B." in name]
    modules = [m for m in modules if isinstance(m, torch.nn.Linear)]
    inputs, deltas, parts, order = {}, {}, [], []

    def tape(module, args, output):
        inputs[module] = args[0].detach()
        output.register_hook(lambda delta: deltas.update({module: delta}))

    handles = [m.register_forward_hook(tape) for m in modules]
    run.mode(training=False)
    for items, batch, _ in run.micro_batches(run.train, c.rows.tolist(), run.args.max_tokens_per_micro_batch):
        with run.accelerator.autocast():
            losses = example_losses(run.inner, run.hook, batch)[0]
        torch.autograd.grad(losses.sum(), run.trained)
        pairs = ((batch.per_example(deltas[m]).float(), batch.per_example(inputs[m]).float()) for m in modules)
        parts.append(torch.cat([torch.einsum("blo,bli->boi", *pair).flatten(1) for pair in pairs], 1))
        order += items
    for handle in handles:
        handle.remove()
    return torch.cat(parts)[torch.tensor(order).argsort().to(run.device)]


@torch.no_grad()
def mean_losses(c: Candidates) -> Tensor:
    """Mean token loss of each row, [n], by a plain forward pass."""
    run, parts, order = c.run, [], []
    run.mode(training=False)
    for items, batch, _ in run.micro_batches(run.train, c.rows.tolist(), train_colm.probe_budget(run.args)):
        with run.accelerator.autocast():
            parts.append(example_losses(run.inner, run.hook, batch)[0])
        order += items
    return torch.cat(parts).cpu()[torch.tensor(order).argsort()]


def adam_gradients(c: Candidates) -> Tensor:
    """Gradients of the last V projection in Adam's metric: divided by what Adam divides its step by, once it has."""
    g, module = last_v_gradients(c), c.run.probe.module
    weight = next((p for name, p in module.named_parameters() if "lora_B" in name), module.weight)
    if not (state := c.run.optimizer.state.get(weight)):
        return g
    beta, eps = c.run.optimizer.defaults["betas"][1], c.run.optimizer.defaults["eps"]
    v = state["exp_avg_sq"][c.run.probe.rows.to(weight.device)].flatten().float()
    return g / ((v / (1 - beta ** float(state["step"]))).sqrt() + eps)


# ---------------------------------------------------------------------------------------------------------- scores [n]


def norms(c):
    """Norm of the gradient of the mean token loss."""
    return last_v_gradients(c).norm(dim=1).cpu()


def sum_norms(c):
    """Norm of the gradient of the summed token loss: a row's part in the loss per token."""
    return norms(c) * c.tokens


def sqrt_norms(c):
    """In between. If tokens were noise alone, the norm of their mean would fall with the root of their number."""
    return norms(c) * c.tokens.sqrt()


def adam_norms(c):
    return adam_gradients(c).norm(dim=1).cpu()


def sum_losses(c):
    return mean_losses(c) * c.tokens


def token_counts(c):
    """The longest completions, without a probe: what is gained by training on more tokens alone."""
    return c.tokens


def at_random(c):
    return c.random("at random")


def finite_mean(g):
    return g[g.isfinite().all(1)].mean(0)


def agree(c):
    """Inner product with the mean gradient of the other rows: the signal in a row, without its own noise."""
    g = last_v_gradients(c)
    return (g @ finite_mean(g) - g.square().sum(1) / len(g)).cpu()


def trend(c, decay=0.9):
    """Inner product with a fading mean of earlier pools' gradients: all probed rows tell the signal, not the chosen."""
    g = last_v_gradients(c)
    mean, old = finite_mean(g), c.run.memory.get("trend")
    if mean.isfinite().all():
        c.run.memory["trend"] = mean if old is None else decay * old + (1 - decay) * mean
    return (g @ (mean if old is None else old)).cpu()


# ------------------------------------------------- structures: from candidates, score [n] and k to rows and weights [k]


def largest(c, score, k):
    """The k largest scores."""
    return score.argsort(descending=True, stable=True)[:k], torch.ones(k)


def largest_of(groups, budgets, score):
    """The largest of each group, as many as its budget."""
    order = score.argsort(descending=True, stable=True)
    rows = torch.cat([order[groups[order] == q][:budget] for q, budget in enumerate(budgets)])
    return rows, torch.ones(len(rows))


def by_source(c, score, k):
    """Within each source, in proportion to the pool: the mixture stays as it is."""
    groups = c.sources.unique(return_inverse=True)[1]
    return largest_of(groups, allocate_budget(torch.bincount(groups), k).tolist(), score)


def half_way(c, score, k):
    """Small sources get as many rows as halfway between their share of the pool and all of it."""
    small = int(c.small.sum())
    mine = max(round((k * small / len(score) + small) / 2), k - (len(score) - small))
    return largest_of(c.small.long(), [k - min(mine, k), min(mine, k)], score)


def boost(c, score, k, factor=1.5):
    """One ranking, in which the small sources' scores count `factor` times."""
    score = score - score.min().clamp(max=0)
    return largest(c, torch.where(c.small, factor * score, score), k)


def trim(c, score, k, share=0.05):
    """The largest after the very largest, which may be outliers."""
    order = score.argsort(descending=True, stable=True)
    return order.roll(-math.ceil(share * len(order)))[:k], torch.ones(k)


# ---------------------------------------------------------------- joint picks: from candidates, g [n, D] and k likewise


def herding(c, g, k, target=None):
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


def omp(c, g, k):
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


def error_feedback(c, g, k, decay=0.9):
    """Herding towards the mean gradient plus what earlier coresets left out, which fades with `decay`."""
    target = g.mean(0) + c.run.memory.get("residual", 0)
    rows, weights = herding(c, g, k, target)
    c.run.memory["residual"] = decay * (target - g[rows.to(g.device)].mean(0))
    return rows, weights


# ---------------------------------------------------------------------------------------------------------- selections

FREE = (token_counts, at_random)  # need no pass of the model


def selection(signal, pick=largest, keep=False):
    """choose(run, pool, step, clock): what `pick` makes of `signal`, after the small sources if they are kept; weights
    relative to a kept row's 1, times those of --example_weights."""

    def choose(run, pool, step, clock) -> train_colm.Choice:
        k, whole = min(run.args.coreset_size, len(pool)), Candidates(run, pool, step)
        is_kept = whole.small & keep
        kept, others = is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]
        if len(kept) >= k:  # draws from the kept rows, without a probe
            return train_colm.choose_coreset(run, pool, step, clock)
        c = replace(whole, rows=pool[others])
        signals = signal(c)
        tokens = 0
        if signal not in FREE:
            clock.mark("probe")
            tokens = sum(map(run.train.length, c.rows.tolist()))
        finite = signals.reshape(len(signals), -1).isfinite().all(1).nonzero()[:, 0]
        c.rows, room = c.rows[finite.cpu()], min(k - len(kept), len(finite))
        rows, weights = pick(c, signals[finite], room) if room else (finite, torch.ones(0))
        index = torch.cat([kept, others[finite.cpu()[rows.cpu()]]])
        weights = torch.cat([torch.ones(len(kept)), weights.float().cpu()])
        if not len(index):  # no probe is finite: the loss will tell whether training can go on
            index, weights = whole.random("no probe").argsort()[:k], torch.ones(k)
        weights = weights * train_colm.token_weights(run, pool[index])
        return train_colm.Choice(index, weights, kept, tokens, len(others) - len(finite))

    return choose


@dataclass
class WiderChoice(train_colm.Choice):
    pool: Tensor | None = None  # [N + ...] rows of the data set that `index` points into


def leftover(keep=False, decay=0.9):
    """The largest norms, among what earlier pools left out too: at the norms of then, which fade, and at no cost."""

    def choose(run, pool, step, clock) -> WiderChoice:
        k, n = min(run.args.coreset_size, len(pool)), len(pool)
        old, old_norms = run.memory.get("left", (pool[:0], torch.zeros(0)))
        fresh = ~torch.isin(old, pool)
        c = Candidates(run, torch.cat([pool, old[fresh]]), step)
        is_kept = c.small & keep
        probed = (~is_kept[:n]).nonzero()[:, 0]
        score = torch.cat([torch.full((n,), math.inf), decay * old_norms[fresh]])
        if len(probed):
            score[probed] = norms(replace(c, rows=pool[probed])).nan_to_num(-1, -1)
        clock.mark("probe")
        order = score.argsort(descending=True, stable=True)  # kept ones first
        run.memory["left"] = c.rows[order[k : k + n]], score[order[k : k + n]]
        tokens = sum(map(run.train.length, pool[probed].tolist()))
        weights = train_colm.token_weights(run, c.rows[order[:k]])
        return WiderChoice(order[:k], weights, is_kept.nonzero()[:, 0], tokens, pool=c.rows)

    return choose


SCORES = {
    "norms": norms,
    "sumnorms": sum_norms,
    "sqrtnorms": sqrt_norms,
    "adam+norms": adam_norms,
    "sumloss": sum_losses,
    "longest": token_counts,
    "random": at_random,
    "agree": agree,
    "trend": trend,
}
STRUCTURES = {  # name: (pick, are small sources kept whole?)
    "": (largest, False),
    "keep+": (largest, True),
    "half+": (half_way, False),
    "boost+": (boost, False),
    "strat+": (by_source, False),
    "trim+": (trim, False),
}
KEEP = (False, True)
JOINT = {
    "omp": (last_v_gradients, omp),
    "adam+omp": (adam_gradients, omp),
    "herding": (last_v_gradients, herding),
    "feedback": (last_v_gradients, error_feedback),
    "oracle": (lora_gradients, omp),
}
EXPERIMENTS = {
    structure + score: selection(signal, pick, keep)
    for structure, (pick, keep) in STRUCTURES.items()
    for score, signal in SCORES.items()
}
del EXPERIMENTS["random"]  # is the trainer's own
EXPERIMENTS |= {"keep+" * keep + name: selection(*parts, keep) for name, parts in JOINT.items() for keep in KEEP}
EXPERIMENTS |= {"keep+" * keep + "leftover": leftover(keep) for keep in KEEP}
