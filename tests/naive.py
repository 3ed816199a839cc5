"""Slow twins of colm_core.py: every formula once more as plain loops over Python floats (float64), no tensors.

Rows are lists of lists. Where the paper is silent, the twin follows the docstring of the function that it checks.
The last section is the twin of train_colm.py: whole steps made of these formulas. There the model runs in torch, in
float64 and one example at a time; everything around it is plain loops again.
"""

import hashlib
import math
from fractions import Fraction

import torch

# ------------------------------------------------------------------------------------------ sources and budgets (4.1)


def small_sources(counts):
    """Section 4.1: sources with fewer examples than the mean source, |V| / c; what has none is no source."""
    counts = {source: count for source, count in counts.items() if count}
    mean = Fraction(sum(counts.values()), max(len(counts), 1))
    return {source for source, count in counts.items() if count < mean}


def allocate_budget(counts, budget, order=None):
    """Section 4.1: proportional shares; floors, then +1 to the smallest (ties by `order`), none above its count."""
    order = list(range(len(counts))) if order is None else order
    total = sum(counts)
    budget = min(budget, total)
    shares = [math.floor(Fraction(count * budget, total)) if total else 0 for count in counts]
    left = budget - sum(shares)
    for s in sorted(order, key=lambda s: shares[s]):
        if left > 0 and shares[s] < counts[s]:
            shares[s] += 1
            left -= 1
    assert left == 0
    return shares


# ------------------------------------------------------------------------------------------------ medoids (4.2, Eq. 8)


def distance(a, b, metric):
    """Equation 8: the L1 distance; L2 is an option."""
    if metric == "l1":
        return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True))
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cosine(a, b):
    """Section 4.2, an option: the cosine of two rows; 0 for a row of zeros."""
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def pairwise_similarity(rows, metric="l1"):
    """Equation 8: C - distance, with C the largest distance; or the cosine."""
    if metric == "cosine":
        return [[cosine(a, b) for b in rows] for a in rows]
    table = [[distance(a, b, metric) for b in rows] for a in rows]
    largest = max((max(row) for row in table), default=0.0)
    return [[largest - d for d in row] for row in table]


def facility_gain(similarity, best, candidate):
    """Equation 8: what one more medoid adds to sum_i max_s similarity[i][s], `best` being the sum's present terms."""
    return math.fsum(max(0.0, similarity[i][candidate] - best[i]) for i in range(len(similarity)))


def tie(similarity, scale=None):
    """Gains of Equation 8 that differ by no more than this are equal (README, difference 7)."""
    largest = max((abs(x) for row in similarity for x in row), default=0.0)
    return 2.0**-18 * len(similarity) * (largest if scale is None else scale)


def row_norm(rows, metric):
    """The largest row, as the metric measures it: what rounding is relative to; None for the cosine."""
    return None if metric == "cosine" else max((distance(row, [0.0] * len(row), metric) for row in rows), default=0.0)


def facility_location(similarity, k, scale=None):
    """Equation 8, greedily and from scratch at each pick; returns the medoids in order and their cluster sizes."""
    n, equal = len(similarity), tie(similarity, scale)
    best, index = [0.0] * n, []  # a row that nobody serves counts 0
    for _ in range(k):
        gains = {c: facility_gain(similarity, best, c) for c in range(n) if c not in index}
        lowest = max(gains.values()) - equal
        index.append(min(c for c, gain in gains.items() if gain >= lowest))
        best = [max(b, row[index[-1]]) for b, row in zip(best, similarity, strict=True)]
    return index, cluster_sizes(similarity, index, scale)


def cluster_sizes(similarity, index, scale=None):
    """Section 4.2, weighted medoids: rows that each medoid serves best; the earlier wins a tie, each serves itself."""
    sizes = [0] * len(index)
    equal = tie(similarity, scale) / max(len(similarity), 1)  # one similarity, not a sum of N
    for i, row in enumerate(similarity if index else []):
        lowest = max(row[medoid] for medoid in index) - equal
        ties = [place for place, medoid in enumerate(index) if row[medoid] >= lowest]
        owner = index.index(i) if i in index else ties[0]
        sizes[owner] += 1
    return sizes


def objective(similarity, index):
    """Equation 8: sum_i max_{s in S} similarity[i][s]."""
    return math.fsum(max(row[s] for s in index) for row in similarity) if index else 0.0


def largest_coordinates(rows, h):
    """Section 4.2, Table 4: the h coordinates with the largest |mean over rows|, ties to the lowest.

    A tie is what agrees to 1/4096 of the largest (README, difference 8).
    """
    means = [abs(math.fsum(column)) / len(rows) for column in zip(*rows, strict=True)]
    steps = [round(x * (4096 / max([*means, 1e-30]))) for x in means]
    return sorted(range(len(means)), key=lambda j: (-steps[j], j))[:h]


def sparsify(rows, h):
    """Section 4.2, Table 4: the rows on those coordinates, largest first; untouched when they all stay."""
    if h >= len(rows[0]):
        return rows
    return [[row[j] for j in largest_coordinates(rows, h)] for row in rows]


# ------------------------------------------------------------------------------------- Adam normalisation (Eq. 3 and 4)


class AdamMoments:
    """Equations 3 and 4 with the history of the selected big-source examples."""

    def __init__(self, dims, betas=(0.9, 0.999), eps=1e-8):
        self.b1, self.b2 = betas
        self.eps = eps
        self.m, self.v, self.updates = [0.0] * dims, [0.0] * dims, 0

    def of_one(self, g):
        """Equation 3: m_i and v_i of one example."""
        m = [self.b1 * old + (1 - self.b1) * x for old, x in zip(self.m, g, strict=True)]
        v = [self.b2 * old + (1 - self.b2) * x * x for old, x in zip(self.v, g, strict=True)]
        return m, v

    def normalize(self, rows):
        """Equation 4: bias-corrected m_i / (sqrt(v_i) + eps); the correction counts updates of the history."""
        t, features = self.updates + 1, []
        for g in rows:
            m, v = self.of_one(g)
            m_hat, v_hat = [x / (1 - self.b1**t) for x in m], [x / (1 - self.b2**t) for x in v]
            features.append([a / (math.sqrt(b) + self.eps) for a, b in zip(m_hat, v_hat, strict=True)])
        return features

    def update(self, rows):
        """Section 4.2: the history becomes the mean of m_i and of v_i over the selected big-source examples."""
        if rows:
            m, v = zip(*(self.of_one(g) for g in rows), strict=True)
            self.m = [math.fsum(column) / len(rows) for column in zip(*m, strict=True)]
            self.v = [math.fsum(column) / len(rows) for column in zip(*v, strict=True)]
            self.updates += 1


def sparse_features(gradients, sources, moments, h):
    """Section 4.2: normalise all rows, then sparsify each source by itself; rows in their old order."""
    features, out = moments.normalize(gradients), [None] * len(gradients)
    for source in sorted(set(sources)):
        rows = [i for i, s in enumerate(sources) if s == source]
        for i, sparse in zip(rows, sparsify([features[i] for i in rows], h), strict=True):
            out[i] = sparse
    return out


# ------------------------------------------------------------------------------------------- the coreset (Algorithm 1)


def select_coreset(features, sources, k, keep=(), h=2560, metric="l1", order=range):
    """Algorithm 1: all kept rows, then medoids of each other source among its finite rows; (index, weight).

    `order(S)` says in which order S big sources that tie for a budget come.
    """
    index = [i for i, source in enumerate(sources) if source in keep]
    weight = [1] * len(index)
    assert len(index) < k, "more kept rows than K: a random draw, which has no twin"
    usable = {}
    for i, source in enumerate(sources):
        if source not in keep and all(math.isfinite(x) for x in features[i]):
            usable.setdefault(source, []).append(i)
    present = sorted(usable)
    budgets = allocate_budget([len(usable[q]) for q in present], k - len(index), order(len(present)))
    for q, budget in zip(present, budgets, strict=True):
        rows = sparsify([features[i] for i in usable[q]], h)
        picks, sizes = facility_location(pairwise_similarity(rows, metric), budget, row_norm(rows, metric))
        index += [usable[q][p] for p in picks]
        weight += sizes
    return index, weight


# ------------------------------------------------------------------------------------- losses and the signal (Eq. 5-6)


def cross_entropy(logits, target):
    """Section 3: -log softmax(logits)[target] of one token, in nats."""
    largest = max(logits)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logits)) - logits[target]


def spsa_derivative(loss, w, z, eps):
    """Equation 5: [L(w + eps z) - L(w - eps z)] / (2 eps), `w` and `z` flat lists."""
    plus, minus = ([a + sign * eps * b for a, b in zip(w, z, strict=True)] for sign in (1, -1))
    return (loss(plus) - loss(minus)) / (2 * eps)


def spsa_gradient(derivatives, directions):
    """Equation 6: mean over directions of derivative * z."""
    terms = [[d * x for x in z] for d, z in zip(derivatives, directions, strict=True)]
    return [math.fsum(column) / len(terms) for column in zip(*terms, strict=True)]


# ------------------------------------------------------------------------------- a random draw that passes over copies


def tf_idf(rows):
    """Bags [rows][vocabulary] of lists of tokens: how often each is in the row, times log(rows / rows that have it)."""
    bags = []
    for row in rows:
        bag = []
        for token in range(max(map(max, rows)) + 1):
            having = sum(token in other for other in rows)
            bag.append(row.count(token) * math.log(len(rows) / having) if having else 0.0)
        bags.append(bag)
    return bags


def fresh_first(order, sources, k, seen, alike):
    """Of each source as many positions as the first k of `order` have: those not like one taken before, then others."""
    taken, put_off = [], []

    def has_room(i):
        wanted = sum(sources[j] == sources[i] for j in order[:k])
        return sum(sources[j] == sources[i] for j in taken) < wanted

    for i in order:
        if seen[i] or any(alike[i][j] for j in taken):
            put_off.append(i)
        elif has_room(i):
            taken.append(i)
    for i in put_off:
        if has_room(i):
            taken.append(i)
    return taken


# ---------------------------------------------------------------------- one step of training, and several in a row


def seed_of(*parts):
    """The seed of one purpose at one step: the first 7 bytes of SHA-256 over repr((run's seed, purpose, step))."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def directions(settings, shape, step):
    """Equation 5: z ~ N(0, I), the [d_v][r] matrices of one step, or of the whole run with --direction run.

    The trainer draws them in float32, so the twin does.
    """
    when = step if settings.direction == "step" else "run"
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "direction", when))
    return torch.randn(settings.num_directions, *shape, generator=generator).double()


def example_loss(model, example):
    """Section 3: the mean cross-entropy of the completion's tokens, each predicted from all before it."""
    ids, prompt = example
    log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # [T, vocabulary]
    first = max(prompt, 1)  # nothing predicts the first token
    terms = [-log_p[t - 1, ids[t]] for t in range(first, len(ids))]
    return sum(terms) / len(terms)


def exact_gradient(model, weight, example):
    """The limit of Equation 6 for many directions: dL_i/dw of the probed matrix, as one flat list."""
    (gradient,) = torch.autograd.grad(example_loss(model, example), weight)
    return gradient.flatten().tolist()


def spsa_gradients(model, weight, examples, z, eps):
    """Equations 5 and 6: w + eps z and w - eps z written into the weights, one direction after the other."""
    w = weight.detach().clone()
    derivatives = [[] for _ in examples]
    for direction in z:
        losses = {}
        for sign in (1, -1):
            with torch.no_grad():
                weight.copy_(w + sign * eps * direction)
                losses[sign] = [example_loss(model, example).item() for example in examples]
        for i, (plus, minus) in enumerate(zip(losses[1], losses[-1], strict=True)):
            derivatives[i].append((plus - minus) / (2 * eps))
    with torch.no_grad():
        weight.copy_(w)
    return [spsa_gradient(one, [direction.flatten().tolist() for direction in z]) for one in derivatives]


def is_allocation(shares, counts, budget):
    """Section 4.1: are these floors, then +1 to the smallest floors, whichever of equal floors came first?"""
    total = sum(counts)
    if budget >= total:
        return shares == counts
    floors = [math.floor(Fraction(count * budget, total)) for count in counts]
    raised = [share - floor for share, floor in zip(shares, floors, strict=True)]
    if sum(shares) != budget or not set(raised) <= {0, 1}:
        return False
    # A source whose floor is its count has no room for one more; here every count is above its floor.
    largest_raised = max((floor for floor, one in zip(floors, raised, strict=True) if one), default=0)
    return all(one or floor >= largest_raised for floor, one in zip(floors, raised, strict=True))


def learning_rate(settings, step, steps):
    """Appendix C: a linear warm-up from 0 over ceil(warmup_ratio x steps), then half a cosine, a line or a constant."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.learning_rate * factor[settings.lr_scheduler]


class AdamW:
    """Loshchilov and Hutter 2019, Algorithm 2, over one flat list of weights, with torch's default betas and eps."""

    def __init__(self, size, weight_decay):
        self.m, self.v, self.t, self.weight_decay = [0.0] * size, [0.0] * size, 0, weight_decay

    def step(self, w, g, lr):
        """The new weights."""
        self.t += 1
        new = []
        for i in range(len(w)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g[i]
            self.v[i] = 0.999 * self.v[i] + 0.001 * g[i] ** 2
            m_hat, v_hat = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            new.append(w[i] - lr * self.weight_decay * w[i] - lr * m_hat / (math.sqrt(v_hat) + 1e-8))
        return new


class Steps:
    """A run as the formulas say it: float64, one example at a time, the whole method in reading order.

    `model` is in float64 and has no dropout; `trained` lists its parameters that are trained, `weight` is the probed
    one. `examples` are pairs of token ids and prompt length, `sources` the name of each one's source, `keep` the names
    of those that are kept whole. `settings` has the trainer's flags by name, `steps` is their number.
    What a run draws at random (pools, random coresets, which of equal floors gets one more) is read from its records,
    after a check that the draw was allowed.
    """

    def __init__(self, model, trained, weight, examples, sources, keep, settings, steps):
        self.model, self.trained, self.weight = model, trained, weight
        self.examples, self.sources, self.keep = examples, sources, keep
        self.settings, self.steps, self.done = settings, steps, 0
        self.optimizer = AdamW(sum(p.numel() for p in trained), settings.weight_decay)
        self.moments = AdamMoments(weight.numel())
        self.taken = []  # rows trained on, step by step
        if settings.selection == "fresh":
            self.bags = tf_idf([ids for ids, _ in examples])

    def step(self, recorded):
        """One step over the recorded pool; what metrics.jsonl and selection.jsonl must say about it."""
        pool = recorded["pool"]
        kept, index, weights = self.coreset(pool, recorded)
        for position, row in enumerate(index):
            tokens = len(self.examples[row][0]) - max(1, self.examples[row][1])
            weights[position] *= tokens ** {"uniform": 0, "sqrt": 0.5, "tokens": 1}[self.settings.example_weights]
        lr = learning_rate(self.settings, self.done, self.steps)
        loss, norm = self.update(index, weights, lr)
        self.done += 1
        self.taken += recorded["selected"]  # in the trainer's order: of the oldest step only the last may count
        return {"loss": loss, "lr": lr, "grad_norm": norm, "kept": sorted(kept), "selected": sorted(index)}

    def coreset(self, pool, recorded):
        """Algorithm 1: rows that are kept, rows that are trained on, and the weights of their losses."""
        settings = self.settings
        k = min(settings.coreset_size, len(pool))
        small = [row for row in pool if self.sources[row] in self.keep]
        if settings.selection == "full":
            return small, list(pool), [1] * len(pool)
        if settings.selection == "random":
            assert set(recorded["selected"]) <= set(pool) and len(set(recorded["selected"])) == k
            return [], recorded["selected"], [1] * k
        # README, --keep_share: a share s leaves ceil(n (s + (1 - s) K / N)) of the n small sources' rows, at random.
        share = Fraction(settings.keep_share) + (1 - Fraction(settings.keep_share)) * Fraction(k, len(pool))
        if settings.selection == "fresh":
            index = self.fresh(pool, small, k, math.ceil(share * len(small)))
            return [row for row in index if row in small], index, [1] * k
        kept = [row for row in small if row in recorded["kept"]]
        assert len(kept) == math.ceil(share * len(small)) and sorted(kept) == sorted(recorded["kept"])
        big = [row for row in pool if row not in small]
        if settings.selection == "random_keep" or len(kept) >= k:
            drawn = recorded["selected"]
            assert len(set(drawn)) == k and set(drawn) <= set(kept + big)
            assert set(kept) <= set(drawn) if len(kept) < k else set(drawn) <= set(kept)
            return kept, drawn, [1] * k
        gradients = self.probe(big)
        sources = [self.sources[row] for row in big]
        features = sparse_features(gradients, sources, self.moments, settings.sparsify_dims)
        present = sorted(set(sources))
        counts = [sources.count(q) for q in present]
        budgets = [sum(self.sources[row] == q for row in recorded["selected"]) for q in present]
        assert is_allocation(budgets, counts, k - len(kept)), f"{budgets} of {counts} for {k - len(kept)}"
        index, weights, chosen = list(kept), [1] * len(kept), []
        for q, budget in zip(present, budgets, strict=True):
            places = [i for i, source in enumerate(sources) if source == q]
            rows = [features[i] for i in places]
            similarity = pairwise_similarity(rows, settings.similarity)
            picks, sizes = facility_location(similarity, budget, row_norm(rows, settings.similarity))
            chosen += [places[p] for p in picks]
            weights += sizes if settings.medoid_weights == "cluster" else [1] * budget
        index += [big[i] for i in chosen]
        self.moments.update([gradients[i] for i in chosen])  # Section 4.2: the selected ones of the big sources alone
        return kept, index, weights

    def fresh(self, pool, small, k, keep):
        """--selection fresh: a random draw in which `keep` of the small sources' rows come first, less copies."""
        settings = self.settings
        if keep < len(small):
            draw = torch.Generator().manual_seed(seed_of(settings.seed, "thin", self.done))
            kept = [small[i] for i in torch.randperm(len(small), generator=draw).tolist()][:keep]
        else:
            kept = small
        draw = torch.Generator().manual_seed(seed_of(settings.seed, "pick", self.done))
        shuffled = [pool[i] for i in torch.randperm(len(pool), generator=draw).tolist()]
        order = [row for row in shuffled if row in kept] + [row for row in shuffled if row not in small]
        order += [row for row in small if row not in kept]

        def alike(a, b):
            return a != b and cosine(self.bags[a], self.bags[b]) >= settings.alike

        seen = [any(alike(row, other) for other in self.taken[-settings.lately :]) for row in pool]
        pairs = [[alike(a, b) for b in pool] for a in pool]
        picks = fresh_first([pool.index(row) for row in order], [self.sources[row] for row in pool], k, seen, pairs)
        return [pool[i] for i in picks]

    def probe(self, rows):
        """Section 4.2: a gradient of the last V projection for each of `rows`."""
        examples = [self.examples[row] for row in rows]
        if self.settings.probe == "grad":
            return [exact_gradient(self.model, self.weight, example) for example in examples]
        z = directions(self.settings, self.weight.shape, self.done)
        return spsa_gradients(self.model, self.weight, examples, z, self.settings.spsa_eps)

    def update(self, index, weights, lr):
        """Loss sum_i w_i L_i / sum_i w_i, its gradient clipped to the largest norm, and AdamW; loss and full norm."""
        loss, g = 0.0, [0.0] * sum(p.numel() for p in self.trained)
        for row, weight in zip(index, weights, strict=True):
            one = example_loss(self.model, self.examples[row])
            parts = torch.autograd.grad(one, self.trained)
            share = weight / math.fsum(weights)
            loss += share * one.item()
            flat = [x for part in parts for x in part.flatten().tolist()]
            g = [a + share * b for a, b in zip(g, flat, strict=True)]
        norm = math.sqrt(math.fsum(x * x for x in g))
        scale = min(1.0, self.settings.max_grad_norm / (norm + 1e-6))  # 1e-6: as torch's clip_grad_norm_ has it
        w = [x for p in self.trained for x in p.flatten().tolist()]
        w = self.optimizer.step(w, [scale * x for x in g], lr)
        with torch.no_grad():
            for p in self.trained:
                p.copy_(torch.tensor(w[: p.numel()], dtype=torch.float64).view_as(p))
                w = w[p.numel() :]
        return loss, norm
