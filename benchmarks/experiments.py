"""What benchmarks/convergence.py varies beside the trainer's own flags: the training data, and how a coreset is chosen.

* REGIMES spoil tokenised training rows in a known way, so that it is known which rows a good choice would leave out.
* without_near_copies removes copies before training, which costs no probe: the first rival of every coreset.
* SELECTIONS are choices that the trainer does not have. Each is a function (run, pool, step, clock) -> Choice called in
  place of train_colm.choose_coreset; `run.memory` is a dict for what it keeps between steps.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_colm  # noqa: E402
from colm_batches import micro_batch_losses  # noqa: E402
from colm_core import select_coreset  # noqa: E402
from colm_data import Example, TokenizedRows  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- regimes

COPIED, ORIGINALS = 0.6, 500  # this share of the rows becomes copies of so many
CHANGED = {"copies": 0.0, "near_copies": 0.15, "far_copies": 0.5}  # share of a copied question's tokens that change
SWAPPED = 0.3  # share of a source's answers that go to another question
FEW = 3000  # rows: 240 pools of 128 pass over them ten times
REGIMES = ("clean", *CHANGED, "noise", "few")


def spoil(data: TokenizedRows, regime: str, seed: int, max_length: int) -> tuple[TokenizedRows, dict[str, Tensor]]:
    """Training rows under `regime`, whose parts, as in copies+noise, act one after another; and marks [rows] of which
    rows are copies, or were copied ("copies"), and which have another question's answer ("noise").

    Every row keeps its source, so that the mixture and its small sources stay as they are.
    """
    rows = [data.example(i) for i in range(len(data))]
    sources, marks = data.sources, {}
    for part in regime.split("+"):
        rng = random.Random(f"{part} {seed}")
        if part in CHANGED:
            marks["copies"] = copy_rows(rows, sources, rng, CHANGED[part])
        elif part == "noise":
            marks["noise"] = swap_answers(rows, sources, rng, max_length)
        elif part == "few":
            chosen = rng.sample(range(len(rows)), min(FEW, len(rows)))
            rows, sources = [rows[i] for i in chosen], sources[chosen]
            marks = {name: mark[chosen] for name, mark in marks.items()}
    return joined(data, rows, sources), marks


def joined(data: TokenizedRows, rows: list[Example], sources: Tensor) -> TokenizedRows:
    """`rows` end to end, with the names of `data`."""
    offsets = [0]
    for example in rows:
        offsets.append(offsets[-1] + len(example.ids))
    ids = torch.cat([example.ids for example in rows])
    supervised = torch.cat([example.supervised for example in rows])
    numbers = torch.arange(len(rows))
    return replace(data, ids=ids, supervised=supervised, offsets=offsets, sources=sources, numbers=numbers)


def prompt_tokens(example: Example) -> int:
    """Tokens before the first supervised one."""
    return int(example.supervised.int().argmax())


def copy_rows(rows: list[Example], sources: Tensor, rng: random.Random, changed: float) -> Tensor:
    """Replace a share of the rows by copies of a few rows of the same source. Of each copy's question, `changed` of the
    tokens become random tokens of the data. Returns which rows are now copies or originals, [rows] bool."""
    originals = rng.sample(range(len(rows)), min(ORIGINALS, len(rows) // 10))
    of_source: dict[int, list[int]] = {}
    for i in originals:
        of_source.setdefault(int(sources[i]), []).append(i)
    others = sorted(set(range(len(rows))) - set(originals))
    head, tail = template(rows)
    words = torch.cat([example.ids for example in rows])
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    copied = torch.zeros(len(rows), dtype=torch.bool)
    copied[originals] = True
    for i in rng.sample(others, round(COPIED * len(rows))):
        candidates = of_source.get(int(sources[i]))
        if not candidates:  # no original is of this source
            continue
        original = rows[rng.choice(candidates)]
        ids = original.ids
        if changed:
            ids = ids.clone()
            question = ids[head : prompt_tokens(original) - tail]  # a view: writing to it changes ids
            hit = torch.rand(len(question), generator=generator) < changed
            question[hit] = words[torch.randint(len(words), (int(hit.sum()),), generator=generator)]
        rows[i] = Example(ids, original.supervised)
        copied[i] = True
    return copied


def template(rows: list[Example]) -> tuple[int, int]:
    """Tokens that prompts begin and end with: those of the prompt's template, not of a question."""
    prompts = [example.ids[: prompt_tokens(example)].tolist() for example in rows[:300]]
    first = [tuple(tokens[:4]) for tokens in prompts]
    usual = max(first, key=first.count)  # a prompt that was shortened from the left lacks the template
    prompts = [tokens for tokens, beginning in zip(prompts, first, strict=True) if beginning == usual]
    shortest = min(map(len, prompts))

    def common(sequences: list[list[int]]) -> int:
        for i in range(shortest):
            if len({tokens[i] for tokens in sequences}) > 1:
                return i
        return shortest

    head = common(prompts)
    return head, min(common([tokens[::-1] for tokens in prompts]), shortest - head)


def swap_answers(rows: list[Example], sources: Tensor, rng: random.Random, max_length: int) -> Tensor:
    """Within each source, pass the answers of a random share of its rows round. Returns which rows, [rows] bool."""
    swapped = torch.zeros(len(rows), dtype=torch.bool)
    for q in sources.unique().tolist():
        mine = (sources == q).nonzero()[:, 0].tolist()
        chosen = rng.sample(mine, round(SWAPPED * len(mine)))
        before = [rows[i] for i in chosen]
        for i, own, other in zip(chosen, before, before[1:] + before[:1], strict=True):
            prompt, answer = prompt_tokens(own), slice(prompt_tokens(other), None)
            cut = max(0, prompt + len(other.ids[answer]) - max_length)  # long prompts are shortened from the left
            ids = torch.cat([own.ids[cut:prompt], other.ids[answer]])
            rows[i] = Example(ids, torch.cat([own.supervised[cut:prompt], other.supervised[answer]]))
            swapped[i] = True
    return swapped


# ------------------------------------------------------------------------------------------- removing copies beforehand

HASHES, BAND = 128, 4  # MinHash values of a row; as many as a band has must agree before two rows are compared


def shingles(data: TokenizedRows, n: int) -> tuple[numpy.ndarray, list[int]]:
    """Hashes of the n-grams of tokens of every row, without the prompt's template, and where each row begins."""
    rows = [data.example(i) for i in range(len(data))]
    head, tail = template(rows)
    parts = []
    for example in rows:
        ids, prompt = example.ids, prompt_tokens(example)
        parts += [ids[min(head, prompt - tail) : prompt - tail], ids[prompt:], ids.new_zeros(n - 1)]
    starts, begin = [], 0
    for question, answer, gap in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        starts.append(begin)
        begin += len(question) + len(answer) + len(gap)
    ids = torch.cat(parts).numpy().astype(numpy.uint64)
    grams = ids
    for shift in range(1, n):  # a polynomial hash modulo 2^64; the gap keeps rows apart
        grams = grams * numpy.uint64(1_000_003) + numpy.roll(ids, -shift)
    return grams, starts


def minhash(data: TokenizedRows, n: int, seed: int = 0) -> numpy.ndarray:
    """[rows, HASHES]: the share of equal values in two rows estimates the Jaccard similarity of their n-grams."""
    grams, starts = shingles(data, n)
    rng, columns = numpy.random.default_rng(seed), []
    for key in rng.integers(1, 1 << 62, HASHES, dtype=numpy.uint64):
        # SplitMix64's mixing steps: a plain multiplication leaves the order in the n-grams, and the estimate too high
        mixed = grams + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)  # modulo 2^64
        columns.append(numpy.minimum.reduceat((mixed >> numpy.uint64(32)).astype(numpy.uint32), starts))
    return numpy.stack(columns, 1)


def without_near_copies(data: TokenizedRows, threshold: float = 0.5, n: int = 2) -> list[int]:
    """Rows to train on: each row is dropped whose n-grams of tokens resemble those of a row before it that stays.

    `threshold` is of the estimated Jaccard similarity. Rows are compared when a band of their MinHash values agrees.
    """
    values = minhash(data, n)
    bands = [values[:, i : i + BAND] for i in range(0, HASHES, BAND)]
    keys = [[row.tobytes() for row in numpy.ascontiguousarray(band)] for band in bands]
    buckets: list[dict] = [{} for _ in bands]
    kept = []
    for i in range(len(values)):
        mine = [bucket.setdefault(key[i], []) for bucket, key in zip(buckets, keys, strict=True)]
        near = sorted({j for bucket in mine for j in bucket})
        if near and (values[near] == values[i]).mean(1).max() >= threshold:
            continue
        kept.append(i)
        for bucket in mine:
            if len(bucket) < 50:  # a template's bucket would hold thousands; the first rows stand for it
                bucket.append(i)
    return kept


def without_copies(data: TokenizedRows) -> list[int]:
    """Rows to train on: each row is dropped whose tokens are those of a row before it."""
    seen, kept = set(), []
    for i in range(len(data)):
        key = data.example(i).ids.numpy().tobytes()
        if key not in seen:
            seen.add(key)
            kept.append(i)
    return kept


# ---------------------------------------------------------------------------------------------------------- selections


def chosen(run, pool: Tensor, index: Tensor, probed: Tensor | None = None) -> train_colm.Choice:
    """The choice of pool positions `index` [K], weighted by --example_weights; the rows `probed` had a pass."""
    tokens = 0 if probed is None else sum(map(run.train.length, probed.tolist()))
    return replace(train_colm.uniform_choice(run, pool, index.cpu(), is_small(run, pool)), probe_tokens=tokens)


def is_small(run, rows: Tensor) -> Tensor:
    """Which rows are of small sources, [n] bool."""
    return torch.isin(run.train.sources[rows], torch.tensor(sorted(run.keep), dtype=torch.long))


def shuffled(run, n: int, step: int) -> Tensor:
    return torch.randperm(n, generator=train_colm.generator_of(run.args.seed, "shuffled", step))


def first_of(order: Tensor, *wanted: Tensor) -> Tensor:
    """`order`, with positions where the first of the masks `wanted` holds before all others, and so on."""
    for mask in reversed(wanted):
        order = order[mask[order].sort(descending=True, stable=True).indices]
    return order


@torch.no_grad()
def mean_losses(run, rows: Tensor) -> Tensor:
    """Mean token loss of each row, [n], by a plain forward pass."""
    losses = torch.zeros(len(rows))
    run.set_training(False)
    for positions, batch, _ in run.micro_batches(run.train, rows, train_colm.probe_budget(run.args)):
        with run.accelerator.autocast():
            values = micro_batch_losses(run.inner, run.labelled_logits, batch)[0]
        losses[positions] = values[: len(positions)].float().cpu()
    return losses


def largest_losses(run, pool, step, clock):
    """The rows with the largest mean loss."""
    order = mean_losses(run, pool).argsort(descending=True, stable=True)
    return chosen(run, pool, order[: run.args.coreset_size], pool)


def unlearnt(run, pool, step, clock, share=1 / 3):
    """Small sources whole and a random draw, from which the third of the other rows with the smallest loss is left out:
    what is left of medoids if they only pass over rows that teach nothing."""
    small = is_small(run, pool)
    others = (~small).nonzero()[:, 0]
    lowest = others[mean_losses(run, pool[others]).argsort()[: round(share * len(others))]]
    teaches = torch.ones(len(pool), dtype=torch.bool)
    teaches[lowest] = False
    order = first_of(shuffled(run, len(pool), step), small, teaches)
    return chosen(run, pool, order[: run.args.coreset_size], pool[others])


def alternate(run, pool, step, clock):
    """The trainer's medoids at every other step, small sources whole and a random draw at the others."""
    if step % 2 == 0:
        return train_colm.choose_coreset(run, pool, step, clock)
    order = first_of(shuffled(run, len(pool), step), is_small(run, pool))
    return chosen(run, pool, order[: run.args.coreset_size])


def last_v_gradients(run, rows: Tensor, step: int) -> Tensor:
    """Exact gradients of the last V projection, [n, D]."""
    return train_colm.probe_pool(run, rows, torch.ones(len(rows), dtype=torch.bool), step).values


def tf_idf(run, rows: Tensor) -> Tensor:
    """Bags of a row's tokens, rare ones weighing more, of norm 1: [n, vocabulary]."""
    data, memory = run.train, run.memory
    if "idf" not in memory:
        pairs = [data.ids[a:b].unique() for a, b in pairwise(data.offsets)]
        count = torch.bincount(torch.cat(pairs), minlength=len(run.tokenizer))
        memory["idf"] = (len(data) / count.clamp(min=1)).log()
    bags = torch.zeros(len(rows), len(memory["idf"]))
    for bag, row in zip(bags, rows.tolist(), strict=True):
        ids = data.example(row).ids.long()
        bag.index_add_(0, ids, torch.ones(len(ids)))
    return torch.nn.functional.normalize((bags * memory["idf"]).to(run.device), dim=1)


def medoids_of(features):
    """The trainer's selection on other features: small sources whole, medoids of the others."""

    def choose(run, pool, step, clock):
        small = is_small(run, pool)
        others = pool[~small]
        x = features(run, others, step)
        whole = x.new_zeros(len(pool), x.shape[1])
        whole[(~small).to(x.device)] = x
        args = run.args
        coreset = select_coreset(
            whole, run.train.sources[pool], args.coreset_size, run.keep, x.shape[1], args.similarity
        )
        return chosen(run, pool, coreset.index, None if features is bags_of else others)

    return choose


def bags_of(run, rows, step):
    return tf_idf(run, rows)


RECENT = 4096  # rows: the last 64 coresets


def likeness(run, rows: Tensor) -> Tensor:
    """Largest cosine of each row's bag of tokens with one of the last RECENT rows taken, [n]; and remember the bags."""
    run.memory["bags"] = bags = tf_idf(run, rows).to(torch.bfloat16 if run.device.type == "cuda" else torch.float32)
    taken = run.memory.get("taken")
    return torch.zeros(len(rows)) if taken is None else (bags @ taken.T).amax(1).float().cpu()


def remember(run, choice):
    bags, taken = run.memory.pop("bags")[choice.index.to(run.device)], run.memory.get("taken")
    run.memory["taken"] = bags if taken is None else torch.cat([taken, bags])[-RECENT:]
    return choice


def least_like(run, pool, step, clock):
    """The rows least like those taken lately; no pass of the model."""
    order = likeness(run, pool).argsort(stable=True)
    return remember(run, chosen(run, pool, order[: run.args.coreset_size]))


def fresh(run, pool, step, clock, threshold=0.8):
    """Small sources whole and a random draw, but rows that resemble one taken lately come last; no probe."""
    is_fresh = likeness(run, pool) < threshold
    order = first_of(shuffled(run, len(pool), step), is_fresh, is_small(run, pool))
    return remember(run, chosen(run, pool, order[: run.args.coreset_size]))


def fresh_within(alike=0.8, copy=9.0, recent=RECENT):
    """As many rows of each source as random_keep draws of the first 2 K of the pool; within a source those come last
    that resemble (`alike`) a row taken lately or in this step, and rows that resemble one by `copy` are not taken."""

    def choose(run, pool, step, clock):
        k, memory = run.args.coreset_size, run.memory
        bags = tf_idf(run, pool).to(torch.bfloat16 if run.device.type == "cuda" else torch.float32)
        like, own = torch.zeros(len(pool)), (bags @ bags.T).float().cpu()
        if "taken" in memory:
            itself = (pool[:, None] == memory["rows"]).to(run.device)  # in a later epoch a row is no copy of itself
            like = (bags @ memory["taken"].T).masked_fill(itself, 0).amax(1).float().cpu()
        sources, small = run.train.sources[pool].tolist(), is_small(run, pool)
        drawn = first_of(shuffled(run, min(2 * k, len(pool)), step), small[: 2 * k])[:k]
        left = [0] * len(run.train.names)
        for i in drawn.tolist():
            left[sources[i]] += 1
        taken, late = [], []
        for i in shuffled(run, len(pool), step).tolist():
            likeness = max(float(like[i]), float(own[i, taken].max()) if taken else 0.0)
            if likeness >= alike:
                late.append((i, likeness))
            elif left[sources[i]]:
                taken.append(i)
                left[sources[i]] -= 1
        for i, likeness in late:
            if left[sources[i]] and likeness < copy:
                taken.append(i)
                left[sources[i]] -= 1
        index = torch.tensor(taken or late[0][:1])
        kept = bags[index.to(run.device)]
        memory["taken"] = torch.cat([memory["taken"], kept])[-recent:] if "taken" in memory else kept
        memory["rows"] = torch.cat([memory.get("rows", pool[:0]), pool[index]])[-recent:]
        return chosen(run, pool, index)

    return choose


def half_probe(run, pool, step, clock):
    """The trainer's medoids among a random half of the big sources' rows; the other half has no probe."""
    small = is_small(run, pool)
    order = first_of(shuffled(run, len(pool), step), small)
    places = order[: int(small.sum()) + int((~small).sum()) // 2].sort().values
    part = train_colm.choose_coreset(run, pool[places], step, clock)
    weight = part.weight.new_zeros(len(pool))
    weight[places] = part.weight
    return replace(part, index=places[part.index], weight=weight, kept=small)


SKIP = 0.5  # InfoBatch's r


def infobatch(run, pool, step, clock):
    """Qin et al., 2024, arXiv 2303.04947: of rows seen before, those whose last loss is below the mean are left out with
    probability SKIP, and the others of them weigh 1 / (1 - SKIP) times as much. Small sources first, as in random_keep."""
    if "last" not in run.memory:
        watch_losses(run)
    last = run.memory["last"][pool]
    seen = run.memory["last"][~run.memory["last"].isnan()]
    learnt = last < seen.mean() if len(seen) else torch.zeros(len(pool), dtype=torch.bool)
    generator = train_colm.generator_of(run.args.seed, "skip", step)
    skipped = learnt & (torch.rand(len(pool), generator=generator) < SKIP)
    order = first_of(shuffled(run, len(pool), step), ~skipped, is_small(run, pool))
    choice = chosen(run, pool, order[: run.args.coreset_size])
    return replace(choice, weight=choice.weight * torch.where(learnt & ~skipped, 1 / (1 - SKIP), 1.0))


def watch_losses(run):
    """Keep each row's last training loss in run.memory["last"]."""
    memory, batches, losses_of = run.memory, type(run).micro_batches, micro_batch_losses
    memory["last"] = torch.full((len(run.train),), float("nan"))

    def watched(data, rows, *args, **kwargs):
        for positions, batch, is_last in batches(run, data, rows, *args, **kwargs):
            memory["now"] = rows[positions]
            yield positions, batch, is_last

    def watched_losses(model, labelled_logits, batch):
        result = losses_of(model, labelled_logits, batch)
        if torch.is_grad_enabled():
            memory["last"][memory["now"]] = result[0].detach()[: len(memory["now"])].float().cpu()
        return result

    run.micro_batches = watched
    train_colm.micro_batch_losses = watched_losses


GRAD = "--selection colm --probe grad"
KEEP = "--selection random_keep"
SELECTIONS = {  # name: (function, flags of train_colm.py that it goes by)
    "losses": (largest_losses, KEEP),
    "unlearnt": (unlearnt, KEEP),
    "alternate": (alternate, GRAD),
    "plain-l1": (medoids_of(last_v_gradients), GRAD),
    "plain-cosine": (medoids_of(last_v_gradients), GRAD + " --similarity cosine"),
    "tfidf-medoids": (medoids_of(bags_of), GRAD + " --similarity cosine"),
    "least_like": (least_like, KEEP),
    "fresh": (fresh, KEEP),
    "fresh_source": (fresh_within(), KEEP),
    "fresh_wide": (fresh_within(), KEEP + " --pool_size 256"),
    "fresh_skip": (fresh_within(copy=0.95, recent=1 << 60), KEEP),
    "fresh_skip98": (fresh_within(copy=0.98, recent=1 << 60), KEEP),
    "fresh_wide_skip": (fresh_within(copy=0.95, recent=1 << 60), KEEP + " --pool_size 256"),
    "half_probe": (half_probe, GRAD),
    "infobatch": (infobatch, KEEP),
}
