"""Training rows from, and scores on, SST-2, SuperGLUE, SQuAD and DROP in their official release formats.

For the experiments without given sources in Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model
Training on Data Mixtures", ICLR 2025, arXiv 2407.19580v4, section 5.4. Prompts are worded as in MeZO (Malladi et al.,
"Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv 2305.17333).

    python eval_superglue.py prepare CB=CB/train.jsonl --output cb.jsonl
    python train_colm.py --model microsoft/phi-2 --train_file cb.jsonl --keep_sources none --output_dir out
    accelerate launch eval_superglue.py score CB=CB/val.jsonl SQuAD=dev-v1.1.json --model out/final --output_dir scores

Implementation details worth knowing:
 1. An option's score is the mean (or sum) of its tokens' log-probabilities after the prompt. Prompt and option are
    tokenised apart, as the trainer tokenises prompt and completion; no EOS is scored.
 2. The options of a prompt, and the questions on a passage, begin with the same tokens. Those are encoded once, the
    key-value cache is shared, and each goes on with its own rest. Options of one token are read from one position.
 3. Batches depend on the examples alone, neither on the number of processes nor on where a run was stopped, so that
    both give the same scores to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from train_colm import Parser, UserError, append, load_tokenizer, read_rows, replacing

# ------------------------------------------------------------------------------------------------ templates and tasks

YES_NO = {True: "Yes", False: "No"}
LABELS = {  # label in the file -> option; COPA's and ReCoRD's rows bring their own options, SQuAD and DROP have none
    "SST-2": {"1": " great", "0": " terrible"},
    "CB": {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    "RTE": {"entailment": "Yes", "not_entailment": "No"},
    "BoolQ": {True: " Yes", False: " No"},
    "WiC": YES_NO,
    "WSC": YES_NO,
    "MultiRC": YES_NO,
}
PROMPTS: dict[str, Callable[[Callable], str]] = {  # f reads a text field of a flat row
    "SST-2": lambda f: f"{f('sentence')} It was",
    "CB": lambda f: f'Suppose {f("premise")} Can we infer that "{f("hypothesis")}"? Yes, No, or Maybe?\n',
    "RTE": lambda f: f'{f("premise")}\nDoes this mean that "{f("hypothesis")}" is true? Yes or No?\n',
    "BoolQ": lambda f: f"{f('passage')} {f('question')[:1].upper()}{f('question')[1:].rstrip('?')}?",
    "WiC": lambda f: (
        f'Does the word "{f("word")}" have the same meaning in these two sentences? Yes, No?\n'
        f"{f('sentence1')}\n{f('sentence2')}\n"
    ),
    "WSC": lambda f: (
        f'{f("text")}\nIn the previous sentence, does the pronoun "{f("target.span2_text").lower()}" '
        f"refer to {f('target.span1_text')}? Yes or No?\n"
    ),
    "COPA": lambda f: f"{f('premise').removesuffix('.')} {'because' if f('question') == 'cause' else 'so'}",
    "MultiRC": lambda f: (
        f'{f("passage")}\nQuestion: {f("question")}\nI found this answer "{f("answer")}". Is that correct? Yes or No?\n'
    ),
    "ReCoRD": lambda f: f"{f('passage')}\n-".replace("@highlight\n", "- "),
    "SQuAD": lambda f: f"Title: {f('title')}\nContext: {f('context')}\nQuestion: {f('question')}\nAnswer:",
    "DROP": lambda f: f"Passage: {f('passage')}\nQuestion: {f('question')}\nAnswer:",
}
SPAN_SEPARATOR = "; "  # between the spans of a DROP answer, in completions and in what the model writes


@dataclass
class Example:
    """One question. Examples of a `group`, the questions on one passage, begin alike and are judged together."""

    task: str
    id: str
    place: str  # in the file, for error messages
    group: str
    prompt: str
    options: dict  # label in the file -> text; empty where the answer is generated
    gold: list  # what is accepted: the label, texts (ReCoRD, SQuAD) or lists of spans (DROP)
    source: str | None


def field(row, place: str, path: str, kind=str):
    """The value at a dotted path; texts come without surrounding blanks."""
    value = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"{place} has no field {path!r}: give a file in the task's official release format")
        value = value[name]
    if not isinstance(value, kind):
        raise UserError(f"{place}: field {path!r} is a {type(value).__name__}, not a {kind.__name__}: mend the row")
    return value.strip() if kind is str else value


def nested(row: dict, place: str, name: str) -> Iterator[tuple[int, dict]]:
    """(number, object) of a list of objects."""
    return ((i, field({name: x}, place, name, dict)) for i, x in enumerate(field(row, place, name, list)))


def texts(row: dict, place: str, name: str) -> list[str]:
    return [field({name: x}, place, name) for x in field(row, place, name, list)]


def flat_rows(task: str, row: dict, place: str) -> Iterator[tuple[str, dict]]:
    """(place within the row, flat row) of every question of a row of the file."""
    if task == "MultiRC":
        passage = field(row, place, "passage", dict)
        for q, question in nested(passage, place, "questions"):
            for a, answer in nested(question, place, "answers"):
                text = {"passage": field(passage, place, "text"), "question": field(question, place, "question")}
                yield f".{q}.{a}", answer | text | {"answer": field(answer, place, "text")}
    elif task == "ReCoRD" and "qas" in row:
        text = field(row, place, "passage.text") and row["passage"]["text"]  # entities count from its very start
        spans = nested(row["passage"], place, "entities")
        names = [text[field(e, place, "start", int) : field(e, place, "end", int) + 1] for _, e in spans]
        for q, question in nested(row, place, "qas"):
            yield f".{q}", with_texts(question, place) | {"passage": text, "entities": names}
    elif task == "SQuAD" and "data" in row:
        for a, article in nested(row, place, "data"):
            for p, paragraph in nested(article, place, "paragraphs"):
                text = {"title": field(article, place, "title"), "context": field(paragraph, place, "context")}
                for q, question in nested(paragraph, place, "qas"):
                    yield f".{a}.{p}.{q}", with_texts(question, place) | text
    elif task == "DROP":
        for key in row:
            passage = field({"passage": row[key]}, place, "passage", dict)
            for q, question in nested(passage, place, "qa_pairs"):
                text = {"passage": field(passage, place, "passage"), "source": key.split("_")[0]}  # nfl or history
                yield f".{key}.{q}", question | text
    else:
        yield "", row


def with_texts(question: dict, place: str) -> dict:
    """The texts of its answers, where it has any."""
    if "answers" not in question:
        return question
    return question | {"answers": [field(answer, place, "text") for _, answer in nested(question, place, "answers")]}


def drop_answer(answer, place: str) -> list[str]:
    """A number, the spans, or a date as 'day month year' (answer_json_to_strings of the official script)."""
    if number := str(field(answer, place, "number", (str, int, float))).strip():
        return [number]
    if spans := texts(answer, place, "spans"):
        return spans
    date = field(answer, place, "date", dict)
    return [" ".join(date.get(part, "") for part in ("day", "month", "year")).strip()]


def options_of(task: str, row: dict, place: str) -> dict:
    """Label in the file -> text to score."""
    if task == "COPA":  # a choice goes on with the sentence that the prompt begins
        choices = [field(row, place, name) for name in ("choice1", "choice2")]
        return {i: " " + (c if c.split(" ")[0] == "I" else c[:1].lower() + c[1:]) for i, c in enumerate(choices)}
    if task == "ReCoRD":
        query = field(row, place, "query")
        blank = "@placeholder" if "@placeholder" in query else r"\bX\b"  # X in a common repackaging
        return {e: " " + re.sub(blank, lambda _, e=e: e, query) for e in texts(row, place, "entities")}
    return LABELS.get(task, {})


def gold_of(task: str, row: dict, place: str, labels: list) -> list:
    """The accepted answers, after checking that the row has any."""
    name = {"SQuAD": "answers", "ReCoRD": "answers", "DROP": "answer"}.get(task, "label")
    if name not in row:
        raise UserError(f"{place} has no field {name!r}: test files have none, give a labelled one (train or val)")
    if name == "answer":
        answers = [row[name], *row.get("validated_answers", [])]
        gold = [spans for answer in answers if any(spans := drop_answer(answer, place))]
    else:
        gold = texts(row, place, name) if name == "answers" else [row[name]]
        gold = [x for x in gold if not labels or (isinstance(x, (str, int)) and x in labels)]
    if not gold:
        known = f"one of {', '.join(map(repr, labels))}" if labels else "an answer (SQuAD 2.0 is not supported)"
        raise UserError(f"{place}: {name} {row[name]!r} is not {known}: mend or remove the row")
    return gold


def read_file(task: str, path: str) -> tuple[list, list[str]]:
    """Rows, and where each stands: JSON lines, but for SST-2's table and the one object of SQuAD and DROP."""
    if task not in ("SST-2", "SQuAD", "DROP") or not Path(path).is_file():
        return read_rows(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        if task != "SST-2":
            return [json.loads(text)], [path]
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line
            return read_rows(path)
        raise UserError(f"{path} line {error.lineno}: broken JSON ({error.msg}): mend that line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} can't be read ({error}): give the official UTF-8 file") from None
    header, *lines = [line.split("\t") for line in text.split("\n") if line]
    places = [f"{path} line {i + 2}" for i in range(len(lines))]
    for line, place in zip(lines, places, strict=True):
        if len(line) != len(header):
            raise UserError(f"{place} has {len(line)} columns, its header {len(header)}: mend that line")
    return [dict(zip(header, line, strict=True)) for line in lines], places


def read_task(task: str, path: str) -> list[Example]:
    """Every question of a file."""
    examples = []
    for number, (row, place) in enumerate(zip(*read_file(task, path), strict=True)):
        if not isinstance(row, dict):
            raise UserError(f"{place} is a {type(row).__name__}: every row must be a JSON object")
        for within, flat in flat_rows(task, row, place):
            options, prompt = options_of(task, flat, place), PROMPTS[task](partial(field, flat, place))
            gold = gold_of(task, flat, place, list(options))
            id = f"{number}{within}"
            group = str(number) if task in ("MultiRC", "ReCoRD") else id
            examples.append(Example(task, id, place, group, prompt, options, gold, flat.get("source")))
    if not examples:
        raise UserError(f"{path} holds no question of {task}: give a file in its official release format")
    return examples


def read_tasks(args) -> list[Example]:
    """The questions of all TASK=FILE arguments, or of --limit random groups of each file."""
    files: dict[str, str] = {}
    for argument in args.tasks:
        task, _, path = argument.partition("=")
        if task not in PROMPTS:
            raise UserError(f"{argument}: {task} is no task: write TASK=FILE with a task of {', '.join(PROMPTS)}")
        if not path or task in files:
            raise UserError(f"{argument}: {task} is written twice or has no file: write {task}=FILE once")
        files[task] = path
    kept = []
    for task, path in files.items():
        examples = read_task(task, path)
        groups = list(dict.fromkeys(example.group for example in examples))
        if args.limit and args.limit < len(groups):
            groups = random.Random(f"{task} {args.seed}").sample(groups, args.limit)
        chosen = set(groups)
        kept += [example for example in examples if example.group in chosen]
    return kept


def training_row(example: Example, mixture: bool) -> dict:
    """A row of train_colm.py. Several tasks make a mixture, whose sources are the tasks."""
    best = example.gold[0]
    spans = [best] if isinstance(best, str) else best
    completion = example.options[best] if example.options else " " + SPAN_SEPARATOR.join(spans)
    source = example.task if mixture else example.source
    return {"prompt": example.prompt, "completion": completion} | ({"source": source} if source else {})


def prepare(args) -> None:
    path = Path(args.output)
    if path.exists() and not args.overwrite:
        raise UserError(f"--output {path} exists: add --overwrite or choose another")
    examples = read_tasks(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as f:
        for example in examples:
            f.write(json.dumps(training_row(example, len(args.tasks) > 1), ensure_ascii=False) + "\n")
    print(f"{path}: " + ", ".join(f"{n} rows of {task}" for task, n in Counter(e.task for e in examples).items()))


# ------------------------------------------------------------------------------------------------- tokens and batches


@dataclass
class Item:
    """An example in tokens."""

    example: Example
    prompt: list[int]
    options: list[list[int]]
    shortened: bool


class Row(NamedTuple):
    """Tokens to run, and the options of an item whose first token is predicted at `start`."""

    ids: list[int]
    start: int
    item: Item
    options: list[int]


class Bundle(NamedTuple):
    """Rows whose first `prefix` tokens are the same."""

    rows: list[Row]
    prefix: int


def encode(examples: list[Example], tokenizer, args) -> list[Item]:
    """Prompts are cut on their left, but for BOS, until they fit together with the longest option or answer."""
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=True, verbose=False)["input_ids"]
    distinct = list(dict.fromkeys(["", *(text for e in examples for text in e.options.values())]))
    tokens = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    tokens_of = dict(zip(distinct, tokens, strict=True))
    items = []
    for example, prompt in zip(examples, prompts, strict=True):
        options = [tokens_of[text] for text in example.options.values()]
        longest = max(map(len, options), default=args.max_new_tokens)
        bos = int(prompt[0] == tokenizer.bos_token_id)
        room = args.max_length - longest  # the same for all options, so that they share the prompt
        if room <= bos:
            what = f"an option of {longest} tokens" if options else f"--max_new_tokens {longest}"
            raise UserError(f"--max_length {args.max_length} leaves no prompt to {what} ({example.place}): raise it")
        short = prompt if len(prompt) <= room else prompt[:bos] + prompt[len(prompt) - room + bos :]
        items.append(Item(example, short, options, len(prompt) > room))
    return items


def bundle(items: list[Item]) -> Bundle:
    rows = []
    for item in items:
        start = len(item.prompt) - 1
        if all(len(option) == 1 for option in item.options):
            rows.append(Row(item.prompt, start, item, list(range(len(item.options)))))
        else:  # an option's last token predicts nothing that is asked for
            rows += [Row(item.prompt + option[:-1], start, item, [o]) for o, option in enumerate(item.options)]
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)  # what these share, all share
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return Bundle(rows, min(same, *(row.start for row in rows)) if len(rows) > 1 else 0)


def bundles_of(items: list[Item]) -> list[Bundle]:
    """Questions on one passage together, unless one was cut: then they begin differently."""
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        e = item.example
        groups.setdefault((e.task, item.shortened, e.id if item.shortened else e.group), []).append(item)
    found = []
    for group in groups.values():
        together = bundle(group)
        found += [together] if together.prefix > 1 else [bundle([item]) for item in group]
    return found


def batches_of(items: list[Item], args) -> list[tuple[str, list]]:
    """(kind, bundles or items) of similar length, where possible within --max_tokens_per_batch, padding included."""
    bundles = [(b, max(len(row.ids) for row in b.rows)) for b in bundles_of([item for item in items if item.options])]
    kinds = {
        "whole": [(b, length, len(b.rows)) for b, length in bundles if not b.prefix],
        "shared": [(b, length, len(b.rows) + 1) for b, length in bundles if b.prefix],
        "generate": [(item, len(item.prompt) + args.max_new_tokens, 1) for item in items if not item.options],
    }
    batches: list[tuple[str, list]] = []
    for kind, parts in kinds.items():
        rows = width = 0
        for part, length, count in sorted(parts, key=lambda x: -x[1]):
            if not rows or (rows + count) * width > args.max_tokens_per_batch:
                batches.append((kind, []))
                rows, width = 0, length
            batches[-1][1].append(part)
            rows += count
    return batches


# -------------------------------------------------------------------------------------------------------------- model


class Scorer:
    """Log-probabilities of options, and greedy answers, from any causal LM with a head module."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.positions: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.takes = inspect.signature(inner.forward).parameters
        self.cache_name = "cache" if "cache" in self.takes else "past_key_values"  # the name before Transformers 5.18
        self.new_cache = partial(DynamicCache, config=inner.config)
        words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        stop = [i for i, word in enumerate(words) if "\n" in word]  # an answer is one line
        eos = tokenizer.eos_token_id
        greedy = GenerationConfig(do_sample=False, eos_token_id=[eos, *stop], pad_token_id=eos)
        greedy.max_new_tokens = args.max_new_tokens
        model.generation_config = inner.generation_config = greedy  # the checkpoint's own may sample

    def _select(self, module, args):
        """Hidden states [B, T, d] -> [1, M, d]: logits exist only where they are read."""
        if self.positions is None:
            return None  # in generation
        selected, self.positions = args[0].flatten(0, 1)[self.positions][None], None
        return (selected, *args[1:])

    def run(self, kind: str, parts: list) -> Iterator[tuple[Item, dict]]:
        """(item, its prediction) of every item of a batch."""
        if kind == "generate":
            for item, text in zip(parts, self.generate(parts), strict=True):
                yield item, {"prediction": text}
            return
        sums: dict[str, tuple[Item, dict]] = {}
        for item, option, value in self.log_probabilities(parts):
            length = len(item.options[option]) if self.args.option_score == "mean" else 1
            key = f"{item.example.task} {item.example.id}"
            sums.setdefault(key, (item, {}))[1][option] = value / length
        for item, found in sums.values():
            scores = [found[option] for option in range(len(item.options))]
            best = list(item.example.options)[scores.index(max(scores))]
            yield item, {"prediction": best, "scores": scores}

    @torch.no_grad()
    def generate(self, items: list[Item]) -> list[str]:
        ids, mask = self.pad([item.prompt for item in items], left=True)
        new = self.model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
        answers = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [answer.split("\n")[0].strip() for answer in answers]

    @torch.no_grad()
    def log_probabilities(self, bundles: list[Bundle]) -> list[tuple[Item, int, float]]:
        """(item, option, sum over its tokens): prefixes once, then every row's rest (its tail) on their cache."""
        rows = [(b, row) for b, bundle in enumerate(bundles) for row in bundle.rows]
        step, cache, found = len(rows), None, []
        if bundles[0].prefix:
            ids, mask = self.pad([b.rows[0].ids[: b.prefix] for b in bundles], left=True)
            cache = self.new_cache()
            self.forward(ids, [0], self.places(mask, 0) | {self.cache_name: cache})
            step = max(1, self.args.max_tokens_per_batch // max(len(row.ids) for _, row in rows))
        for i in range(0, len(rows), step):
            part = rows[i : i + step]
            tails, real = self.pad([row.ids[bundles[b].prefix :] for b, row in part], left=False)
            inputs = {}  # right-padded and causal: no mask is needed
            if cache is not None:
                owner = torch.tensor([b for b, _ in part], device=tails.device)
                inputs = self.places(torch.cat([mask[owner], torch.ones_like(real)], 1), mask.shape[1])
                inputs |= {self.cache_name: repeated(cache, owner)}
            found += self.read([(row, bundles[b].prefix) for b, row in part], tails, inputs)
        return found

    def read(self, rows: list[tuple[Row, int]], tails: Tensor, inputs: dict) -> list[tuple[Item, int, float]]:
        """One forward of the tails [B, T], and the sums of the log-probabilities that it gives."""
        wanted = [(r, row, prefix, option) for r, (row, prefix) in enumerate(rows) for option in row.options]
        positions, targets = [], []
        for r, row, prefix, option in wanted:
            first = r * tails.shape[1] + row.start - prefix
            positions += range(first, first + len(row.item.options[option]))
            targets += row.item.options[option]
        logits = self.forward(tails, positions, inputs).logits[0].split(1024)  # never a float32 copy of them all
        parts = zip(logits, torch.tensor(targets, device=tails.device).split(1024), strict=True)
        losses = iter(torch.cat([cross_entropy(x.float(), y, reduction="none") for x, y in parts]).tolist())
        return [
            (row.item, option, -math.fsum(itertools.islice(losses, len(row.item.options[option]))))
            for _, row, _, option in wanted
        ]

    def forward(self, ids: Tensor, positions: list[int], inputs: dict):
        self.positions = torch.tensor(positions, device=ids.device)
        return self.model(input_ids=ids, use_cache=self.cache_name in inputs, **inputs)

    def pad(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """ids and mask, [B, T]."""
        side = "left" if left else "right"
        ids = pad_sequence([torch.tensor(row) for row in rows], True, 0, side)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
        return ids.to(self.model.device), mask.to(self.model.device)

    def places(self, mask: Tensor, start: int) -> dict:
        """Attention mask, and the positions from `start` on, which do not count the padding on the left."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return {"attention_mask": mask} | ({"position_ids": positions} if "position_ids" in self.takes else {})


def repeated(cache, rows: Tensor):
    """A cache of the given rows of `cache`, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]  # selecting puts new tensors into a layer
    chosen.batch_select_indices(rows)
    return chosen


def load(args, device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of --model, or an adapter's base with the adapter on it, and the tokenizer."""
    folder, base, remedy = Path(args.model), args.model, "give a causal LM or an adapter's folder"
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype, trust = torch.bfloat16 if half else torch.float32, args.trust_remote_code
    try:
        if adapted := (folder / "adapter_config.json").exists():
            named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            base = args.base_model or named
            remedy = f"its base model is {base}, give another folder with --base_model"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=trust)
        if adapted:
            model = peft.PeftModel.from_pretrained(model, args.model)
    except Exception as error:  # the hub, safetensors, peft and remote code each raise their own kinds
        raise UserError(f"--model {args.model}: {' '.join(str(error).split())[:160]}: {remedy}") from None
    own = (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(argparse.Namespace(model=args.model if own else base, trust_remote_code=trust))
    positions = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > positions:
        raise UserError(f"--max_length {args.max_length} exceeds the model's {positions} positions: lower it")
    return model.to(device, dtype).eval(), tokenizer


# ------------------------------------------------------------------------------------------------------------ metrics


def wilson(right: int, count: int) -> dict:
    """A share with its 95 % Wilson interval."""
    z, p = 1.96, right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
    return {"value": p, "low": max(0.0, low), "high": min(1.0, high), "count": count}


def bootstrap(units: list[list[float]], statistic: Callable[[Tensor], Tensor]) -> dict:
    """`statistic` of the units' summed counts, with a 95 % percentile bootstrap interval over 1,000 resamples."""
    counts = torch.tensor(units, dtype=torch.float64)  # [n, c]
    picks = torch.randint(len(counts), (1000, len(counts)), generator=torch.Generator().manual_seed(0))
    resampled = statistic(torch.stack([counts[pick].sum(0) for pick in picks]))  # [1000]
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": statistic(counts.sum(0)[None]).item(), "low": low, "high": high, "count": len(counts)}


def f1_of(sums: Tensor) -> Tensor:
    """Mean over classes of F1 from [.., 3 * classes] sums of hits, predicted and right; absent classes are left out."""
    hit, predicted, right = sums.unflatten(-1, (-1, 3)).unbind(-1)  # [.., classes]
    present = predicted + right > 0
    return (2 * hit / (predicted + right).clamp(min=1)).sum(-1) / present.sum(-1).clamp(min=1)


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks (official scripts of SQuAD and ReCoRD)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def text_scores(prediction: str, gold: list[str]) -> tuple[float, float]:
    """Exact match and F1 over words, each the best over the accepted answers (SQuAD, ReCoRD)."""
    words, em, f1 = normalize(prediction).split(), 0.0, 0.0
    for answer in gold:
        others = normalize(answer).split()
        common = (Counter(words) & Counter(others)).total()
        em = max(em, float(words == others))
        f1 = max(f1, 2 * common / max(1, len(words) + len(others)))
    return em, f1


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def drop_normalize(text: str) -> str:
    """Words of the official DROP script: split at blanks and hyphens, numbers as floats, no articles."""
    words = []
    for word in re.split(" |-", text.lower()):
        if not is_number(word):
            word = "".join(c for c in word if c not in string.punctuation)
        word = str(float(word)) if is_number(word) else re.sub(r"\b(a|an|the)\b", " ", word)
        words += word.split()
    return " ".join(words)


def drop_scores(prediction: str, gold: list[list[str]]) -> tuple[float, float]:
    """Exact match and F1 of spans aligned one to one, each the best over the accepted answers (DROP)."""
    predicted = [drop_normalize(span) for span in prediction.split(SPAN_SEPARATOR)]
    em = f1 = 0.0
    for spans in gold:
        answer = [drop_normalize(span) for span in spans]
        em = max(em, float(set(predicted) == set(answer) and len(predicted) == len(answer)))
        f1 = max(f1, round(align([set(x.split()) for x in predicted], [set(x.split()) for x in answer]), 2))
    return em, f1


def align(predicted: list[set], gold: list[set]) -> float:
    """Mean F1 of bags of words under the best one-to-one alignment; a gold number must be met."""
    best = {0: 0.0}  # gold bags used, as bits -> the best sum so far
    for bag in predicted:
        for used, total in list(best.items()):
            for j, other in enumerate(gold):
                numbers = {word for word in other if is_number(word)}
                f1 = 2 * len(bag & other) / (len(bag) + len(other)) if bag | other else 1.0
                if not used >> j & 1 and f1 and (not numbers or numbers & bag):
                    best[used | 1 << j] = max(best.get(used | 1 << j, 0.0), total + f1)
    return max(best.values()) / max(len(predicted), len(gold))


def mean_of(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]


def metrics_of(task: str, pairs: list[tuple[Example, object]]) -> dict[str, dict]:
    """The official metrics of a task, and accuracy, from (example, prediction)."""
    if task in ("SQuAD", "DROP", "ReCoRD"):
        judge = drop_scores if task == "DROP" else text_scores
        scores = [judge(prediction, example.gold) for example, prediction in pairs]
        found = {"em": wilson(round(sum(em for em, _ in scores)), len(scores))}
        found["f1"] = bootstrap([[f1, 1.0] for _, f1 in scores], mean_of)
    else:
        found = {}
    if task not in ("SQuAD", "DROP"):
        found["accuracy"] = wilson(sum(prediction in example.gold for example, prediction in pairs), len(pairs))
    if task == "CB":
        units = [
            [x for label in LABELS[task] for x in (p == label == e.gold[0], p == label, e.gold[0] == label)]
            for e, p in pairs
        ]
        found["macro_f1"] = bootstrap(units, f1_of)
    if task == "MultiRC":
        questions: dict[str, list] = {}
        for example, p in pairs:
            questions.setdefault(example.id.rpartition(".")[0], []).append((bool(p), bool(example.gold[0])))
        em = sum(all(p == g for p, g in answers) for answers in questions.values())
        found["em"] = wilson(em, len(questions))
        units = [[sum(p and g for p, g in x), sum(p for p, _ in x), sum(g for _, g in x)] for x in questions.values()]
        found["f1a"] = bootstrap(units, f1_of)
    return found


# -------------------------------------------------------------------------------------------------------------- score


def fingerprint(model) -> str:
    """Equal for equal weights: 64 numbers of every parameter."""
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(args, examples: list[Example], model) -> dict:
    """All that shapes the scores: a run may only go on with the same."""
    names = ("option_score", "max_length", "max_new_tokens", "limit", "seed")
    settings = {f"--{name}": getattr(args, name) for name in names} | {"--dtype": str(model.dtype)}
    settings |= {"--model": args.model, "weights": fingerprint(model)}
    for task in dict.fromkeys(e.task for e in examples):
        rows = [(e.id, e.prompt, list(e.options.items()), e.gold) for e in examples if e.task == task]
        settings[f"{task} data"] = f"{len(rows)} questions {hashlib.sha256(repr(rows).encode()).hexdigest()[:16]}"
    return settings


def read_predictions(folder: Path) -> dict[tuple[str, str], dict]:
    """(task, id) -> record, of all processes; a line that a kill cut short is dropped."""
    records = {}
    for path in folder.glob("predictions*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                records[record["task"], record["id"]] = record
    return records


def merge(folder: Path, examples: list[Example]) -> dict[tuple[str, str], dict]:
    """All processes' predictions into predictions.jsonl, in the order of the examples."""
    records = read_predictions(folder)
    with replacing(folder / "predictions.jsonl") as aside, open(aside, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(records[e.task, e.id]) + "\n" for e in examples if (e.task, e.id) in records)
    for path in folder.glob("predictions-*.jsonl"):
        path.unlink()
    return records


def open_folder(folder: Path, settings: dict, overwrite: bool) -> None:
    """Check that --output_dir holds nothing, or a part of this very run."""
    path = folder / "settings.json"
    if overwrite:
        for old in [*folder.glob("predictions*.jsonl"), path, folder / "results.json"]:
            old.unlink(missing_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else settings
    for name in settings | saved:
        if settings.get(name) != saved.get(name):
            raise UserError(
                f"{name} is {settings.get(name)}, but {folder} holds a run with {saved.get(name)}: use the same, "
                "choose another --output_dir or add --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(json.dumps(settings, indent=1))


def report(folder: Path, settings: dict, items: list[Item], records: dict) -> None:
    """results.json and a table."""
    results = {}
    print(f"\n{'task':<8} {'metric':<9} {'score':>6}   {'95 % interval':<14} {'count':>6} {'shortened':>9}")
    for task in dict.fromkeys(item.example.task for item in items):
        mine = [item for item in items if item.example.task == task]
        found = metrics_of(task, [(i.example, records[task, i.example.id]["prediction"]) for i in mine])
        shortened = sum(item.shortened for item in mine)
        results[task] = found | {"questions": len(mine), "shortened_prompts": shortened}
        for name, x in found.items():
            interval = f"{100 * x['low']:.1f} to {100 * x['high']:.1f}"
            print(f"{task:<8} {name:<9} {100 * x['value']:>6.1f}   {interval:<14} {x['count']:>6} {shortened:>9}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    with replacing(folder / "results.json") as aside:
        aside.write_text(json.dumps({"results": results, "settings": settings, "versions": versions}, indent=1))


def score(args) -> None:
    examples, folder = read_tasks(args), Path(args.output_dir)
    state = PartialState(timeout=timedelta(days=1))  # processes that are done wait for the others
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != state.num_processes:
        raise UserError(f"{launched} processes were launched, but no GPU was found: set ACCELERATE_USE_CPU=true")
    model, tokenizer = load(args, state.device)
    items = encode(examples, tokenizer, args)
    settings = settings_of(args, examples, model)
    if state.is_main_process:
        open_folder(folder, settings, args.overwrite)
        merge(folder, examples)  # drops what a kill left half written
    state.wait_for_everyone()
    done = read_predictions(folder)
    state.wait_for_everyone()  # nobody writes before all have read
    scorer = Scorer(model, tokenizer, args)
    rank = state.process_index
    own = folder / (f"predictions-{rank}.jsonl" if rank else "predictions.jsonl")
    batches = batches_of(items, args)[rank :: state.num_processes]
    for kind, parts in tqdm(batches, "scoring", unit="batch", disable=not state.is_main_process):
        inside = parts if kind == "generate" else [row.item for part in parts for row in part.rows]
        if any((item.example.task, item.example.id) not in done for item in inside):
            for item, record in scorer.run(kind, parts):
                append(own, {"task": item.example.task, "id": item.example.id} | record)
    state.wait_for_everyone()
    if state.is_main_process:
        report(folder, settings, items, merge(folder, examples))


# ------------------------------------------------------------------------------------------------------- command line


def build_parser() -> Parser:
    parser = Parser("eval_superglue.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    flag = argparse.BooleanOptionalAction
    for name, what in (("prepare", "write training rows for train_colm.py"), ("score", "evaluate a model or adapter")):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        add = command.add_argument
        add("tasks", nargs="+", metavar="TASK=FILE", help=f"a labelled file of a task of {', '.join(PROMPTS)}")
        add("--limit", type=positive, help="so many random rows of each file (passages of MultiRC and ReCoRD)")
        add("--seed", type=int, default=0, help="of --limit")
        add("--overwrite", action=flag, default=False, help="replace what the output holds")
    add_score, add_prepare = add, commands.choices["prepare"].add_argument
    add_prepare("--output", required=True, help="a .jsonl file")
    add_score("--model", required=True, help="folder or hub id of a causal LM, or the folder of a PEFT adapter")
    add_score("--base_model", help="the adapter's base, where it is not where the adapter says")
    add_score("--trust_remote_code", action=flag, default=False, help="run Python code that the repository ships")
    add_score("--output_dir", required=True)
    add_score("--option_score", choices=["mean", "sum"], default="mean", help="of an option's token log-probabilities")
    add_score("--max_length", type=positive, default=512, help="tokens; longer prompts are cut on their left")
    add_score("--max_new_tokens", type=positive, default=50, help="of an answer to SQuAD and DROP")
    add_score("--max_tokens_per_batch", type=positive, default=16384, help="padding included")
    add_score("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, give 1 or more")
    return int(text)


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can mend into one line and exit code 2."""
    try:
        args = build_parser().parse_args(argv)
        prepare(args) if args.command == "prepare" else score(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
