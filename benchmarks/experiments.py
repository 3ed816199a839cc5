"""What benchmarks/convergence.py varies beside the trainer's own flags: the training data.

* REGIMES spoil tokenised training rows in a known way, so that it is known which rows a good choice would leave out.
* REMOVALS drop copies before training, which costs no probe: the first rival of every coreset.

Other ways to choose a coreset were measured as well: `fresh_skip98` is in commit f25ec73, those that did no better in
956a51d, and their figures are in RESULTS.md.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from colm_data import Example, TokenizedRows, prompt_tokens, template  # noqa: E402

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


def without_copies(data: TokenizedRows) -> list[int]:
    """Rows to train on, as --drop_copies leaves them: `spoil` numbers its rows from 0."""
    return data.without_copies().numbers.tolist()


def without_near_copies(data: TokenizedRows) -> list[int]:
    """Rows to train on, as --drop_near_copies 0.5 leaves them."""
    return data.without_near_copies(0.5).numbers.tolist()


REMOVALS = {"exact": without_copies, "dedup": without_near_copies}
