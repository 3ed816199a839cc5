"""What benchmarks/convergence.py varies beside the trainer's own flags: the training data, and how a coreset is chosen.

* REGIMES spoil tokenised training rows in a known way, so that it is known which rows a good choice would leave out.
* REMOVALS drop copies before training, which costs no probe: the first rival of every coreset.
* SELECTIONS are choices that the trainer does not have. Each is a function (run, pool, step, clock) -> Choice called in
  place of train_colm.choose_coreset; `run.memory` is a dict for what it keeps between steps.

Choices that were measured and did no better are in commit 956a51d, with their figures in RESULTS.md.
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


def without_copies(data: TokenizedRows) -> list[int]:
    """Rows to train on, as --drop_copies leaves them: `spoil` numbers its rows from 0."""
    return data.without_copies().numbers.tolist()


def shingles(data: TokenizedRows, n: int) -> tuple[numpy.ndarray, list[int]]:
    """Hashes of the n-grams of tokens of every row, without the prompt's template, and where each row begins."""
    rows = [data.example(i) for i in range(len(data))]
    head, tail = template(rows)
    parts, starts, begin = [], [], 0
    for example in rows:
        ids, prompt = example.ids, prompt_tokens(example)
        question, answer = ids[min(head, prompt - tail) : prompt - tail], ids[prompt:]
        gap = ids.new_zeros(n - 1)  # it keeps rows apart
        parts += [question, answer, gap]
        starts.append(begin)
        begin += len(question) + len(answer) + len(gap)
    ids = torch.cat(parts).numpy().astype(numpy.uint64)
    grams = ids
    for shift in range(1, n):  # a polynomial hash modulo 2^64
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


REMOVALS = {"exact": without_copies, "dedup": without_near_copies}

# ---------------------------------------------------------------------------------------------------------- selections


def is_small(run, rows: Tensor) -> Tensor:
    """Which rows are of small sources, [n] bool."""
    return torch.isin(run.train.sources[rows], torch.tensor(sorted(run.keep), dtype=torch.long))


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
    bags = torch.nn.functional.normalize((bags * memory["idf"]).to(run.device), dim=1)
    if run.device.type == "cuda":
        bags = bags.bfloat16()  # half the memory of the rows taken; cosines err by less than 0.01
    return bags


def likeness_to_taken(run, pool: Tensor, bags: Tensor) -> Tensor:
    """Largest cosine of each row's bag with that of another row taken before, [N]."""
    if "taken" not in run.memory:
        return torch.zeros(len(pool))
    cosines = bags @ run.memory["taken"].T  # [N, taken]
    itself = pool[:, None] == run.memory["rows"]  # in a later epoch a row is no copy of itself
    return cosines.masked_fill(itself.to(run.device), 0).amax(1).float().cpu()  # [N]


def remember(run, rows: Tensor, bags: Tensor, recent: int) -> None:
    """Keep the last `recent` rows taken and their bags."""
    memory = run.memory
    memory["taken"] = torch.cat([memory.get("taken", bags[:0]), bags])[-recent:]
    memory["rows"] = torch.cat([memory.get("rows", rows[:0]), rows])[-recent:]


def fresh(alike: float = 0.8, copy: float = 2.0, recent: int = 4096):
    """A selection without a probe that passes over rows like those taken lately, and leaves the mixture as it is.

    As many rows of each source are taken as random_keep draws of the first 2 K of the pool. Within a source a random
    order decides, but rows come last whose bag of tokens has a cosine of `alike` or more with one of the last `recent`
    rows taken or with a row taken in this step. From a cosine of `copy` on (above 1: never) a row is not taken at all,
    and the coreset is smaller.
    """

    def choose(run, pool: Tensor, step: int, clock) -> train_colm.Choice:
        k, small = run.args.coreset_size, is_small(run, pool)
        sources = run.train.sources[pool]  # [N]
        generator = train_colm.generator_of(run.args.seed, "fresh", step)

        # 1. How many rows of each source: as random_keep draws them, so that passing over rows moves no mixture.
        candidates = torch.ones_like(small)[: 2 * k]
        drawn = train_colm.draw_uniformly(candidates, small[: 2 * k], k, generator)  # [K]
        room = torch.bincount(sources[drawn], minlength=len(run.train.names)).tolist()

        # 2. Rows in a random order, those that resemble one taken before put off.
        bags = tf_idf(run, pool)  # [N, vocabulary]
        to_taken = likeness_to_taken(run, pool, bags).tolist()
        to_pool = (bags @ bags.T).float().cpu()  # [N, N]
        sources = sources.tolist()
        taken, late = [], []
        for i in torch.randperm(len(pool), generator=generator).tolist():
            likeness = to_taken[i]
            if taken:
                likeness = max(likeness, float(to_pool[i, taken].max()))
            if alike <= likeness < copy:
                late.append(i)
            elif likeness < alike and room[sources[i]]:
                taken.append(i)
                room[sources[i]] -= 1

        # 3. They fill what room is left of their source.
        for i in late:
            if room[sources[i]]:
                taken.append(i)
                room[sources[i]] -= 1
        index = torch.tensor(taken or [0])  # a step needs a row
        remember(run, pool[index], bags[index.to(run.device)], recent)
        return train_colm.uniform_choice(run, pool, index, small)

    return choose


KEEP = "--selection random_keep"
SELECTIONS = {  # name: (function, flags of train_colm.py that it goes by)
    "fresh_source": (fresh(), KEEP),
    "fresh_wide": (fresh(), KEEP + " --pool_size 256"),
    "fresh_skip98": (fresh(copy=0.98, recent=1_000_000), KEEP),
}
