"""CoLM in plain PyTorch: mini-batch coresets for fine-tuning language models on data mixtures.

Every formula of Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures"
(ICLR 2025, arXiv 2407.19580v4), in the order of the algorithm and under its section or equation. The second half of
the file is what lets the probe work on any architecture: it finds V by running the model, and runs part of a model
again in wider precision. The file needs torch alone: copy it into your own repository. `train_colm.py` is the complete
trainer; a step in your own loop reads

    probe = VProjectionProbe(model)                              # once: no weight is changed
    moments = AdamMoments(optimizer.defaults["betas"])           # once: the history of Eq. 3-4
    keep = small_sources(counts)                                 # once: {source id: rows in the training set}

    model.eval()                                                 # pool: input_ids, attention_mask, labels, each [N, T]
    g = probe.gradients(lambda: example_losses(model, pool))     # [N, D]; sources: integers [N]
    coreset = select_coreset(moments.normalize(g), sources, k=64, keep=keep)
    big = [i for i in coreset.index.tolist() if int(sources[i]) not in keep]
    moments.update(g[big])
    model.train()
    batch = {name: tensor[coreset.index] for name, tensor in pool.items()}
    example_losses(model, batch).mean().backward()

A pool too large for one forward is probed in parts: g is the `torch.cat` of what `gradients` returns for each. A
checkpoint also needs `moments.state_dict()`. Messages speak of train_colm.py's flags: --probe_module is the argument
`module_name` of the probe, --probe grad its method `gradients`.

Symbols: N pool size, K coreset size, B rows and T tokens of a micro-batch, n its examples (B, unless rows are packed)
or the rows of one source, D probed numbers (V rows x LoRA rank), h kept coordinates, S sources, C copies of a batch. A
comment `DIFFERS n` stands on a line that departs from the paper or its official code; the README gives the reason under
the same number.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

AllReduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all ranks, on every rank


def one_process(tensor: Tensor) -> Tensor:
    """The all-reduce of a single process."""
    return tensor


# -------------------------------------------------------------------------------------------- sources and budgets (4.1)


def small_sources(counts: Mapping[Hashable, int]) -> set:
    """Sources with fewer than |V| / c training examples (below the mean size): all their examples are kept (4.1)."""
    total = sum(counts.values())  # |V|
    c = sum(count > 0 for count in counts.values())  # what has no examples is no source, and would lower the mean
    small = set()
    for source, count in counts.items():
        if 0 < count * c < total:  # count < |V| / c, without rounding
            small.add(source)
    return small


def allocate_budget(counts: Tensor, budget: int, generator: torch.Generator | None = None) -> Tensor:
    """Share `budget` over sources in proportion to their pool `counts` [S]; sums to min(budget, counts.sum()) (4.1).

    b_q = (K - |S_s|) |V_q| / (N - |S_s|), with `budget` = K - |S_s| and the counts those of the big sources.

    The shares are rounded down, and what is left is given one by one to the smallest shares, as in the official code.
    Where shares tie, `generator` (the global one if None) decides which source gets it. An order by position would
    starve the sources that stand late in a file: of 280 sources with one row each, the last third was never trained on.
    """
    counts = counts.long()
    total = int(counts.sum())
    if budget < 0:
        raise ValueError(f"budget {budget} is negative: it must be 0 or more")
    if budget >= total:
        return counts.clone()
    shares = counts * budget // total  # [S]; below the count of every source that has rows, since budget < total
    left = budget - int(shares.sum())  # less than one for each source that has rows: no source gets two
    # a source whose share is its count (both are 0) stands last in line
    order_key = torch.where(shares < counts, shares, total)  # [S]   DIFFERS 1: no budget exceeds its source's count
    # a stable sort leaves ties in the order in which they come: a random one
    shuffled = torch.randperm(len(counts), generator=generator).to(counts.device)  # DIFFERS 1: ties are drawn
    smallest_first = shuffled[order_key[shuffled].argsort(stable=True)]  # [S]
    shares[smallest_first[:left]] += 1
    return shares


# ------------------------------------------------------------------------------------------ per-example losses, plainly


def example_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """L_i = mean of -log p over example i's supervised tokens, [C, B] in nats, in one `model(...)`.

    `batch` is what most training loops have: input_ids, attention_mask and labels, each [B, T], with labels of -100
    where a token carries no loss. An example without any label has loss 0, where a mean of nothing would be NaN and
    spoil the mean over the coreset. C = 1, or the number of perturbed copies inside `VProjectionProbe.spsa`.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "attention_mask" in batch:  # without one no row is padded, or all are on the right
        inputs["attention_mask"] = batch["attention_mask"]
    logits = model(**inputs, use_cache=False).logits  # [C * B, T, V]
    labels = batch["labels"][:, 1:]  # [B, T - 1]: position t predicts token t + 1
    copies = len(logits) // len(labels)  # C
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # bf16 would round the losses
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(copies, 1).flatten(), reduction="none")
    sums = losses.view(copies, *labels.shape).sum(2)  # [C, B]; cross_entropy is 0 where the label is -100
    supervised = (labels != -100).sum(1)  # [B]
    return sums / supervised.clamp_min(1)  # DIFFERS 10: each example by its own tokens, not by the padded width


def spsa_gradients(derivatives: Tensor, z: Tensor) -> Tensor:
    """g_i = mean over directions k of derivative_ik z_k (Eq. 6).

    `derivatives` [n, directions] are those of `VProjectionProbe.spsa`, `z` [directions, d_v, r]; returns [n, D].
    """
    return derivatives @ z.flatten(1) / len(z)


# ------------------------------------------------------------------------------- the zeroth-order signal (4.2, Eq. 5-6)


class VProjectionProbe:
    """Per-example signal of the last layer's V projection: LoRA's B [d_v, r] if it has an adapter, else W [d_v, d_in].

    Both probes are hooks inside an ordinary call of the model, so they work for any architecture and under any wrapper
    that lets the model's own modules run (DDP: pass the inner module; FSDP2: the wrapped model). Weights are never
    written. Call them with the model in evaluation mode: dropout would be noise in the signal.

    The projection is found by running two short rows (`find_v_projection`). Where that is not possible, as on ranks
    that hold no weights yet, give what another process `found`. `module_name` names a projection instead: its V rows
    are probed, or all its outputs where they are no value of an attention. A ValueError names candidates when none can
    be found or probed.
    """

    def __init__(self, model: nn.Module, module_name: str | None = None, found: VProjection | None = None):
        if found is None:
            found = find_v_projection(model, module_name)
        self.model, self.found, self.name = model, found, found.name
        self.module = model.get_submodule(found.name)
        self.layer = model.get_submodule(found.layer)
        self.layers = model.get_submodule(found.layer.rpartition(".")[0])  # the nn.ModuleList of all layers
        position = [*self.layers].index(self.layer)
        self.layers_behind = self.layers[position + 1 :]  # layers without attention; none in most models
        self.rows = torch.tensor(found.rows)  # [d_v] output channels of the projection
        width = found.d_in
        if adapter := self._adapter():
            lora_a, _ = adapter
            width = lora_a.weight.shape[0]  # the rank
        self.shape = (len(found.rows), width)  # of z, and of the gradient G of one example
        self.dims = math.prod(self.shape)
        self._warned = False

    def gradients(self, losses: Callable[[], Tensor], per_example: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Exact per-example gradients of the probed matrix, [n, D]: what Eq. 6 estimates.

        `losses()` runs the model on a micro-batch and returns per-example losses [1, n] (`example_losses`). Where rows
        are not examples, as in packed batches, `per_example` turns [B, T, d] into [n, L, d], zero beyond each end.

        With V_t = B a_t and a_t = scaling A x_t, the gradient of example i is G_i = sum_t delta_it a_it^T, where
        delta = dL/dV. Autograd runs from V onward only: V becomes a leaf, so no layer before it keeps anything for the
        backward pass, and that pass ends there.
        """
        taped: list[tuple[Tensor, Tensor]] = []

        def make_leaf(module, args, output):
            a = self._low_rank_input(args[0])  # [B, T, r]
            torch.set_grad_enabled(True)  # until the no_grad block below ends
            rows = self._rows_on(output.device)
            v = output.index_select(-1, rows).requires_grad_()  # [B, T, d_v]
            taped.append((a, v))
            return output.index_copy(-1, rows, v)  # the projection may be wider than V, as a fused [q k v] is

        with torch.no_grad(), self._tail_as_written(), self.module.register_forward_hook(make_leaf):
            loss = losses().sum()  # an example's loss depends on its own tokens alone: the sum keeps them apart
            self._check_runs(len(taped), 1)
            a, v = taped[0]
            (delta,) = torch.autograd.grad(loss, v)  # [B, T, d_v]   DIFFERS 5: exact, where two losses estimate it
        a, delta = a.flatten(1, -2), delta.flatten(1, -2)  # latent attention has [B, 1, T, d]
        if per_example is not None:
            a, delta = per_example(a), per_example(delta)  # [n, L, r] and [n, L, d_v]
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.einsum("nto,nti->noi", delta.to(dtype), a.to(dtype)).flatten(1)  # [n, D]

    @torch.no_grad()
    def spsa(self, losses: Callable[[], Tensor], z: Tensor, eps: float = 1e-3, wide_tail: bool = True) -> Tensor:
        """Central differences [L_i(w + eps z_k) - L_i(w - eps z_k)] / (2 eps) of every example (Eq. 5).

        `losses()` runs the model on a micro-batch and returns the losses of its n examples in all copies, [C, n]
        (`example_losses`). Returns [n, directions]; `spsa_gradients` makes gradients of them.

        `z` is [directions, d_v, r]. No weight is written: B + eps z adds eps (scaling A x) z^T to V, and so does a
        hook. `wide_tail` runs everything from the last layer on in the next wider precision (bf16 -> float32 ->
        float64): in the model's own, the difference of two nearly equal losses is mostly rounding.

        The layers before the last run once. The last layer runs once for each signed direction, and the C = 2
        directions copies of its output travel together, as C * B rows, through the final norm and the head. Some models
        can't take more rows behind the layer than before it: they reshape, or run more layers with masks of B rows.
        There the forward is repeated for each copy, and the layers before return what they returned the first time.
        """
        self._warn_once()
        wide_tail = wide_tail and self.found.wide
        shifts = torch.cat([eps * z, -eps * z])  # [C, d_v, r]
        with self._tail_as_written():
            if self.found.stackable:
                values = self._perturbed_losses(losses, shifts, wide_tail)  # [C, n]
            else:
                singly = []
                with _remembered(self.layers[: self.found.before]):
                    for shift in shifts.split(1):
                        singly.append(self._perturbed_losses(losses, shift, wide_tail))  # [1, n]
                values = torch.cat(singly)  # [C, n]
        plus, minus = values.chunk(2)  # [directions, n] each
        return (plus - minus).T / (2 * eps)  # [n, directions]

    def _perturbed_losses(self, losses: Callable[[], Tensor], shifts: Tensor, wide_tail: bool) -> Tensor:
        """L_i(w + shift) for each of `shifts` [C, d_v, r] in one forward, [C, n]."""
        layer_forward, model_forward = self.layer.forward, self.model.forward
        # what the three functions below share: the copy's perturbation, how often V ran, and what ends with the forward
        now = SimpleNamespace(shift=None, runs=0, tail=None)

        def add_perturbation(module, args, output):
            now.runs += 1
            a = self._low_rank_input(args[0])  # [B, T, r]
            change = a @ now.shift.to(a.dtype).T  # [B, T, d_v]
            return output.index_add(-1, self._rows_on(output.device), change.to(output.dtype))

        def run_layer(*args, **kwargs):
            if wide_tail:  # DIFFERS 6: from here until the forward of the model returns
                mode = now.tail.enter_context(_wider_precision((args, kwargs)))
                for module in self._gathered:
                    now.tail.enter_context(_unwidened_gathering(module, mode))
            outputs = []
            for shift in shifts:
                now.shift = shift  # for the hook on V, which the layer runs
                # every copy gets inputs of its own, wide ones in a wide tail: a layer may write into them
                own_args, own_kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
                outputs.append(layer_forward(*own_args, **own_kwargs))
            return _stacked(outputs)

        def run_model(*args, **kwargs):
            with ExitStack() as now.tail:
                return model_forward(*args, **kwargs)

        with (
            ExitStack() as now.tail,  # in case that `losses` runs only a part of the model
            self.module.register_forward_hook(add_perturbation),
            _patched_forward(self.layer, run_layer),
            _patched_forward(self.model, run_model),
        ):
            values = losses()
        self._check_runs(now.runs, len(shifts))
        return values

    @cached_property
    def _gathered(self) -> list[nn.Module]:
        """Modules whose weights FSDP2 gathers. Found when they are first needed: by then the model is wrapped."""
        return [module for module in self.model.modules() if hasattr(module, "unshard")]

    def _adapter(self) -> tuple[nn.Module, float] | None:
        """(lora_A, scaling) of the active LoRA adapter, or None."""
        has_lora = hasattr(self.module, "lora_A") and hasattr(self.module, "active_adapters")  # as PEFT writes it
        if not has_lora or self.module.disable_adapters or self.module.merged:
            return None
        for name in self.module.active_adapters:
            if name in self.module.lora_A:  # an adapter may leave this projection out
                return self.module.lora_A[name], self.module.scaling[name]
        return None

    def _low_rank_input(self, x: Tensor) -> Tensor:
        """What the probed matrix multiplies: scaling * lora_A(x) [B, T, r], or x itself [B, T, d_in]."""
        if adapter := self._adapter():
            lora_a, scaling = adapter
            return lora_a(x.to(lora_a.weight.dtype)) * scaling
        return x

    def _rows_on(self, device) -> Tensor:
        self.rows = self.rows.to(device)  # moves once
        return self.rows

    @contextmanager
    def _tail_as_written(self):
        """Run the projection's layer and those behind it uncompiled: compiled code ignores hooks that came later."""
        with ExitStack() as stack:
            for layer in (self.layer, *self.layers_behind):
                stack.enter_context(_uncompiled(layer))
            yield

    def _check_runs(self, runs: int, expected: int) -> None:
        """A projection that never ran would give zeros, and one that ran twice half of its gradient."""
        if runs != expected:
            raise RuntimeError(
                f"{self.name} ran {runs} times where {expected} were expected: this model can't be probed there, "
                "name another projection with --probe_module"
            )

    def _warn_once(self) -> None:
        if not self._warned:
            for caution in self.found.cautions:
                warnings.warn(caution, stacklevel=4)  # at the caller of `spsa`, behind no_grad's wrapper
        self._warned = True


# ------------------------------------------------------------------------------------- Adam normalisation (Eq. 3 and 4)


class AdamMoments:
    """History m, v of the big sources' gradients, and the Adam-normalised feature of one example's gradient.

    m_i = b1 m + (1 - b1) g_i,  v_i = b2 v + (1 - b2) g_i^2,  feature_i = m_hat_i / (sqrt(v_hat_i) + eps)  (Eq. 3-4).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas = tuple(betas)
        self.eps = eps
        self.m: Tensor | None = None  # [D], None until the first update: a history of zeros
        self.v: Tensor | None = None  # [D]
        self.updates = 0

    def normalize(self, g: Tensor) -> Tensor:
        """The feature of every gradient, [N, D] -> [N, D]."""
        b1, b2 = self.betas
        m, v = self._history()
        t = self.updates + 1  # DIFFERS 2: bias correction counts the updates of this history, not the global steps
        m_hat = (b1 * m + (1 - b1) * g) / (1 - b1**t)  # [N, D]
        v_hat = (b2 * v + (1 - b2) * g.square()) / (1 - b2**t)  # [N, D]
        return m_hat / (v_hat.sqrt() + self.eps)

    def update(self, g: Tensor, all_reduce: AllReduce = one_process, count: int | None = None) -> None:
        """m <- mean of m_i, v <- mean of v_i over the selected big-source gradients [M, D]; nothing when M = 0.

        When ranks hold different rows, `g` [0..M, D] are this rank's, and `count` is M. The tensors m and v are
        replaced, not written, so a shallow copy of this object keeps the history of before.
        """
        if count is None:
            count = len(g)
        if count == 0:
            return
        b1, b2 = self.betas
        mean_g = all_reduce(g.sum(0)) / count  # [D]
        mean_g_squared = all_reduce(g.square().sum(0)) / count  # [D]
        m, v = self._history()
        self.m = b1 * m + (1 - b1) * mean_g  # the mean of m_i: the history m is common to all of them
        self.v = b2 * v + (1 - b2) * mean_g_squared
        self.updates += 1

    def _history(self) -> tuple[Tensor | float, Tensor | float]:
        """m and v [D], or 0 before the first update: how many numbers a gradient has is not known before it."""
        if self.m is None:
            return 0.0, 0.0
        return self.m, self.v

    def state_dict(self) -> dict:
        """The history, for a checkpoint; betas and eps are the caller's."""
        return {"m": self.m, "v": self.v, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.m, self.v, self.updates = state["m"], state["v"], state["updates"]


# --------------------------------------------------------------------------------------------- sparsification (Table 4)


def sparsify(x: Tensor, h: int, all_reduce: AllReduce = one_process) -> Tensor:
    """Keep the h coordinates with the largest |mean over rows|, [n, D] -> [n, min(h, D)] (4.2, Table 4).

    `x` are the features of one source; when ranks hold different rows of it, `all_reduce` adds up their sums. A row
    that is not finite counts for nothing in the mean, and is not finite afterwards either.
    """
    if h >= x.shape[1]:
        return x
    broken = ~x.isfinite().all(1, keepdim=True)  # [n, 1]
    sums = all_reduce(x.masked_fill(broken, 0).sum(0))  # DIFFERS 3: one row that is not finite spoils no other
    magnitude = sums.abs()  # [D]; in the same order as those of the mean

    # DIFFERS 8: magnitudes within 1/4096 of the largest are ties, and ties go to the lowest coordinate. Without a
    # history all features are +-1 and their sums small whole numbers, so most coordinates tie; then rounding, and with
    # it the number of ranks, would choose. 4096 steps lie far above rounding and tell apart the sums of 4096 such rows.
    steps = (magnitude * (4096 / magnitude.max().clamp_min(1e-30))).round().short()  # [D]
    # A stable sort leaves ties in the order of their coordinates; `topk` leaves open which of two it takes.
    coordinates = steps.sort(descending=True, stable=True).indices[:h]  # [h]
    return x[:, coordinates].masked_fill(broken, math.nan)


# ------------------------------------------------------------------------------------------------- medoids (4.2, Eq. 8)


NORM = {"l1": 1.0, "l2": 2.0}  # the p of each metric's distance (sum |x - y|^p)^(1/p)


def pairwise_similarity(x: Tensor, metric: str = "l1") -> Tensor:
    """Similarity of every pair of rows, [N, H] -> [N, N]: largest distance - distance, or the cosine.

    L1 between sparsified, Adam-normalised gradients is the paper's metric (Eq. 8); l2 and cosine are options.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would make ties of most distances
    if metric == "cosine":
        x = F.normalize(x, dim=1)
        return x @ x.T
    if metric not in NORM:
        raise ValueError(f"metric {metric!r} is unknown: use l1, l2 or cosine")
    # by differences: the shortcut through |x|^2 + |y|^2 - 2 xy loses small distances between large rows
    distance = torch.cdist(x, x, p=NORM[metric], compute_mode="donot_use_mm_for_euclid_dist")
    if distance.numel() == 0:  # no rows have no largest distance
        return distance
    return distance.max() - distance


# Gains of two candidates that differ by less than this share of N x the rows' size are ties. Rounding in float32
# moves a sum of N distances by some 2^-21 of it, and another GPU or number of ranks by as much; 2^-18 lies a few times
# above that, and far below any difference that means something.
TIE = 2.0**-18


def facility_location(similarity: Tensor, k: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy maximiser of sum_i max_{s in S} similarity[i, s] over |S| = k (Eq. 8), in float64 on its own device.

    Returns `index` [k] in the order of picking and `weight` [k], how many of the N rows each medoid serves best (an
    earlier medoid wins a tie, and every medoid serves itself). A row that none serves counts 0, as in the official
    code. `scale` is the size of what was rounded when the similarities were computed, by default the largest of them.
    ValueError if k is not in 0..N, or a similarity is not finite: no gain would be largest, and one row picked k times.
    """
    n = len(similarity)
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} medoids of {n} rows: k must lie in 0..{n}")
    similarity = similarity.detach().double()
    if not similarity.isfinite().all():
        raise ValueError("a similarity is not finite: leave the rows that make it so out, as `select_coreset` does")
    if k == 0:
        none = torch.zeros(0, dtype=torch.long, device=similarity.device)
        return none, none
    if scale is None:
        scale = similarity.abs().max()
    tie = TIE * n * scale.to(similarity)

    best = similarity.new_zeros(n)  # [N] how well each row is served so far
    picked = torch.zeros_like(best, dtype=torch.bool)  # [N]
    index = []
    for _ in range(k):  # every step adds the row that raises the objective most
        gain = (similarity - best[:, None]).clamp_(min=0).sum(0)  # [N] what each candidate would add
        gain.masked_fill_(picked, -math.inf)
        # DIFFERS 7: ties go to the lowest index. They are the rule: one SPSA direction puts all rows on a line, where
        # every row between the two medians serves equally well, and rounding must not decide between them.
        medoid = (gain >= gain.max() - tie).int().argmax()  # the first True
        index.append(medoid)
        picked[medoid] = True
        best = torch.maximum(best, similarity[:, medoid])
    index = torch.stack(index)  # [k]

    served = similarity[:, index]  # [N, k]
    served[index, torch.arange(k, device=index.device)] = math.inf  # a medoid serves itself, also where copies exist
    nearest = served.max(1, keepdim=True).values  # [N, 1]
    owner = (served >= nearest - TIE * scale.to(similarity)).int().argmax(1)  # [N] the earliest of those that tie
    return index, torch.bincount(owner, minlength=k)  # [k] each


# -------------------------------------------------------------------------------------------- the coreset (Algorithm 1)


class Coreset(NamedTuple):
    """`index` [K] of pool rows, kept rows first, and `weight` [K]: how many pool rows each one stands for."""

    index: Tensor
    weight: Tensor


def select_coreset(
    features: Tensor,
    sources: Tensor,
    k: int,
    keep: Collection = (),
    h: int = 2560,
    metric: str = "l1",
    generator: torch.Generator | None = None,
) -> Coreset:
    """Coreset of a pool: every row of the sources in `keep`, then medoids of each other source (Algorithm 1).

    `features` is [N, D] (rows of kept sources may hold anything), `sources` [N] integers, `keep` the small ones.
    `generator` draws what the paper leaves open. The coreset has K rows, or all usable ones when those are fewer.
    """
    if not 0 < k <= len(sources):
        raise ValueError(
            f"k = {k} of a pool of {len(sources)}: k must lie in 1..{len(sources)}; a loader's last batch may be short"
        )
    sources = sources.cpu()

    # every example of a small source (4.1)
    is_kept = torch.isin(sources, torch.tensor(sorted(keep), dtype=sources.dtype))  # [N]
    kept = is_kept.nonzero()[:, 0]
    if len(kept) >= k:  # DIFFERS 4: small sources alone exceed K: a uniform draw of their rows
        drawn = torch.randperm(len(kept), generator=generator)[:k]
        kept = kept[drawn.sort().values]
        return Coreset(kept, torch.ones_like(kept))

    # budgets of the big sources, by their rows in the pool (4.1)
    usable = ~is_kept & features.isfinite().all(1).cpu()  # DIFFERS 3: a row that is not finite is no candidate
    big_sources, counts = sources[usable].unique(return_counts=True)  # [S] each
    budgets = allocate_budget(counts, k - len(kept), generator)

    # medoids of each big source within its budget (4.2)
    index, weight = [kept], [torch.ones_like(kept)]  # a kept row stands for itself
    for source, budget in zip(big_sources, budgets.tolist(), strict=True):
        rows = (usable & (sources == source)).nonzero()[:, 0]  # [n]
        x = sparsify(features[rows.to(features.device)], h)  # [n, h]
        similarity = pairwise_similarity(x, metric)  # [n, n]
        if metric == "cosine":
            scale = similarity.abs().max()
        else:  # distances are differences of rows, and as inexact as the largest row
            scale = torch.linalg.vector_norm(x, ord=NORM[metric], dim=1).max()
        if len(rows) <= 256:  # the greedy loop is a hundred tiny operations: starting them on a GPU takes longer
            similarity = similarity.cpu()
        medoids, sizes = facility_location(similarity, budget, scale)
        index.append(rows[medoids.cpu()])
        weight.append(sizes.cpu())
    return Coreset(torch.cat(index), torch.cat(weight))


# --------------------------------------- a random draw that passes over copies: not the paper's (benchmarks/RESULTS.md)


class Bags(NamedTuple):
    """The rows of a data set as bags of tokens: row i has the entries offsets[i]..offsets[i + 1]."""

    tokens: Tensor  # [entries] the different tokens of each row
    weights: Tensor  # [entries] a row's have norm 1, or are all 0
    offsets: Tensor  # [rows + 1]
    vocabulary: int  # above every token

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and weights [e] of `rows` [n] end to end, and how many are of each, [n]."""
        sizes = self.offsets.diff()[rows]
        starts = sizes.cumsum(0) - sizes  # [n] where each row begins in what is returned
        # a row's entries lie as far apart here as there: one distance for each row leads from a place to its entry
        distance = (self.offsets[rows] - starts).repeat_interleave(sizes)  # [e]
        entry = torch.arange(len(distance)) + distance  # [e]
        return self.tokens[entry], self.weights[entry], sizes


def tf_idf(ids: Tensor, offsets: Tensor) -> Bags:
    """Bags of all rows. A token weighs how often it is in the row, times log(rows / rows that have it).

    `ids` [T] are the tokens of all rows end to end, integers, and row i is ids[offsets[i]:offsets[i + 1]].
    """
    rows, vocabulary = len(offsets) - 1, int(ids.max()) + 1
    tokens, counts, sizes = [], [], []
    for first in range(0, rows, 1024):  # few rows at a time: sorting is fast while it fits in the cache
        edges = offsets[first : first + 1025]
        row = torch.arange(len(edges) - 1).repeat_interleave(edges.diff())  # the row of each token
        # one number for a row and a token; the different ones come out ordered by row
        pair, count = (row * vocabulary + ids[edges[0] : edges[-1]]).unique(return_counts=True)
        tokens.append((pair % vocabulary).int())
        counts.append(count.float())
        sizes.append(torch.bincount(pair // vocabulary, minlength=len(edges) - 1))
    tokens, counts, sizes = torch.cat(tokens), torch.cat(counts), torch.cat(sizes)
    rows_with = torch.bincount(tokens, minlength=vocabulary)  # [vocabulary]
    weights = counts * (rows / rows_with).log()[tokens]  # [entries] float32
    row = torch.arange(rows, dtype=torch.int32).repeat_interleave(sizes)  # [entries], half the memory of int64
    norms = torch.zeros(rows).index_add_(0, row, weights.square()).sqrt()
    return Bags(tokens, weights / norms.clamp_min(1e-30)[row], F.pad(sizes.cumsum(0), (1, 0)), vocabulary)


def cosines(bags: Bags, rows: Tensor, others: Tensor) -> Tensor:
    """Cosine of the bag of each of `rows` [n] with that of each of `others` [m], [n, m]."""
    tokens, weights, sizes = bags.of(rows)
    known, line = tokens.unique(return_inverse=True)  # the table has a line for each token of `rows` alone
    table = torch.zeros(len(known) + 1, len(rows))  # and a last one of zeros for all other tokens
    table[line, torch.arange(len(rows)).repeat_interleave(sizes)] = weights
    line_of = torch.full((bags.vocabulary,), len(known))
    line_of[known] = torch.arange(len(known))
    tokens, weights, sizes = bags.of(others)
    starts = sizes.cumsum(0) - sizes
    # each of `others` adds up its tokens' lines: a sparse product, in the same order on any number of threads
    return F.embedding_bag(line_of[tokens], table, starts, mode="sum", per_sample_weights=weights).T


def fresh_first(order: Tensor, sources: Tensor, k: int, seen: Tensor, alike: Tensor) -> Tensor:
    """Positions [k] in a pool: of each source as many as the first k of `order` have, unseen rows before seen ones.

    `order` [N] are all positions in a random order, `sources` [N] integers. A row is seen if it resembles one taken in
    an earlier step (`seen` [N] bool) or one already taken in this step (`alike` [N, N] bool, which rows resemble each
    other). Where no row is seen, the result is the first k of `order`. ValueError if k is not in 0..N.
    """
    if not 0 <= k <= len(order):
        raise ValueError(f"k = {k} of a pool of {len(order)}: k must lie in 0..{len(order)}")
    _, sources = sources.unique(return_inverse=True)  # numbered from 0, as `bincount` needs
    room = torch.bincount(sources[order[:k]], minlength=len(sources))  # rows yet to be taken of each source
    seen, taken = seen.clone(), torch.zeros_like(seen)
    for also_seen in (False, True):  # rows that were seen fill what room is left
        for i in order.tolist():
            if room[sources[i]] and not taken[i] and (also_seen or not seen[i]):
                taken[i] = True
                room[sources[i]] -= 1
                seen |= alike[i]
    return order[taken[order]]


# ----------------------------------------------------------------------------------- sources where there are none (5.4)


def k_means(
    x: Tensor,
    rows: Tensor,
    total: int,
    clusters: int,
    generator: torch.Generator,
    all_reduce: AllReduce = one_process,
    iterations: int = 50,
) -> Tensor:
    """Cluster of every row, [total], by Lloyd's iterations from a k-means++ start; clusters stand in for sources (5.4).

    This rank holds `x` [n, d], the `rows` [n] of a data set of `total` rows. An empty cluster takes the row that lies
    farthest from its own centre. A row that is not finite counts as one at the mean of all. `generator` is on the CPU
    and alike on all ranks. ValueError if `clusters` is not in 1..total.
    """
    if not 1 <= clusters <= total:
        raise ValueError(f"{clusters} clusters of {total} rows: clusters must lie in 1..{total}")

    def of_all_rows(values: Tensor) -> Tensor:
        """[n, ...] of this rank -> [total, ...] of all."""
        return all_reduce(values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values))

    def row(number) -> Tensor:
        """One row of the data set, whoever holds it, [d]."""
        return all_reduce(x[rows == number].sum(0))

    def distances() -> Tensor:
        """Of this rank's rows from the present centres, [n, clusters]."""
        return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")

    broken = ~x.isfinite().all(1, keepdim=True)  # [n, 1]
    x = x.masked_fill(broken, 0)  # one row that is not finite spoils no centre
    common = all_reduce(x.sum(0)) / total  # [d]; hidden states have a large part in common, which would cost precision
    x = (x - common).masked_fill(broken, 0)

    # k-means++: each further centre is a row, drawn with probability proportional to the square of its distance from
    # the nearest centre so far
    first = torch.randint(total, (), generator=generator).item()
    centres = row(first)[None]
    while len(centres) < clusters:
        squared = of_all_rows(distances().amin(1)).double().cpu().square()  # [total]
        if squared.sum() == 0:  # fewer different rows than clusters
            squared = torch.ones_like(squared)
        drawn = torch.multinomial(squared, 1, generator=generator).item()
        centres = torch.cat([centres, row(drawn)[None]])

    # Lloyd: every row to its nearest centre, every centre to the mean of its rows, until no row moves
    owner = torch.full_like(rows, -1)  # [n] the cluster of each of this rank's rows
    for _ in range(iterations):
        before = owner
        distance, owner = distances().min(1)  # [n] each
        if not all_reduce((owner != before).sum()):
            break
        member = F.one_hot(owner, clusters).to(x)  # [n, clusters]; a product adds up in the same order each time
        counts = all_reduce(member.sum(0))
        centres = all_reduce(member.T @ x) / counts.clamp_min(1)[:, None]
        # an empty cluster starts again at the row that its own centre serves worst
        farthest_first = of_all_rows(distance).argsort(descending=True, stable=True).tolist()
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            centres[empty] = row(farthest_first.pop(0))
    return of_all_rows(owner)


# --------------------------------------------------------------------------------------- finding V by running the model


class VProjection(NamedTuple):
    """Where a model's last V projection is and what it can be used for, as `find_v_projection` learned.

    A plain value: one process can learn it before the weights are sharded, and send it to all others.
    """

    name: str  # of the linear projection, as in model.named_modules()
    layer: str  # of the decoder layer around it
    rows: tuple[int, ...]  # its output channels that are V, d_v of them
    d_in: int  # its input width
    before: int  # so many layers, from the first on, need not run again for another perturbed copy
    stackable: bool = True  # perturbed copies can travel together behind the layer
    wide: bool = True  # what follows the projection runs in the next wider precision
    cautions: tuple[str, ...] = ()  # what makes SPSA doubtful on this model; the exact probe is not concerned


class Unprobed(Exception):
    """Why a projection can't be found or probed."""


TRIAL_ROWS, TRIAL_TOKENS = 2, 11  # with one row, B rows and C copies of one could not be told apart


def find_v_projection(model: nn.Module, module_name: str | None = None) -> VProjection:
    """Run two short rows and see which output channels of which linear projection become the value of attention.

    Names and layouts differ without end (fused [q k v], [q v k] in blocks, per head, per group, latent), so none is
    looked up. In one forward the output of every linear projection is cut off from what made it and becomes a leaf of
    autograd. The last attention whose *value* depends on a leaf has found V: its rows are the channels with a gradient,
    whatever was done to them on the way (split, repeated, normalised). Projections that never run, as those of
    cross-attention without an encoder, and layers without attention drop out by themselves.

    Channels that reach the query or the key too are refused, and so is a model without any softmax attention, unless
    `module_name` names the projection. More runs then try both probes: `_try_both_probes`.
    """
    projections = _linear_projections(model)
    named = projections
    if module_name is not None:
        matches = []
        for name, module in model.named_modules():
            if name == module_name or name.endswith("." + module_name):
                matches.append(module)
        named = projections.intersection(matches)
        if not matches:
            raise ValueError(_candidates(model, f"no module is named {module_name}"))
        if not named:
            kind = type(matches[-1]).__name__
            raise ValueError(_candidates(model, f"{module_name} is a {kind}, no projection of the model's own"))
    try:
        with _trial(model) as batch:
            ran = _run_with_leaves(model, batch, projections)
            module, rows = _choose_projection(ran, named, whole=module_name is not None)
            found = _describe(model, ran, module, rows)
            return _try_both_probes(model, found, batch)
    except Unprobed as problem:
        raise ValueError(_candidates(model, str(problem))) from None
    except Exception as error:  # of the model: it wants images, another package, a longer row
        problem = f"a forward of {TRIAL_ROWS} short rows fails with {type(error).__name__}: {_first_line(error)}"
        raise ValueError(_candidates(model, problem)) from error


def _describe(model: nn.Module, ran: _Ran, module: nn.Module, rows: list[int]) -> VProjection:
    """The projection and its layer by name, after checking that a hook on it sees every token once."""
    modules = dict(model.named_modules())
    name = next(name for name, m in modules.items() if m is module)
    if ran.calls[module] != 1:
        raise Unprobed(f"{name} runs {ran.calls[module]} times in one forward")
    shape = ran.inputs[module]
    if shape[0] != TRIAL_ROWS or math.prod(shape[1:-1]) != max(shape[1:-1], default=0):
        raise Unprobed(f"{name} gets an input of {tuple(shape)} where [rows, tokens, width] is expected")
    layer = _enclosing_layer(name, modules)
    layers = modules[layer.rpartition(".")[0]]
    before = [*layers].index(modules[layer])
    if any(ran.calls[earlier] > 1 for earlier in layers[:before]):
        before = 0  # what a layer returned in one round of a loop must not be taken for another round's
    return VProjection(name, layer, tuple(rows), shape[-1], before)


def has_packed_weights(module: nn.Module) -> bool:
    """Is it a linear layer as those of GPTQ and AWQ, whose `weight`, where they have one, is no tensor?"""
    has_matrix = isinstance(getattr(module, "weight", None), Tensor)
    return isinstance(getattr(module, "in_features", None), int) and not has_matrix


def _linear_projections(model: nn.Module) -> set[nn.Module]:
    """Modules with a weight matrix, PEFT's wrappers in place of what they wrap."""
    projections, inside = set(), set()
    for module in model.modules():
        layer = getattr(module, "base_layer", module)
        weight = getattr(layer, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
        if is_matrix or has_packed_weights(layer):
            projections.add(module)
        if hasattr(module, "base_layer"):
            inside.update(child for child in module.modules() if child is not module)
    return projections - inside


def _enclosing_layer(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The member of the outermost nn.ModuleList on the way to module `name`: experts have lists of their own."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:end])], nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise Unprobed(f"{name} lies in no nn.ModuleList of decoder layers")


def _candidates(model: nn.Module, problem: str) -> str:
    projections = _linear_projections(model)
    names = []
    for name, module in model.named_modules():
        if module in projections and any(map(str.isdigit, name.split("."))):  # a number: inside a list of layers
            names.append(name)
    last = ", ".join(names[-12:])
    return f"can't find the last V projection ({problem}): name one with --probe_module, such as {last}"


@contextmanager
def _trial(model: nn.Module):
    """Evaluation mode for a few forwards of a batch as `example_losses` takes it, which the block gets."""
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings().weight
    first = 5  # ids before it are special tokens in most vocabularies
    ids = torch.arange(first, first + TRIAL_ROWS * TRIAL_TOKENS, device=embedding.device) % len(embedding)
    ids = ids.view(TRIAL_ROWS, TRIAL_TOKENS)
    model.eval().requires_grad_(False)  # only what depends on a leaf needs a gradient then
    # a base in half precision with adapters in float32 runs under autocast, and the caller may not have entered it yet
    half = [p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        with torch.autocast(ids.device.type, half[0]) if half else nullcontext():
            yield {"input_ids": ids, "labels": ids}
    finally:
        for module in training:
            module.training = True
        for p in trained:
            p.requires_grad_()


class _Attention(NamedTuple):
    """The tensors of one attention call."""

    value: Tensor
    others: tuple[Tensor, ...]  # query and key, or the probabilities made of them


class _Ran(NamedTuple):
    """What one forward showed."""

    attentions: list[_Attention]
    leaves: dict[nn.Module, Tensor]  # output of each projection, in the order of running
    inputs: dict[nn.Module, torch.Size]  # input shape of each projection
    calls: dict[nn.Module, int]  # how often each module ran


def _run_with_leaves(model: nn.Module, batch: Mapping[str, Tensor], projections: set[nn.Module]) -> _Ran:
    ran = _Ran([], {}, {}, {module: 0 for module in model.modules()})

    def observe(module, args, output):
        ran.calls[module] += 1
        if module not in projections or not isinstance(output, Tensor) or not args:
            return None
        ran.leaves[module] = leaf = output.detach().requires_grad_()
        ran.inputs[module] = args[0].shape
        return leaf.clone()  # models add to a projection's output in place, which a leaf does not allow

    with torch.enable_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_uncompiled(module))
            stack.callback(module.register_forward_hook(observe).remove)
        with _AttentionWatch(ran.attentions):
            model(input_ids=batch["input_ids"], use_cache=False)
    return ran


class _AttentionWatch(TorchFunctionMode):
    """Notes the value of every attention: that of `scaled_dot_product_attention`, or what a softmax is multiplied with.

    Attention written out reads matmul(softmax(q k^T), v), with dropout, casts and slices between the two. Experts use a
    softmax, too; that of attention is square over the tokens.
    """

    PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")
    KEEP_PROBABILITIES = (
        *("dropout", "to", "type_as", "type", "float", "half", "bfloat16", "contiguous", "clone", "nan_to_num"),
        *("__getitem__", "view", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "expand", "flatten"),
        *("masked_fill", "mul", "__mul__", "where"),
    )

    def __init__(self, attentions: list[_Attention]):
        super().__init__()
        self.attentions = attentions
        self.probabilities: dict[int, Tensor] = {}  # by id; kept alive, or another tensor could get the same id

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            named = [kwargs[key] for key in ("query", "key", "value") if key in kwargs]
            query, key, value = [*args[:3], *named]
            self.attentions.append(_Attention(value, (query, key)))
        elif name in self.PRODUCTS:
            self._note_product(_tensors(args))
        elif name == "softmax" or (name in self.KEEP_PROBABILITIES and any(map(self._is_probability, args))):
            self.probabilities[id(out)] = out
        return out

    def _is_probability(self, x) -> bool:
        return id(x) in self.probabilities

    def _note_product(self, factors: list[Tensor]) -> None:
        if len(factors) != 2:
            return
        for weights, value in (factors, factors[::-1]):
            if self._is_probability(weights) and weights.shape[-1] == weights.shape[-2] >= TRIAL_TOKENS:
                self.attentions.append(_Attention(value, (weights,)))
                return


def _choose_projection(ran: _Ran, named: set[nn.Module], whole: bool) -> tuple[nn.Module, list[int]]:
    """The one among `named` whose channels become the value of the last attention, and these channels.

    Where none does, or only channels that are query or key as well, all channels of the last that ran if `whole`.
    """
    modules = [module for module in ran.leaves if module in named]  # in the order of running
    modules.sort(key=lambda module: ran.calls[module] == 1)  # a stable sort: those that run once come last
    leaves = [ran.leaves[module] for module in modules]
    problem = f"none of {len(modules)} projections becomes the value of a softmax attention"
    for attention in reversed(ran.attentions):
        in_value = _channels_reaching((attention.value,), leaves)
        if not any(channels.any() for channels in in_value):
            continue  # its value comes from no projection, or from none that was named
        in_others = _channels_reaching(attention.others, leaves)
        for module, value, others in reversed([*zip(modules, in_value, in_others, strict=True)]):
            if value.any() and not (value & others).any():
                return module, value.nonzero()[:, 0].tolist()
        problem = "the channels that become the value of the last attention become its query or key, too"
        break
    if not modules:
        raise Unprobed("what was named does not run in a forward of text alone")
    if not whole:
        raise Unprobed(problem)
    return modules[-1], [*range(leaves[-1].shape[-1])]


def _channels_reaching(tensors: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Which last-dimension channels of each leaf the tensors depend on, bool [d_out] each."""
    reached = [torch.zeros(leaf.shape[-1], dtype=torch.bool, device=leaf.device) for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    for x in tensors:
        if not x.requires_grad:
            continue
        # a random weighted sum: that the contributions of a channel cancel has probability 0
        weights = torch.randn(x.shape, generator=generator).to(x)  # our own generator: training must not notice
        gradients = torch.autograd.grad(x, leaves, weights, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                reached[i] |= (gradient != 0).flatten(0, -2).any(0)
    return reached


TOO_FAR = 0.1  # half precision moves the exact derivative by up to 0.05
CLOSE = 0.01  # float32's differences depart by 1e-4 to 1e-3, those of half precision by 0.1 and more
FLIPS = (
    "V reaches a top-k choice (of experts): a perturbation flips choices, and SPSA's differences measure these jumps "
    "more than the derivative: use --probe grad"
)
NARROW = (
    "SPSA's perturbed part can't run in a wider precision on this model ({problem}), and in the model's own the "
    "difference of nearly equal losses is mostly rounding: use --probe grad"
)
FAILS = "SPSA fails on this model ({problem}): use --probe grad"
DEPARTS = "on two short rows SPSA departs {share:.0%} from the exact derivative on this model: use --probe grad"


def _try_both_probes(model: nn.Module, found: VProjection, batch: Mapping[str, Tensor]) -> VProjection:
    """`found` with what the two probes can do on this model: `before`, `stackable`, `wide` and `cautions`."""
    layers = model.get_submodule(found.layer.rpartition(".")[0])

    def losses() -> Tensor:
        return example_losses(model, batch)

    with _remembered(layers[: found.before]):  # the layers before run once for all that follows
        probe = VProjectionProbe(model, found=found)
        with _ChoiceWatch() as choices:
            gradients = probe.gradients(losses)  # [B, D]
        z = torch.randn(1, *probe.shape, generator=torch.Generator().manual_seed(0)).to(gradients)

        def spsa(**changes) -> Tensor:
            return VProjectionProbe(model, found=found._replace(**changes)).spsa(losses, z)[:, 0]  # [B]

        # one copy at a time asks least of a model: it is the measure for copies that travel together
        wide, cautions = True, []
        singly, problem = _attempt(spsa, stackable=False)
        if singly is None:
            wide, cautions = False, [NARROW.format(problem=problem)]
            singly, problem = _attempt(spsa, stackable=False, wide=False)
        together, _ = _attempt(spsa, stackable=True, wide=wide)

    departs = math.inf
    if singly is not None:  # relative to the gradients' size: <G, z> itself may happen to be small
        departs = float((singly - gradients @ z.flatten()).norm() / gradients.norm())
    if found.before and (singly is None or (departs > TOO_FAR and not choices.depend_on_v)):
        # layers hand something to later ones beside their output (Gemma 3n: keys and values): run all of them each time
        return _try_both_probes(model, found._replace(before=0), batch)
    if singly is None:
        return found._replace(cautions=(FAILS.format(problem=problem),))
    if not wide and departs < CLOSE:
        cautions = []  # in float32, where a kernel knows no float64, the differences say enough
    if choices.depend_on_v:
        cautions.append(FLIPS)
    elif wide and departs > TOO_FAR:
        cautions.append(DEPARTS.format(share=departs))
    stackable = together is not None and torch.allclose(together, singly, rtol=1e-2, atol=1e-6, equal_nan=True)
    return found._replace(stackable=stackable, wide=wide, cautions=tuple(cautions))


def _attempt(spsa: Callable[..., Tensor], **changes) -> tuple[Tensor | None, str]:
    """What `spsa` returns, or None and what it raised: kernels and reshapes fail with errors of every type."""
    try:
        return spsa(**changes), ""
    except Exception as error:
        return None, _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


class _ChoiceWatch(TorchFunctionMode):
    """Whether a discrete choice depends on V: autograd runs from V onward, so that its input then needs a gradient."""

    depend_on_v = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        chooses = getattr(func, "__name__", "") in ("topk", "argmax")
        if chooses and isinstance(args[0], Tensor) and args[0].requires_grad:
            self.depend_on_v = True
        return func(*args, **(kwargs or {}))


# -------------------------------------------------------------------- running part of a model again, in wider precision


@contextmanager
def _wider_precision(inputs):
    """Compute in the next wider precision until the block ends; yields the mode that sees to it.

    The next wider one is that after autocast's, or after that of the first floating tensor in `inputs`.
    """
    floating = [x for x in _tensors(inputs) if x.is_floating_point()]
    kind, dtype = floating[0].device.type, floating[0].dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
    mode = _Wider(dtype)
    with torch.autocast(kind, enabled=False), mode:
        yield mode


@contextmanager
def _unwidened_gathering(module: nn.Module, mode: _Wider):
    """Keep `mode` out of FSDP's hooks around the forward of `module`, and FSDP's casts out of the wide tail.

    In these hooks FSDP gathers weights, which the mode would widen for good, and casts inputs to the precision of the
    weights, which would undo the mode.
    """

    def suspended(hook: Callable) -> Callable:
        def run(*args):
            mode.suspended = True
            try:
                return hook(*args)
            finally:
                mode.suspended = False

        return run

    def with_inputs_kept(hook: Callable) -> Callable:
        def run(module, args, kwargs):
            hook(module, args, kwargs)
            return args, kwargs

        return run

    replaced = []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                continue
            replaced.append((hooks, key, hook))
            hooks[key] = suspended(hook)
            if hooks is module._forward_pre_hooks:
                hooks[key] = with_inputs_kept(hooks[key])
    try:
        yield
    finally:
        for hooks, key, hook in replaced:
            hooks[key] = hook


class _Wider(TorchFunctionMode):
    """Every operation gets its floating inputs in `dtype`: weights, buffers, masks, biases, whoever owns them.

    Modules cast to float32 (norms, softmax), to a weight's dtype or to that of their input. Here all of these mean
    `dtype`: where a narrower precision is asked for, it is given instead.
    """

    IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.suspended = False

    def is_narrow(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize

    def widened(self, x):
        if isinstance(x, Tensor) and self.is_narrow(x.dtype):
            return x.to(self.dtype)
        if isinstance(x, torch.dtype) and self.is_narrow(x):
            return self.dtype
        if type(x) in (tuple, list):
            return type(x)(map(self.widened, x))
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.suspended or "out" in kwargs:
            return func(*args, **kwargs)
        # 4-bit weights of bitsandbytes: their bits may be stored as if they were bf16 numbers, and stay as they are.
        packed = any(type(x).__name__ == "Params4bit" for x in args)
        if packed or getattr(func, "namespace", "") == "bitsandbytes":
            if self.dtype == torch.float64:
                raise TypeError("no kernel multiplies 4-bit weights in float64")
            return func(*args, **kwargs)  # activations are wide already
        if name == "__get__":  # an attribute: only x.dtype matters, and nothing need be copied for it
            value = func(*args)
            return self.widened(value) if func == Tensor.dtype.__get__ else value
        if name in ("float", "half", "bfloat16"):
            return args[0].to(self.dtype)
        if name in self.IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            # the target must stay the tensor that it is, and takes values of its own precision
            target, *rest = args
            rest = [self._like(target, x) for x in rest]
            return func(target, *rest, **kwargs)
        kwargs = {key: self.widened(value) for key, value in kwargs.items()}
        if name == "full":
            kwargs.setdefault("dtype", self.dtype)  # the least float64 does not fit in the default float32
        if name in ("grouped_mm", "_grouped_mm"):
            func = _grouped_product  # experts: the kernel has no float64, and on some devices no float32
        return self.widened(func(*map(self.widened, args), **kwargs))

    def _like(self, target: Tensor, x):
        if isinstance(x, Tensor) and x.is_floating_point() and target.is_floating_point():
            return x.to(target.dtype)
        return x


def _grouped_product(x: Tensor, weights: Tensor, offs: Tensor, **_) -> Tensor:
    """Rows offs[e - 1]..offs[e] of x [S, d_in] times weights[e] [d_in, d_out], zero beyond the last."""
    out = x.new_zeros(len(x), weights.shape[-1])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        out[start:end] = x[start:end] @ weights[expert].to(x.dtype)
        start = end
    return out


@contextmanager
def _remembered(layers):
    """These layers run once; in every later forward they return what they returned then."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_patched_forward(layer, _first_result(layer.forward)))
            stack.enter_context(_uncompiled(layer))
        yield


def _first_result(forward: Callable) -> Callable:
    results: list = []

    def run(*args, **kwargs):
        if not results:
            results.append(forward(*args, **kwargs))
        return tree_map_only(Tensor, Tensor.clone, results[0])  # the layers behind may write into it

    return run


def _stacked(outputs: list):
    """Hidden states of all copies [C * B, T, d], with what else the last copy's layer returned."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    hidden = torch.cat([out[0] for out in outputs])
    return (hidden, *outputs[-1][1:])


def _tensors(x) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


@contextmanager
def _uncompiled(module: nn.Module):
    """Run a module that `module.compile()` compiled as it is written: compiled code ignores hooks that came later."""
    compiled = vars(module).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            module._compiled_call_impl = compiled


@contextmanager
def _patched_forward(module: nn.Module, forward: Callable):
    """Run `forward` in place of the module's own; its hooks (FSDP's among them) still run around it."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
