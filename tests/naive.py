"""Slow twins of colm_core.py: every formula once more as plain loops over Python floats (float64), no tensors.

Rows are lists of lists. Where the paper is silent, the twin follows the docstring of the function that it checks.
"""

import math
from fractions import Fraction

# ------------------------------------------------------------------------------------------ sources and budgets (4.1)


def small_sources(counts):
    """Section 4.1: sources with fewer examples than the mean source, |V| / c."""
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
    return index, cluster_sizes(similarity, index)


def cluster_sizes(similarity, index):
    """Section 4.2, weighted medoids: rows that each medoid serves best; the earlier wins a tie, each serves itself."""
    sizes = [0] * len(index)
    for i, row in enumerate(similarity if index else []):
        owner = index.index(i) if i in index else max(range(len(index)), key=lambda p, row=row: (row[index[p]], -p))
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
