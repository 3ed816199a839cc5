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
 2. What the options of a prompt, and the questions on a passage, begin with is encoded once: they share its key-value
    cache, and each goes on with its own rest.
 3. Batches depend on the examples alone, and processes take one each: neither their number nor where a run was stopped
    changes a bit of the scores. The first process writes all predictions down after every round.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig

from colm_data import Parser, UserError, read_rows
from eval_math import load, out_of_memory, wilson

# ------------------------------------------------------------------------------------------------ tasks and templates

YES_NO = {True: "Yes", False: "No"}
TASKS = {  # prompt, and label in the file -> option, where the rows do not bring options of their own
    "SST-2": ("{sentence} It was", {"1": " great", "0": " terrible"}),
    "CB": (
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    ),
    "RTE": (
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        {"entailment": "Yes", "not_entailment": "No"},
    ),
    "BoolQ": ("{passage} {question}?", {True: " Yes", False: " No"}),
    "WiC": (
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        YES_NO,
    ),
    "WSC": ('{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n', YES_NO),
    "COPA": ("{premise} {so}", {}),
    "MultiRC": (
        '{passage}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        YES_NO,
    ),
    "ReCoRD": ("{passage}\n-", {}),
    "SQuAD": ("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", {}),  # these two are generated
    "DROP": ("Passage: {passage}\nQuestion: {question}\nAnswer:", {}),
}
SPAN_SEPARATOR = "; "  # between the spans of a DROP answer, in completions and in what the model writes


@dataclass
class Example:
    """One question."""

    id: str  # task, row of the file and place in the row: "MultiRC 3.0.1"
    task: str
    prompt: str
    options: dict  # label in the file -> text; empty where the answer is generated
    gold: list  # what is accepted: the label, texts (ReCoRD, SQuAD) or lists of spans (DROP)
    source: str | None
    prompt_ids: list[int] = field(default_factory=list)
    option_ids: list[list[int]] = field(default_factory=list)
    shortened: bool = False

    @property
    def passage(self) -> str:
        """Equal for questions that begin alike."""
        return self.id.split(".")[0] if self.options and not self.shortened else self.id


class Texts(dict):
    """Fields of a template, without surrounding blanks."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if not isinstance(value, str):
            raise TypeError(f"field {name!r} is a {type(value).__name__}, not a text")
        return value.strip()


def questions(task: str, row: dict) -> Iterator[tuple[str, dict, dict, list]]:
    """(place in the row, fields of the prompt, options, accepted answers) of every question of a row of the file."""
    text, options = Texts(row), TASKS[task][1]
    if task == "BoolQ":
        question = text["question"].rstrip("?")
        yield "", row | {"question": question[:1].upper() + question[1:]}, options, [row["label"]]
    elif task == "WSC":
        spans = Texts(row["target"])
        yield "", row | {"pronoun": spans["span2_text"].lower(), "noun": spans["span1_text"]}, options, [row["label"]]
    elif task == "COPA":  # a choice goes on with the sentence that the prompt begins
        choices = [text["choice1"], text["choice2"]]
        options = {i: " " + (c if c.split(" ")[0] == "I" else c[:1].lower() + c[1:]) for i, c in enumerate(choices)}
        so = "because" if text["question"] == "cause" else "so"
        yield "", {"premise": text["premise"].removesuffix("."), "so": so}, options, [row["label"]]
    elif task == "MultiRC":
        for q, question in enumerate(row["passage"]["questions"]):
            for a, answer in enumerate(question["answers"]):
                fields = {"passage": row["passage"]["text"], "question": question["question"], "answer": answer["text"]}
                yield f".{q}.{a}", fields, options, [answer["label"]]
    elif task == "ReCoRD":
        passage = row["passage"]["text"]
        entities = [passage[e["start"] : e["end"] + 1].strip() for e in row["passage"]["entities"]]
        for q, question in enumerate(row["qas"]):
            query, answers = Texts(question)["query"], [Texts(answer)["text"] for answer in question["answers"]]
            options = {entity: " " + query.replace("@placeholder", entity) for entity in entities}
            yield f".{q}", {"passage": passage.replace("@highlight\n", "- ")}, options, answers
    elif task == "SQuAD":
        for p, paragraph in enumerate(row["paragraphs"]):
            for q, question in enumerate(paragraph["qas"]):
                answers = [Texts(answer)["text"] for answer in question["answers"]]
                yield f".{p}.{q}", question | {"title": row["title"], "context": paragraph["context"]}, {}, answers
    elif task == "DROP":
        for q, question in enumerate(row["qa_pairs"]):
            answers = [question["answer"], *question.get("validated_answers", [])]
            answers = [spans for answer in answers if any(spans := drop_spans(answer))]
            yield f".{q}", question | {"passage": row["passage"], "source": row["source"]}, {}, answers
    else:
        yield "", row, options, [row["label"]]


def drop_spans(answer: dict) -> list[str]:
    """A number, the spans, or a date as 'day month year' (answer_json_to_strings of the official script)."""
    if number := str(answer["number"]).strip():
        return [number]
    date = [answer["date"].get(x, "") for x in ("day", "month", "year")]
    return [span.strip() for span in answer["spans"]] or [" ".join(date).strip()]


# ------------------------------------------------------------------------------------------------------ reading files


def read_file(task: str, path: str) -> Iterable[tuple[dict, str]]:
    """Rows, and where each stands: of JSON lines, of SST-2's table, of the one JSON object of SQuAD or DROP."""
    if task not in ("SST-2", "SQuAD", "DROP"):
        return zip(*read_rows(path), strict=True)
    with open(path, encoding="utf-8", newline="") as f:
        if task == "SST-2":
            table = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(row, f"{path} line {table.line_num}") for row in table]
        data = json.load(f)
    if task == "SQuAD":
        return [(article, f"{path} article {i}") for i, article in enumerate(data["data"])]
    return [(passage | {"source": name.split("_")[0]}, f"{path} passage {name}") for name, passage in data.items()]


def read_task(task: str, path: str) -> list[Example]:
    """Every question of a file; whatever is amiss with it ends here."""
    examples, place = [], path
    try:
        for number, (row, place) in enumerate(read_file(task, path)):
            for within, fields, options, answers in questions(task, row):
                gold = [answer for answer in answers if not options or answer in options]
                if not gold:
                    known = f"one of {', '.join(map(repr, options))}" if options else "an answer (as in SQuAD 2.0)"
                    raise UserError(f"{place}: {answers} is not {known}: mend or remove the row")
                prompt = TASKS[task][0].format_map(Texts(fields))
                id = f"{task} {number}{within}"
                examples.append(Example(id, task, prompt, options, gold, fields.get("source")))
    except KeyError as error:
        raise UserError(f"{place} has no field {error}: give a labelled file in {task}'s release format") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{place} can't be read as {task} ({error}): give a file in its release format") from None
    if not examples:
        raise UserError(f"{path} holds no question of {task}: give a file in its release format")
    return examples


def read_tasks(args) -> list[Example]:
    """The questions of all TASK=FILE arguments, or those on --limit random passages of each file."""
    examples, seen = [], set()
    for argument in args.tasks:
        task, _, path = argument.partition("=")
        if task not in TASKS or not path or task in seen:
            raise UserError(f"{argument}: write TASK=FILE, each task once, with a task of {', '.join(TASKS)}")
        seen.add(task)
        mine = read_task(task, path)
        if args.limit:
            passages = list(dict.fromkeys(e.passage for e in mine))
            draw = random.Random(f"{task} {args.seed}")
            chosen = set(draw.sample(passages, min(args.limit, len(passages))))
            mine = [e for e in mine if e.passage in chosen]
        examples += mine
    return examples


# ------------------------------------------------------------------------------------------------------ training rows


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
    save(path, json_lines(training_row(e, len(args.tasks) > 1) for e in examples))
    print(f"{path}: " + ", ".join(f"{n} rows of {task}" for task, n in Counter(e.task for e in examples).items()))


# ---------------------------------------------------------------------------------------------------- scoring options


def encode(examples: list[Example], tokenizer, args) -> None:
    """Fill in the tokens. Prompts are cut on their left, but for BOS, to fit with the longest option or answer."""
    texts = [text for e in examples for text in e.options.values()] or [""]
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=True, verbose=False)["input_ids"]
    options = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    for e, prompt in zip(examples, prompts, strict=True):
        e.option_ids = [next(options) for _ in e.options]
        longest = max(map(len, e.option_ids), default=args.max_new_tokens)
        room = args.max_length - longest  # the same for all options, so that they share the prompt
        if room < 2:
            raise UserError(f"--max_length {args.max_length} leaves {e.id} no prompt before {longest} tokens: raise it")
        bos = int(prompt[0] == tokenizer.bos_token_id)
        e.shortened = len(prompt) > room
        e.prompt_ids = prompt[:bos] + prompt[bos - room :] if e.shortened else prompt


def batches_of(examples: list[Example], args) -> list[list[list[Example]]]:
    """Batches of passages with their questions, of similar length; options and generation apart."""
    passages: dict[str, list[Example]] = {}
    for e in examples:
        passages.setdefault(e.passage, []).append(e)

    def width(group: list[Example]) -> int:
        return max(len(e.prompt_ids) + max(map(len, e.option_ids), default=args.max_new_tokens) for e in group)

    batches, groups = [], sorted(passages.values(), key=width, reverse=True)
    for left in ([g for g in groups if g[0].options], [g for g in groups if not g[0].options]):
        while left:
            count = max(1, args.max_tokens_per_batch // width(left[0]))
            batches.append(left[:count])
            left = left[count:]
    return batches


@torch.inference_mode()
def score_options(model, groups: list[list[Example]], args) -> list[dict]:
    """Predictions for groups of questions: the beginning of a group runs once, every row goes on from its cache."""
    prefixes, rows = rows_of(groups)
    ids, mask = pad(prefixes, "left", model.device)
    cache = DynamicCache()  # of full length: sliding windows are the mask's business
    forward(model, ids, mask, cache, keep=1)
    scores = {e.id: [0.0] * len(e.options) for group in groups for e in group}
    step = max(1, args.max_tokens_per_batch // (ids.shape[1] + max(len(tail) for (_, tail), _ in rows)))
    for part in (rows[i : i + step] for i in range(0, len(rows), step)):
        owner = torch.tensor([g for (g, _), _ in part], device=model.device)
        tails, real = pad([tail for (_, tail), _ in part], "right", model.device)
        copies = DynamicCache((layer.keys[owner], layer.values[owner]) for layer in cache.layers)
        logits = forward(model, tails, torch.cat([mask[owner], real], 1), copies)  # [rows, T, V]
        for id, number, log_p in log_probabilities(logits, part):
            scores[id][number] = (log_p.mean() if args.option_score == "mean" else log_p.sum()).item()
    examples = [e for group in groups for e in group]
    best = [max(zip(scores[e.id], e.options, strict=True), key=lambda x: x[0])[1] for e in examples]
    return [{"id": e.id, "prediction": x, "scores": scores[e.id]} for e, x in zip(examples, best, strict=True)]


def rows_of(groups: list[list[Example]]) -> tuple[list[list[int]], list]:
    """What each group begins with, and rows ((group, tail), [(id, number of an option, its tokens)]).

    An option's last token predicts nothing that is asked for: options that differ in it alone share a row.
    """
    prefixes, rows = [], {}
    for g, group in enumerate(groups):
        columns = zip(*(e.prompt_ids[:-1] for e in group), strict=False)
        prefixes.append([column[0] for column in itertools.takewhile(lambda x: len(set(x)) == 1, columns)])
        for e in group:
            for number, option in enumerate(e.option_ids):
                tail = (*e.prompt_ids[len(prefixes[g]) :], *option[:-1])
                rows.setdefault((g, tail), []).append((e.id, number, option))
    return prefixes, list(rows.items())


def log_probabilities(logits: Tensor, rows: list) -> Iterator[tuple[str, int, Tensor]]:
    """(id, number of an option, log-probabilities of its tokens): a tail's last positions predict them."""
    options, where = [], []
    for r, ((_, tail), sharing) in enumerate(rows):
        for id, number, tokens in sharing:
            options.append((id, number, len(tokens)))
            where += [(r, len(tail) - len(tokens) + i, token) for i, token in enumerate(tokens)]
    row, position, token = torch.tensor(where, device=logits.device).unbind(1)
    log_p = -cross_entropy(logits[row, position].float(), token, reduction="none").cpu()  # [tokens of all options]
    for (id, number, _), part in zip(options, log_p.split([length for _, _, length in options]), strict=True):
        yield id, number, part


def pad(rows: list, side: str, device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, T]."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, -1, side).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


def forward(model, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int = 0) -> Tensor:
    """Logits of the last `keep` (0: all) of `ids`, which go on from the cache; the mask [B, cached + T] covers both."""
    takes = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in takes else "past_key_values": cache}  # the newer and the older name
    options |= {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **options).logits


# --------------------------------------------------------------------------------------------------------- generation


def greedy(tokenizer, args) -> GenerationConfig:
    """Until EOS, the end of the line or --max_new_tokens."""
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    stop = [tokenizer.eos_token_id, *(i for i, word in enumerate(words) if "\n" in word)]
    limit = {"max_new_tokens": args.max_new_tokens, "eos_token_id": stop, "pad_token_id": stop[0]}
    return GenerationConfig(do_sample=False, **limit)


@torch.no_grad()
def generate(model, tokenizer, groups: list[list[Example]]) -> list[dict]:
    """Predictions for groups of one question each: the first line of greedy answers."""
    examples = [e for (e,) in groups]
    ids, mask = pad([e.prompt_ids for e in examples], "left", model.device)
    new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
    texts = [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return [{"id": e.id, "prediction": text} for e, text in zip(examples, texts, strict=True)]


# ------------------------------------------------------------------------------------------------------------ metrics


def share(right: list) -> dict:
    """Per cent, with its 95 % Wilson interval."""
    count, hits = len(right), int(sum(right))
    return {"score": 100 * hits / count, "interval": wilson(hits, count), "count": count}


def bootstrap(units: list, statistic: Callable[[Tensor], Tensor]) -> dict:
    """Per cent, with the 95 % percentile interval of 1,000 bootstrap samples of the units."""
    values, draw = torch.tensor(units, dtype=torch.float64), torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (1000, len(values)), generator=draw)
    samples = torch.stack([statistic(values[pick]) for pick in picks])  # [1000]
    interval = (100 * samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))).tolist()
    return {"score": 100 * statistic(values).item(), "interval": interval, "count": len(units)}


def class_f1(units: Tensor) -> Tensor:
    """Mean F1 over classes from [n, classes, 3] hits, predicted and right; classes that never occur are left out."""
    hit, predicted, right = units.sum(0).unbind(-1)  # [classes]
    return (2 * hit / (predicted + right)).nanmean().nan_to_num()


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
    """The official DROP script's: word by word, split at blanks and hyphens, numbers as floats."""
    words = [word if is_number(word) else normalize(word) for word in re.split(" |-", text.lower())]
    return " ".join(str(float(word)) if is_number(word) else word for word in words if word)


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


def metrics_of(task: str, pairs: list[tuple[Example, object]]) -> dict[str, dict]:
    """The official metrics of a task from (example, prediction)."""
    if task in ("SQuAD", "DROP", "ReCoRD"):
        judge = drop_scores if task == "DROP" else text_scores
        em, f1 = zip(*(judge(prediction, e.gold) for e, prediction in pairs), strict=True)
        return {"em": share(em), "f1": bootstrap(f1, torch.mean)}
    found = {"accuracy": share([p == e.gold[0] for e, p in pairs])}
    if task == "MultiRC":
        questions: dict[str, list[bool]] = {}
        for e, p in pairs:
            questions.setdefault(e.id.rpartition(".")[0], []).append(p == e.gold[0])
        found["em"] = share([all(right) for right in questions.values()])
    if task in ("CB", "MultiRC"):
        name, classes = ("macro_f1", TASKS["CB"][1]) if task == "CB" else ("f1a", [True])
        units = [[(p == x == e.gold[0], p == x, e.gold[0] == x) for x in classes] for e, p in pairs]
        found[name] = bootstrap(units, class_f1)
    return found


# ------------------------------------------------------------------------------------------------------------ results


def json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def save(path: Path, text: str) -> None:
    """Written aside: a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"tmp-{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_predictions(path: Path) -> dict[str, dict]:
    """Id -> record; a last line that a kill cut short is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {record["id"]: record for record in map(json.loads, lines)}


def settings_of(args, examples: list[Example]) -> dict:
    """All that shapes the scores: a run may only go on with the same."""
    free = ("command", "output_dir", "overwrite", "max_tokens_per_batch")
    weights = [(p.name, p.stat().st_mtime_ns) for p in sorted(Path(args.model).glob("*.safetensors"))]
    state = repr([weights, *((e.id, e.prompt, e.options, e.gold) for e in examples)])
    settings = {f"--{name}": value for name, value in vars(args).items() if name not in free}
    return settings | {"files of the data and the model": hashlib.sha256(state.encode()).hexdigest()[:16]}


def open_folder(folder: Path, settings: dict, overwrite: bool) -> None:
    """Check that --output_dir holds nothing, or a part of this very run."""
    path = folder / "settings.json"
    if overwrite:
        for name in ("predictions.jsonl", "results.json", "settings.json"):
            (folder / name).unlink(missing_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else settings
    for name in (name for name in settings if saved.get(name) != settings[name]):
        what = f"{name} is {settings[name]}, but {folder} holds a run with {saved.get(name)}"
        raise UserError(f"{what}: use the same, choose another --output_dir or add --overwrite")
    save(path, json.dumps(settings, indent=1))


def report(folder: Path, settings: dict, examples: list[Example], records: dict) -> None:
    """results.json and a table."""
    results = {}
    print(f"\n{'task':<8} {'metric':<9} {'score':>6}   {'95 % interval':<14} {'count':>6} {'shortened':>9}")
    for task in dict.fromkeys(e.task for e in examples):
        mine = [e for e in examples if e.task == task]
        found = metrics_of(task, [(e, records[e.id]["prediction"]) for e in mine])
        shortened = sum(e.shortened for e in mine)
        results[task] = found | {"questions": len(mine), "shortened_prompts": shortened}
        for name, x in found.items():
            interval = "{:.1f} to {:.1f}".format(*x["interval"])
            print(f"{task:<8} {name:<9} {x['score']:>6.1f}   {interval:<14} {x['count']:>6} {shortened:>9}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    found = {"results": results, "settings": settings, "versions": versions}
    save(folder / "results.json", json.dumps(found, indent=1))


# --------------------------------------------------------------------------------------------------------------- main


def score(args) -> None:
    examples, path = read_tasks(args), Path(args.output_dir, "predictions.jsonl")
    state, settings = PartialState(), settings_of(args, examples)
    model, tokenizer, *_ = load(args, state.device)
    positions = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > positions:
        raise UserError(f"--max_length {args.max_length} exceeds the model's {positions} positions: lower it")
    encode(examples, tokenizer, args)
    if state.is_main_process:
        open_folder(path.parent, settings, args.overwrite)
        save(path, json_lines(read_predictions(path).values()))  # without a line that was cut short
    state.wait_for_everyone()
    done = read_predictions(path)
    batches = [b for b in batches_of(examples, args) if any(e.id not in done for group in b for e in group)]
    model.generation_config = greedy(tokenizer, args)  # the checkpoint's own may sample
    rank, ranks = state.process_index, state.num_processes
    for i in tqdm(range(0, len(batches), ranks), "scoring", disable=not state.is_main_process):
        mine = []
        for batch in batches[i + rank : i + rank + 1]:  # none in the end, perhaps
            options = batch[0][0].options
            mine += score_options(model, batch, args) if options else generate(model, tokenizer, batch)
        records = gather_object(mine)
        if state.is_main_process:
            with open(path, "a") as f:
                f.write(json_lines(records))
    if state.is_main_process:
        records = read_predictions(path)
        save(path, json_lines(records[e.id] for e in examples))
        report(path.parent, settings, examples, records)


def build_parser() -> Parser:
    parser = Parser("eval_superglue.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    flag = argparse.BooleanOptionalAction
    for name, what in (("prepare", "write training rows for train_colm.py"), ("score", "evaluate a model or adapter")):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        add = command.add_argument
        add("tasks", nargs="+", metavar="TASK=FILE", help=f"a labelled file of a task of {', '.join(TASKS)}")
        add("--limit", type=positive, help="so many random questions of each file (passages of MultiRC and ReCoRD)")
        add("--seed", type=int, default=0, help="of --limit")
        add("--overwrite", action=flag, default=False, help="replace what the output holds")
    commands.choices["prepare"].add_argument("--output", required=True, help="a .jsonl file")
    add("--model", required=True, help="folder or hub id of a causal LM, or the folder of a PEFT adapter")
    add("--base_model", help="the adapter's base, where it has moved")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--output_dir", required=True)
    add("--option_score", choices=["mean", "sum"], default="mean", help="of an option's token log-probabilities")
    add("--max_length", type=positive, default=512, help="tokens; longer prompts are cut on their left")
    add("--max_new_tokens", type=positive, default=50, help="of an answer to SQuAD and DROP")
    add("--max_tokens_per_batch", type=positive, default=16384, help="padding included")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
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
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:  # of this process, whichever it is
        print(out_of_memory(args), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
