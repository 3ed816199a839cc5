"""CoLM in plain PyTorch: mini-batch coresets for fine-tuning language models on data mixtures.

Every formula of Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures"
(ICLR 2025, arXiv 2407.19580v4), in the order of the algorithm and under its section or equation. The file needs torch
alone: copy it into your own repository. `train_colm.py` is the complete trainer; a step in your own loop reads

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

Symbols: N pool size, K coreset size, B rows and T tokens of a micro-batch, D probed numbers (V rows x LoRA rank), h
kept coordinates, S sources, C copies of a batch. A comment `DIFFERS n` stands on a line that departs from the paper or
its official code; the README gives the reason under the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

AllReduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all ranks, on every rank


def one_process(tensor: Tensor) -> Tensor:
    """The all-reduce of a single process."""
    return tensor


# -------------------------------------------------------------------------------------------- sources and budgets (4.1)


def small_sources(counts: Mapping[Hashable, int]) -> set:
    """Sources with fewer than |V| / c training examples (below the mean size): all their examples are kept (4.1)."""
    total = sum(counts.values())
    return {source for source, count in counts.items() if count * len(counts) < total}


def allocate_budget(counts: Tensor, budget: int, generator: torch.Generator | None = None) -> Tensor:
    """Share `budget` over sources in proportion to their pool `counts` [S]; sums to min(budget, counts.sum()) (4.1).

    b_q = (K - |S_s|) |V_q| / (N - |S_s|), with `budget` = K - |S_s| and the counts those of the big sources.

    The shares are rounded down, and what is left goes out one by one to the smallest shares, as in the official code.
    Where shares tie, `generator` (the global one if None) decides who gets it. An order by position would starve the
    sources that stand late in a file: of 280 sources with one row each, the last third was never trained on.
    """
    counts = counts.long()
    total = int(counts.sum())
    if budget < 0:
        raise ValueError(f"budget {budget} is negative: it must be 0 or more")
    if budget >= total:
        return counts.clone()
    shares = counts * budget // total  # [S]; every share lies below its count, since budget < total
    left = budget - int(shares.sum())  # below S
    shuffled = torch.randperm(len(counts), generator=generator).to(counts.device)
    open_to_more = torch.where(shares < counts, shares, total)  # DIFFERS 1: no budget exceeds its source's count
    smallest_first = shuffled[open_to_more[shuffled].argsort(stable=True)]  # DIFFERS 1: ties are drawn
    shares[smallest_first[:left]] += 1
    return shares


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
        m, v = (0.0, 0.0) if self.m is None else (self.m, self.v)
        t = self.updates + 1  # DIFFERS 2: bias correction counts the updates of this history, not the global steps
        m_hat = (b1 * m + (1 - b1) * g) / (1 - b1**t)  # [N, D]
        v_hat = (b2 * v + (1 - b2) * g.square()) / (1 - b2**t)  # [N, D]
        return m_hat / (v_hat.sqrt() + self.eps)

    def update(self, g: Tensor, all_reduce: AllReduce = one_process, count: int | None = None) -> None:
        """m <- mean of m_i, v <- mean of v_i over the selected big-source gradients [M, D]; nothing when M = 0.

        When ranks hold different rows, `g` [0..M, D] are this rank's, and `count` is M. The tensors m and v are
        replaced, not written, so a shallow copy of this object keeps the history of before.
        """
        count = len(g) if count is None else count
        if count == 0:
            return
        b1, b2 = self.betas
        mean_g = all_reduce(g.sum(0)) / count  # [D]
        mean_g_squared = all_reduce(g.square().sum(0)) / count  # [D]
        m, v = (0.0, 0.0) if self.m is None else (self.m, self.v)
        self.m = b1 * m + (1 - b1) * mean_g  # the mean of m_i: the history m is common to all of them
        self.v = b2 * v + (1 - b2) * mean_g_squared
        self.updates += 1

    def state_dict(self) -> dict:
        return {"m": self.m, "v": self.v, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.m, self.v, self.updates = state["m"], state["v"], state["updates"]


# --------------------------------------------------------------------------------------------- sparsification (Table 4)


def sparsify(x: Tensor, h: int, all_reduce: AllReduce = one_process) -> Tensor:
    """Keep the h coordinates with the largest |mean over rows|, [n, D] -> [n, min(h, D)] (4.2, Table 4).

    `x` are the features of one source; when ranks hold different rows of it, `all_reduce` adds up their sums. A row
    that is not finite counts for nothing in the mean and comes out as NaN.
    """
    if h >= x.shape[1]:
        return x
    broken = ~x.isfinite().all(1, keepdim=True)  # [n, 1]
    sums = all_reduce(x.masked_fill(broken, 0).sum(0))  # DIFFERS 3: one row that is not finite spoils no other
    magnitude = sums.abs()  # [D]; the mean's order is the sum's

    # DIFFERS 8: magnitudes within 1/4096 of the largest are ties, and ties go to the lowest coordinate. Without a
    # history all features are +-1 and their sums small whole numbers, so most coordinates tie; then rounding, and with
    # it the number of ranks, would choose. 4096 steps lie far above rounding and tell apart the sums of 4096 such rows.
    steps = (magnitude * (4096 / magnitude.max().clamp_min(1e-30))).round().long()  # [D]
    dims = len(steps)
    unique_keys = steps * dims - torch.arange(dims, device=x.device)  # orders by steps, then by lowest coordinate
    coordinates = unique_keys.topk(h).indices  # [h]
    return x[:, coordinates].masked_fill(broken, math.nan)


# ------------------------------------------------------------------------------------------------- medoids (4.2, Eq. 8)


def pairwise_similarity(x: Tensor, metric: str = "l1") -> Tensor:
    """Similarity of every pair of rows, [N, H] -> [N, N]: largest distance - distance, or the cosine.

    L1 between sparsified, Adam-normalised gradients is the paper's metric (Eq. 8); l2 and cosine are options.
    """
    if metric == "cosine":
        x = F.normalize(x, dim=1)
        return x @ x.T
    if metric not in ("l1", "l2"):
        raise ValueError(f"metric {metric!r} is unknown: use l1, l2 or cosine")
    p = 1.0 if metric == "l1" else 2.0
    # by differences: the shortcut through |x|^2 + |y|^2 - 2 xy loses small distances between large rows
    distance = torch.cdist(x, x, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    if distance.numel() == 0:
        return distance
    return distance.max() - distance


# Gains of two candidates that differ by less than this share of N x the rows' size are ties. Rounding in float32
# moves a sum of N distances by some 2^-21 of it, and another GPU or number of ranks by as much; 2^-18 lies a few times
# above that, and far below any difference that means something.
TIE = 2.0**-18


def facility_location(similarity: Tensor, k: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy maximiser of sum_i max_{s in S} similarity[i, s] over |S| = k (Eq. 8), in float64 on its own device.

    Returns `index` [k] in the order of picking and `weight` [k], how many of the N rows each medoid serves best (an
    earlier medoid wins a tie, and every medoid serves itself). A row that nobody serves counts 0, as in the official
    code. `scale` is the size of what was rounded when the similarities were computed, by default the largest of them.
    """
    n = len(similarity)
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} medoids of {n} rows: k must lie in 0..{n}")
    similarity = similarity.detach().double()
    if k == 0:
        none = torch.zeros(0, dtype=torch.long, device=similarity.device)
        return none, none
    if scale is None:
        scale = similarity.abs().max()
    tie = TIE * n * scale.to(similarity)

    best = similarity.new_zeros(n)  # [N] how well each row is served so far
    picked = torch.zeros_like(best, dtype=torch.bool)  # [N]
    index = []
    for _ in range(k):
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
        raise ValueError(f"k = {k} of a pool of {len(sources)}: k must lie in 1..{len(sources)}")
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
    index, weight = [kept], [torch.ones_like(kept)]
    for source, budget in zip(big_sources, budgets.tolist(), strict=True):
        rows = (usable & (sources == source)).nonzero()[:, 0]  # [n]
        x = sparsify(features[rows.to(features.device)], h)  # [n, h]
        similarity = pairwise_similarity(x, metric)  # [n, n]
        if metric == "cosine":
            scale = similarity.abs().max()
        else:  # distances are differences of rows, and as inexact as the largest row
            scale = torch.linalg.vector_norm(x, ord=1 if metric == "l1" else 2, dim=1).max()
        if len(rows) <= 256:  # the greedy loop is a hundred tiny operations: starting them on a GPU takes longer
            similarity = similarity.cpu()
        medoids, sizes = facility_location(similarity, budget, scale)
        index.append(rows[medoids.cpu()])
        weight.append(sizes.cpu())
    return Coreset(torch.cat(index), torch.cat(weight))


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
    farthest from its own centre. `generator` is on the CPU and alike on all ranks.
    """

    def of_all_rows(values: Tensor) -> Tensor:
        """[n, ...] of this rank -> [total, ...] of all."""
        return all_reduce(values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values))

    def row(number) -> Tensor:
        """One row of the data set, whoever holds it, [d]."""
        return all_reduce(x[rows == number].sum(0))

    def distances() -> Tensor:
        return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")  # [n, clusters]

    x = x - all_reduce(x.sum(0)) / total  # hidden states have a large part in common, which would cost precision

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
    owner = torch.full_like(rows, -1)
    for _ in range(iterations):
        before = owner
        distance, owner = distances().min(1)  # [n] each
        if not all_reduce((owner != before).sum()):
            break
        member = F.one_hot(owner, clusters).to(x)  # [n, clusters]; a product adds up in the same order each time
        counts = all_reduce(member.sum(0))
        centres = all_reduce(member.T @ x) / counts.clamp_min(1)[:, None]
        farthest_first = of_all_rows(distance).argsort(descending=True, stable=True).tolist()
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            centres[empty] = row(farthest_first.pop(0))
    return of_all_rows(owner)


# ------------------------------------------------------------------------------------------ per-example losses, plainly


def example_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """L_i = mean of -log p over example i's supervised tokens, [C, B] in nats, in one `model(...)`.

    `batch` is what most training loops have: input_ids, attention_mask and labels, each [B, T], with labels of -100
    where a token carries no loss. C = 1, or the number of perturbed copies inside `VProjectionProbe.spsa`.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    logits = model(**inputs, use_cache=False).logits  # [C * B, T, V]
    labels = batch["labels"][:, 1:]  # [B, T - 1]: position t predicts token t + 1
    copies = len(logits) // len(labels)
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(copies, 1).flatten(), reduction="none")
    sums = losses.view(copies, *labels.shape).sum(2)  # [C, B]; cross_entropy is 0 where the label is -100
    return sums / (labels != -100).sum(1)  # DIFFERS 10: each example by its own tokens, not by the padded width


def spsa_gradients(derivatives: Tensor, z: Tensor) -> Tensor:
    """g_i = mean over directions of derivative_ik z_k (Eq. 6): [n, directions] and [directions, ...] -> [n, D]."""
    return derivatives @ z.flatten(1) / len(z)


# ------------------------------------------------------------------------------- the zeroth-order signal (4.2, Eq. 5-6)


class VProjectionProbe:
    """Per-example signal of the last layer's V projection: LoRA's B [d_v, r] if it has an adapter, else W [d_v, d_in].

    Both probes are hooks inside an ordinary call of the model, so they work for any architecture and under any wrapper
    that lets the model's own modules run (DDP: pass the inner module; FSDP2: the wrapped model). Weights are never
    written. Call them with the model in evaluation mode: dropout would be noise in the signal.

    `module_name` names the projection where it can't be found; all its outputs then count as V.
    """

    SEPARATE = ("v_proj", "value", "v_lin")
    STACKED = ("qkv_proj", "Wqkv", "c_attn")  # rows [q | k | v]; c_attn is a Conv1D with the same output order
    PER_HEAD = ("query_key_value",)  # GPT-NeoX: rows [q k v] of head 0, then of head 1, ...

    def __init__(self, model: nn.Module, module_name: str | None = None):
        self.model, modules = model, dict(model.named_modules())
        known = self.SEPARATE + self.STACKED + self.PER_HEAD
        if module_name is None:
            found = [name for name in modules if name.rpartition(".")[2] in known]
        else:
            found = [name for name in modules if name == module_name or name.endswith("." + module_name)]
        if not found:
            raise ValueError(self._candidates(model, f"no module named {module_name or ' or '.join(known)}"))
        self.name = found[-1]
        self.module = modules[self.name]
        self.layer_name, self.layers = self._enclosing_layer(modules, self.name)
        self.layer = modules[self.layer_name]
        if self.layer is not self.layers[-1]:
            raise ValueError(self._candidates(model, f"{self.name} is not in the last decoder layer"))
        last = max(i for i, name in enumerate(modules) if name.startswith(self.layer_name + "."))
        after = [*self.layer.modules(), *list(modules.values())[last + 1 :]]  # its own, the final norm and the head
        self.tail = [m for m in after if next(m.parameters(recurse=False), None) is not None]
        weight = self._weight(self.module)
        conv1d = type(getattr(self.module, "base_layer", self.module)).__name__ == "Conv1D"  # weight [d_in, d_out]
        d_out, d_in = weight.shape[::-1] if conv1d else weight.shape
        self.rows = self._v_rows(model, d_out, explicit=module_name is not None)  # [d_v] output channels
        adapter = self._adapter()
        self.shape = (len(self.rows), adapter[0].weight.shape[0] if adapter else d_in)  # z and G of one example
        self.dims = math.prod(self.shape)

    @staticmethod
    def _weight(module: nn.Module) -> Tensor:
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(f"{type(module).__name__} has no weight matrix: name a linear projection")
        return weight

    @staticmethod
    def _enclosing_layer(modules: Mapping[str, nn.Module], name: str) -> tuple[str, nn.ModuleList]:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if isinstance(layers := modules[".".join(parts[:end])], nn.ModuleList):
                return ".".join(parts[: end + 1]), layers
        raise ValueError(f"{name} lies in no nn.ModuleList of decoder layers: name a projection that does")

    @staticmethod
    def _candidates(model: nn.Module, problem: str) -> str:
        names = [n for n, m in model.named_modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 2]
        names = [n for n in names if "lora_" not in n and not n.endswith("base_layer")]
        last = [n for n in names if any(part.isdigit() for part in n.split("."))][-12:]
        return f"can't find the last V projection ({problem}): name one with --probe_module, such as {', '.join(last)}"

    def _v_rows(self, model: nn.Module, d_out: int, explicit: bool) -> Tensor:
        """Output channels that are V, [d_v]."""
        leaf = self.name.rpartition(".")[2]
        rows = torch.arange(d_out)
        if leaf in self.SEPARATE or (explicit and leaf not in self.STACKED + self.PER_HEAD):
            return rows
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if leaf in self.STACKED and d_out == (heads + 2 * kv_heads) * head_dim:
            return rows[-kv_heads * head_dim :]
        if leaf in self.PER_HEAD and model.config.model_type == "gpt_neox" and d_out == 3 * heads * head_dim:
            return rows.view(heads, 3, head_dim)[:, 2].flatten()
        raise ValueError(self._candidates(model, f"{self.name} has {d_out} outputs in an unknown layout"))

    def _rows_on(self, device) -> Tensor:
        self.rows = self.rows.to(device)  # moves once
        return self.rows

    def _adapter(self) -> tuple[nn.Module, float] | None:
        """(lora_A, scaling) of the active LoRA adapter, or None."""
        active = [a for a in getattr(self.module, "active_adapters", ()) if a in getattr(self.module, "lora_A", ())]
        if not active or self.module.disable_adapters or self.module.merged:
            return None
        return self.module.lora_A[active[0]], self.module.scaling[active[0]]

    def _low_rank_input(self, x: Tensor) -> Tensor:
        """What the probed matrix multiplies: scaling * lora_A(x) [B, T, r], or x itself [B, T, d_in]."""
        if adapter := self._adapter():
            lora_a, scaling = adapter
            return lora_a(x.to(lora_a.weight.dtype)) * scaling
        return x

    def gradients(self, losses: Callable[[], Tensor], per_example: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Exact per-example gradients of the probed matrix, [n, D], by one backward pass through the last layer's tail.

        `losses()` runs the model on a micro-batch and returns per-example losses [1, n] (`example_losses`). Where rows
        are not examples, `per_example` turns [B, T, d] into [n, L, d], zero beyond each end. Autograd runs from the V
        projection onward: its output becomes a leaf, delta = dL/dV, and G_i = sum_t delta_it (scaling lora_A(x_it))^T:
        Eq. 6 for many directions.   # DIFFERS 5
        """
        taped: list[Tensor] = []

        def make_leaf(module, args, output):
            low = self._low_rank_input(args[0])  # [B, T, r]
            torch.set_grad_enabled(True)  # until the no_grad block below ends
            rows = self._rows_on(output.device)
            leaf = output.index_select(-1, rows).requires_grad_()  # [B, T, d_v]
            taped.extend((low, leaf))
            return output.index_copy(-1, rows, leaf)

        with torch.no_grad(), _uncompiled(self.layer), ExitStack() as stack:
            stack.callback(self.module.register_forward_hook(make_leaf).remove)
            loss = losses().sum()
            low, leaf = taped
            (delta,) = torch.autograd.grad(loss, leaf)  # [B, T, d_v]
        low, delta = per_example(low), per_example(delta)  # [n, L, r] and [n, L, d_v]
        dtype = torch.promote_types(low.dtype, torch.float32)
        return torch.einsum("bto,bti->boi", delta.to(dtype), low.to(dtype)).flatten(1)  # [n, D]

    @torch.no_grad()
    def spsa(self, losses: Callable[[], Tensor], z: Tensor, eps: float = 1e-3, wide_tail: bool = True) -> Tensor:
        """Central differences [L_i(w + eps z_k) - L_i(w - eps z_k)] / (2 eps) of every example, [B, n] (Eq. 5).

        `z` is [n, d_v, r]. The layers before the last run once; the last layer runs once per signed direction with
        eps scaling lora_A(x) z^T added to its V, and the copies travel together through the final norm and the head.
        `wide_tail` runs that tail in the next wider precision (bf16 -> float32 -> float64): in the model's own, the
        difference of two nearly equal losses is mostly rounding.   # DIFFERS 6
        """
        signed = torch.cat([eps * z, -eps * z])  # [2n, d_v, r]
        layer_forward, state = self.layer.forward, {}

        def add_perturbation(module, args, output):
            low = self._low_rank_input(args[0])  # [B, T, r]
            shift = low @ state["z"].to(low.dtype).T  # [B, T, d_v]
            return output.index_add(-1, self._rows_on(output.device), shift.to(output.dtype))

        def run_copies(hidden, *args, **kwargs):
            state["dtype"] = _wider(hidden) if wide_tail else hidden.dtype
            outputs = []
            with _no_narrowing(state["dtype"], hidden.device.type) if wide_tail else nullcontext():
                for state["z"] in signed:
                    out = layer_forward(hidden.to(state["dtype"]), *args, **kwargs)
                    outputs.append(out if isinstance(out, Tensor) else out[0])
            stacked = torch.cat(outputs)  # [2n * B, T, d]
            return stacked if isinstance(out, Tensor) else (stacked, *out[1:])

        with _uncompiled(self.layer), ExitStack() as stack:
            stack.callback(self.module.register_forward_hook(add_perturbation).remove)
            stack.enter_context(_patched_forward(self.layer, run_copies))
            for leaf in self.tail if wide_tail else ():
                stack.enter_context(_patched_forward(leaf, _forward_in(state, leaf)))
            plus, minus = losses().chunk(2)  # [n, B] each
        return (plus - minus).T / (2 * eps)


def _wider(x: Tensor) -> torch.dtype:
    """The precision after the one that is computed in: autocast's, or the tensor's own."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def _forward_in(state: dict, module: nn.Module) -> Callable:
    """The module's forward with inputs and its own parameters in state["dtype"], outside autocast."""
    forward = module.forward

    def wide(x, *args, **kwargs):
        own = dict(module._parameters)
        module._parameters.update({k: None if p is None else p.detach().to(state["dtype"]) for k, p in own.items()})
        try:
            with _no_narrowing(state["dtype"], x.device.type):
                return forward(x.to(state["dtype"]), *args, **kwargs)
        finally:
            module._parameters.update(own)

    return wide


class _InFloat64(TorchFunctionMode):
    """Asked for float32, gives float64: RMSNorm and eager attention work in float32 whatever comes in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(x):
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widened, args), **{name: widened(x) for name, x in (kwargs or {}).items()})


@contextmanager
def _no_narrowing(dtype: torch.dtype, kind: str):
    """Outside autocast, and without modules' own casts to a precision below `dtype`."""
    with torch.autocast(kind, enabled=False), _InFloat64() if dtype == torch.float64 else nullcontext():
        yield


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
