"""CoLM in plain PyTorch: mini-batch coresets for fine-tuning language models on data mixtures.

Every formula of Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures"
(ICLR 2025, arXiv 2407.19580v4), under its section or equation. The file needs torch alone: copy it into your own
repository. `train_colm.py` is the complete trainer; a step in your own loop reads

    probe, logits = VProjectionProbe(model), LabelledLogits(model)      # once: no weight is changed
    moments = AdamMoments(optimizer.defaults["betas"])                  # once: the history of Eq. 3-4
    keep = small_sources(counts)                                        # {source id: rows in the training set}

    batch = collate(pool).to(device)      # N pairs (token ids [T], prompt length); sources: integers [N]
    model.eval()
    g = probe.gradients(lambda: example_losses(model, logits, batch))                       # [N, D]
    coreset = select_coreset(moments.normalize(g), sources, k=64, keep=keep)
    picked = coreset.index.tolist()
    moments.update(g[[i for i in picked if int(sources[i]) not in keep]])
    model.train()
    example_losses(model, logits, collate([pool[i] for i in picked]).to(device)).mean().backward()

Symbols: N pool size, K coreset size, B micro-batch rows, T tokens, M supervised tokens, D probed numbers (V rows x LoRA
rank), h kept coordinates, S sources. A comment `DIFFERS n` marks a departure from the paper or its official code; the
README gives the reason under the same number.
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

# ------------------------------------------------------------------------------------------ sources and budgets (4.1)


def small_sources(counts: Mapping[Hashable, int]) -> set:
    """Sources with fewer than |V| / c training examples (below the mean size): all their examples are kept (4.1)."""
    total = sum(counts.values())
    return {source for source, count in counts.items() if count * len(counts) < total}


def allocate_budget(counts: Tensor, budget: int) -> Tensor:
    """Share `budget` over sources in proportion to their pool `counts` [S]; sums to min(budget, counts.sum()) (4.1).

    b_q = (K - |S_s|) |V_q| / (N - |S_s|), with `budget` = K - |S_s| and the counts those of the big sources.

    Floors first, then +1 to the smallest budgets (ties: the first), never above a source's count.   # DIFFERS 1
    """
    counts = counts.long()
    total = int(counts.sum())
    if budget < 0:
        raise ValueError(f"budget {budget} is negative: it must be 0 or more")
    if budget >= total:
        return counts.clone()
    shares = counts * budget // total
    order = torch.argsort(torch.where(shares < counts, shares, total), stable=True)
    shares[order[: budget - int(shares.sum())]] += 1  # a remainder below S, and every floor lies below its count
    return shares


# ------------------------------------------------------------------------------------------------ medoids (4.2, Eq. 8)


def pairwise_similarity(x: Tensor, metric: str = "l1") -> Tensor:
    """Similarity of every pair of rows, [..., N, H] -> [..., N, N]: largest distance - distance, or the cosine.

    L1 between sparsified, Adam-normalised gradients is the paper's metric (Eq. 8); l2 and cosine are options.
    """
    if metric == "cosine":
        x = F.normalize(x, dim=-1)
        return x @ x.mT
    if metric not in ("l1", "l2"):
        raise ValueError(f"metric {metric!r} is unknown: use l1, l2 or cosine")
    p = {"l1": 1.0, "l2": 2.0}[metric]
    distance = torch.cdist(x, x, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amax((-2, -1), keepdim=True) - distance if distance.numel() else distance


TIE = 2.0**-18  # gains within this share of N x `scale` are equal


def facility_location(similarity: Tensor, k: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy maximiser of sum_i max_{s in S} similarity[i, s] over |S| = k (Eq. 8), in float64 on its own device.

    Returns `index` [k] in the order of picking and `weight` [k], how many of the N rows each medoid serves best (an
    earlier medoid wins a tie, and every medoid serves itself). A row that nobody serves counts 0, as in the official
    code. Ties are the rule, not the exception (either of two rows can serve both; so can any between the two medians of
    a line, and one SPSA direction puts all rows on a line): they go to the lowest index, and rounding must not decide
    them.   # DIFFERS 7
    `scale` is the size of what was rounded, by default the largest similarity.
    """
    n = len(similarity)
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} medoids of {n} rows: k must lie in 0..{n}")
    similarity = similarity.detach().double()
    if not k:
        return (torch.zeros(0, dtype=torch.long, device=similarity.device),) * 2
    scale = similarity.abs().max() if scale is None else scale.to(similarity)
    index = greedy_picks(similarity[None], k, TIE * n * scale.view(1, 1))  # [1, k]
    return index[0], cluster_sizes(similarity[None], index)[0]


def greedy_picks(similarity: Tensor, k: int, tie: Tensor) -> Tensor:
    """What `facility_location` picks in S sets of rows at once: float64 [S, N, N] and `tie` [S, 1] -> [S, k > 0].

    Smaller sets are filled up with similarities of 0: they add nothing, and come after the rows that they tie with.
    """
    best = similarity.new_zeros(similarity.shape[:2])  # [S, N], how well each row is served
    picked, index = torch.zeros_like(best, dtype=torch.bool), []
    for _ in range(k):
        gain = (similarity - best[:, :, None]).clamp_(min=0).sum(1)  # [S, N], what each candidate would add
        gain.masked_fill_(picked, -math.inf)
        index.append((gain >= gain.amax(1, keepdim=True) - tie).int().argmax(1, keepdim=True))  # [S, 1]
        picked.scatter_(1, index[-1], True)
        best = torch.maximum(best, similarity.take_along_dim(index[-1][:, None], 2)[:, :, 0])
    return torch.cat(index, 1)


def cluster_sizes(similarity: Tensor, index: Tensor, own: Tensor | None = None, unused: Tensor | None = None) -> Tensor:
    """How many of its set's `own` rows [S, N] each medoid serves best, [S, N, N] and `index` [S, k > 0] -> [S, k].

    Medoids that are `unused` [S, k] serve nobody.
    """
    served = similarity.take_along_dim(index[:, None], 2).scatter_(1, index[:, None], math.inf)  # [S, N, k]
    if unused is not None:
        served.masked_fill_(unused[:, None], -math.inf)
    owner = F.one_hot(served.argmax(2), index.shape[1])  # [S, N, k]
    return (owner if own is None else owner * own[:, :, None]).sum(1)


def sparsify(x: Tensor, h: int, own: Tensor | None = None) -> Tensor:
    """Keep the h coordinates with the largest |mean over rows|, [..., N, D] -> [..., N, min(h, D)] (4.2, Table 4).

    Rows that are not `own` [..., N] count for nothing in the mean.
    """
    if h >= x.shape[-1]:
        return x
    counted = x if own is None else x.masked_fill(~own.to(x.device)[..., None], 0)
    return x.take_along_dim(largest_coordinates(counted.sum(-2), h)[..., None, :], -1)


def largest_coordinates(sums: Tensor, h: int) -> Tensor:
    """Where the summed features of a source are largest in magnitude, [..., D] -> [..., min(h, D)].

    Magnitudes within 1/4096 of the largest are ties, which go to the lowest coordinate: with no history yet all
    features are +-1, their sums whole numbers, and rounding (the number of ranks) would choose.   # DIFFERS 8
    """
    magnitude, dims = sums.abs(), sums.shape[-1]
    steps = (magnitude * (4096 / magnitude.amax(-1, keepdim=True).clamp_min(1e-30))).round().long()
    keys = steps * dims - torch.arange(dims, device=sums.device)  # no two alike
    return keys.topk(min(h, dims), dim=-1).indices


# ------------------------------------------------------------------------------------- Adam normalisation (Eq. 3 and 4)


class AdamMoments:
    """History m, v of the big sources' gradients, and the Adam-normalised feature of one example's gradient.

    m_i = b1 m + (1 - b1) g_i,  v_i = b2 v + (1 - b2) g_i^2,  feature_i = m_hat_i / (sqrt(v_hat_i) + eps)  (Eq. 3-4).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = tuple(betas), eps
        self.m: Tensor | None = None  # [D], None until the first update: a history of zeros
        self.v: Tensor | None = None  # [D]
        self.updates = 0  # DIFFERS 2: bias correction counts the updates of this history, not the global steps

    def normalize(self, g: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """Feature of every gradient, [N, D] -> [N, D]; where g [N, h] holds only `coordinates` [N, h], of those."""
        (b1, b2), t = self.betas, self.updates + 1
        m, v = (g.new_zeros(()), g.new_zeros(())) if self.m is None else (self.m, self.v)
        if coordinates is not None and self.m is not None:
            m, v = m[coordinates], v[coordinates]
        m = torch.add(m * (b1 / (1 - b1**t)), g, alpha=(1 - b1) / (1 - b1**t))
        v = torch.addcmul(v * (b2 / (1 - b2**t)), g, g, value=(1 - b2) / (1 - b2**t))
        return m.div_(v.sqrt_().add_(self.eps))

    def update(self, g_selected: Tensor) -> None:
        """m <- mean of m_i, v <- mean of v_i over the selected big-source gradients [M, D]; nothing when M = 0."""
        self.update_from_sums(g_selected.sum(0), g_selected.square().sum(0), len(g_selected))

    def update_from_sums(self, g_sum: Tensor, g_square_sum: Tensor, count: int) -> None:
        """The same from sum of g [D], sum of g^2 [D] and their count M: what ranks can add up."""
        if count == 0:
            return
        b1, b2 = self.betas
        if self.m is None:
            self.m, self.v = torch.zeros_like(g_sum), torch.zeros_like(g_square_sum)
        self.m = b1 * self.m + (1 - b1) / count * g_sum
        self.v = b2 * self.v + (1 - b2) / count * g_square_sum
        self.updates += 1

    def state_dict(self) -> dict:
        return {"m": self.m, "v": self.v, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.m, self.v, self.updates = state["m"], state["v"], state["updates"]


# ------------------------------------------------------------------------------------- features of a pool, in chunks


def groups_of(parts: list[Tensor], size: int) -> list[list[Tensor]]:
    """Neighbours of at most `size` rows together: on a GPU joining them takes less than launching more kernels."""
    groups: list[list[Tensor]] = []
    for part in parts:
        if not groups or sum(map(len, groups[-1])) + len(part) > size:
            groups.append([])
        groups[-1].append(part)
    return groups


class PoolGradients:
    """Per-example gradients of a pool [n, D], handed out in chunks, so that device memory need not grow as n x D.

    SPSA keeps `derivatives` [n, directions] and `z` and makes the rows g_i = mean_k d_ik z_k when asked (Eq. 6). Rows
    of the exact probe are stored with `add`, on the host beyond `device_bytes`.
    """

    CHUNK = 1 << 25  # numbers in one chunk: 128 MiB in float32

    def __init__(self, dims: int, derivatives: Tensor | None = None, z: Tensor | None = None, device_bytes=1 << 30):
        self.dims, self.derivatives, self.z, self.device_bytes = dims, derivatives, z, device_bytes
        self.blocks: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Append exact gradients [B, D]."""
        stored = sum(block.nbytes for block in self.blocks)
        self.blocks.append(rows if stored + rows.nbytes <= self.device_bytes else rows.cpu())

    @property
    def dtype(self) -> torch.dtype:
        stored = self.blocks if self.derivatives is None else [self.derivatives]
        return stored[0].dtype if stored else torch.float32

    def chunks(self, device):
        """Yield (slice of examples, their gradients [chunk, D] on `device`) in order."""
        size, start = max(1, self.CHUNK // self.dims), 0
        on_host = torch.device(device).type == "cpu"
        if not on_host:
            self._join(size)
        blocks = self.blocks if self.derivatives is None else [self.derivatives]
        parts = [part for block in blocks for part in block.split(size)]
        for group in [[part] for part in parts] if on_host else groups_of(parts, size):
            group = [part.to(device) for part in group]
            part = torch.cat(group) if len(group) > 1 else group[0]
            yield slice(start, start + len(part)), self._rows(part)
            start += len(part)

    def _join(self, size: int) -> None:
        """Blocks that lie on a device become blocks of up to `size` rows, for good: three passes go over them."""
        groups, self.blocks = groups_of(self.blocks, size), []
        while groups:
            group = groups.pop(0)
            one = len(group) == 1 or group[-1].device.type == "cpu"
            self.blocks += group if one else [torch.cat(group)]

    def _rows(self, part: Tensor) -> Tensor:
        return part if self.derivatives is None else part @ self.z.flatten(1) / len(self.z)

    def sums(self, mask: Tensor, device) -> tuple[Tensor, Tensor]:
        """Sum of g and of g^2 over the examples in `mask` [n], each [D]: what AdamMoments.update_from_sums adds up."""
        total = torch.zeros(2, self.dims, dtype=self.dtype, device=device)
        for rows, g in self.chunks(device):
            g = g[mask[rows].nonzero()[:, 0].to(device, non_blocking=True)]
            total += torch.stack([g.sum(0), g.square().sum(0)])
        return total[0], total[1]


def sparse_features(
    gradients: PoolGradients,
    sources: Tensor,
    num_sources: int,
    moments: AdamMoments,
    h: int,
    device,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """Adam-normalised features on each source's h largest coordinates, [n, min(h, D)] (4.2), in two chunked passes.

    `sources` [n] lie in 0..num_sources - 1. `reduce` sums a tensor over the ranks when each holds other rows. A row
    that is not finite counts for nothing in the choice of coordinates and stays not finite.
    """
    sources = sources.to(device, non_blocking=True)
    sums = torch.zeros(num_sources + 1, gradients.dims, dtype=gradients.dtype, device=device)
    broken = torch.zeros(len(sources), dtype=torch.bool, device=device)
    for rows, g in gradients.chunks(device):
        f = moments.normalize(g)  # [chunk, D]
        broken[rows] = ~f.sum(1).isfinite()
        sums.index_add_(0, sources[rows].masked_fill(broken[rows], num_sources), f)  # the last row is thrown away
    coordinates = largest_coordinates(reduce(sums[:-1]), h)  # [S, h]
    features = [sums.new_zeros(0, coordinates.shape[1])]
    for rows, g in gradients.chunks(device):
        wanted = coordinates[sources[rows]]  # [chunk, h]
        features.append(moments.normalize(g.gather(1, wanted), wanted))
        features[-1].masked_fill_(broken[rows, None], math.nan)
    return torch.cat(features)  # [n, h]


# ---------------------------------------------------------------------------------- sources where there are none (5.4)


def k_means(
    x: Tensor,
    rows: Tensor,
    total: int,
    clusters: int,
    generator: torch.Generator,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    iterations: int = 50,
) -> Tensor:
    """Cluster of every row, [total], by Lloyd's iterations from a k-means++ start; clusters stand in for sources (5.4).

    This rank holds `x` [n, d], the `rows` [n] of a data set of `total` rows; `reduce` sums over the ranks. An empty
    cluster takes the row that lies farthest from its own centre. `generator` is on the CPU and alike on all ranks.
    """

    def of_all(values: Tensor) -> Tensor:
        return reduce(values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values))

    def row(number) -> Tensor:
        return reduce(x[rows == number].sum(0))  # [d]

    def distances() -> Tensor:
        return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")  # [n, C]

    x = x - reduce(x.sum(0)) / total  # hidden states have a large part in common, which would cost precision

    centres = row(torch.randint(total, (), generator=generator).item())[None]
    while len(centres) < clusters:
        nearest = of_all(distances().amin(1)).double().cpu().square()  # [total]
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        centres = torch.cat([centres, row(torch.multinomial(weights, 1, generator=generator).item())[None]])
    owner = torch.full_like(rows, -1)
    for _ in range(iterations):
        before, (distance, owner) = owner, distances().min(1)  # [n]
        if not reduce((owner != before).sum()):
            break
        member = F.one_hot(owner, clusters).to(x)  # [n, C]; a product adds up in the same order each time
        counts = reduce(member.sum(0))
        centres = reduce(member.T @ x) / counts.clamp_min(1)[:, None]
        farthest = of_all(distance).argsort(descending=True, stable=True).tolist()
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            centres[empty] = row(farthest.pop(0))
    return of_all(owner)


# ------------------------------------------------------------------------------------------- the coreset (Algorithm 1)


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
    """Coreset of a pool: every row of the sources in `keep`, then medoids of each other source (4.1-4.2).

    `features` is [N, D] (rows of kept sources may hold anything), `sources` [N] integers. Rows whose features are not
    finite never become medoids; the coreset has K rows, or all usable ones when those are fewer.   # DIFFERS 3
    When the kept sources alone fill it, K of their rows are drawn uniformly with `generator`.   # DIFFERS 4
    """
    if not 0 < k <= len(sources):
        raise ValueError(f"k = {k} of a pool of {len(sources)}: k must lie in 1..{len(sources)}")
    sources = sources.cpu()
    is_kept = torch.isin(sources, torch.tensor(sorted(keep), dtype=sources.dtype))
    kept = is_kept.nonzero()[:, 0]
    if len(kept) >= k:
        kept = kept[torch.randperm(len(kept), generator=generator)[:k].sort().values]
        return Coreset(kept, torch.ones_like(kept))
    usable = ~is_kept & features.isfinite().all(1).cpu()
    rows = usable.nonzero()[:, 0]
    source, counts = sources[rows].unique(return_inverse=True, return_counts=True)[1:]
    budgets = allocate_budget(counts, k - len(kept)).tolist()
    sets = rows[source.argsort(stable=True)].split(counts.tolist())
    sets, budgets = [s for s, b in zip(sets, budgets, strict=True) if b], [b for b in budgets if b]
    longest = max(map(len, sets), default=0)
    alike = len(sets) * longest**2 <= 4 * sum(len(rows) ** 2 for rows in sets)  # or filling them up costs too much
    fit = len(sets) * longest * max(longest, features.shape[1]) <= PoolGradients.CHUNK
    at_once = max(len(sets), 1) if alike and fit else 1
    index, weight = [kept], [torch.ones_like(kept)]
    for i in range(0, len(sets), at_once):
        picks, sizes = medoids(features, sets[i : i + at_once], budgets[i : i + at_once], h, metric)
        index, weight = index + picks, weight + sizes
    return Coreset(torch.cat(index), torch.cat(weight))


def medoids(features: Tensor, sets: list[Tensor], budgets: list[int], h: int, metric: str) -> tuple[list, list]:
    """Medoids of S big sources, given as the pool rows of each: picked rows [budget > 0] and cluster sizes, per source.

    They go through each operation together: hundreds of tiny kernels would take longer than the arithmetic.
    """
    rows = nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=-1)  # [S, n]
    own = rows >= 0
    rows = torch.where(own, rows, rows[:, :1])  # the filling repeats a row: no distance grows by it
    x = sparsify(features[rows.to(features.device)], h, own)  # [S, n, h]
    similarity = pairwise_similarity(x, metric)  # [S, n, n]
    scale = similarity.abs().amax(1) if metric == "cosine" else torch.linalg.vector_norm(x, int(metric[1]), dim=2)
    if similarity.numel() <= 1 << 16:
        similarity, scale = similarity.cpu(), scale.cpu()
    own = own.to(similarity.device)
    similarity = similarity.double().masked_fill_(~(own[:, :, None] & own[:, None]), 0)
    tie = TIE * own.sum(1, keepdim=True) * scale.amax(1, keepdim=True).double()
    index = greedy_picks(similarity, max(budgets), tie)  # [S, k]
    unused = torch.arange(max(budgets)) >= torch.tensor(budgets)[:, None]
    sizes = cluster_sizes(similarity, index, own, unused.to(own.device)).cpu()
    picks = [s[i[:budget]] for s, i, budget in zip(sets, index.cpu(), budgets, strict=True)]
    return picks, [size[:budget] for size, budget in zip(sizes, budgets, strict=True)]


# ----------------------------------------------------------------------------------------- per-example losses, plainly


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
        projection onward: its output becomes a leaf, delta = dL/dV, and G_i = sum_t delta_it (scaling lora_A(x_it))^T: Eq. 6 for many directions.   # DIFFERS 5
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
