"""Training rows from, and scores on, SST-2, SuperGLUE, SQuAD and DROP.

For the experiments without given sources in Nguyen et al., "Mini-batch Coresets for Memory-efficient Language Model
Training on Data Mixtures", ICLR 2025, arXiv 2407.19580v4, section 5.4. Prompts are worded as in MeZO (Malladi et al.,
"Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv 2305.17333).

    python eval_superglue.py prepare CB=CB/train.jsonl --output cb.jsonl
    python train_colm.py --model microsoft/phi-2 --train_file cb.jsonl --keep_sources none --output_dir out
    accelerate launch eval_superglue.py score CB=CB/val.jsonl SQuAD=dev-v1.1.json --model out/final --output_dir scores
    accelerate launch eval_superglue.py score CB RTE BoolQ --model out/final --output_dir scores   # data from the hub

A task is given as TASK=FILE, as TASK=org/name, org/name:split or org/name:config:split (a dataset of the Hugging Face
hub), or as TASK alone, which reads the dataset of this table. Where no split is named, `prepare` reads the training and
`score` the validation split.

    task                                      official file                       hub dataset
    SST-2                                     SST-2/dev.tsv of GLUE               nyu-mll/glue:sst2
    CB, RTE, BoolQ, WiC, WSC, COPA,           CB/val.jsonl and so on of           aps/super_glue:cb and so on,
    MultiRC, ReCoRD                           SuperGLUE, version 2                wsc.fixed for WSC
    SQuAD                                     dev-v1.1.json                       rajpurkar/squad:plain_text
    DROP                                      drop_dataset_dev.json               EleutherAI/drop:default

A hub dataset that was saved as JSON lines (.jsonl) is read too. Its labels are integers, and its rows of MultiRC,
ReCoRD, SQuAD and DROP hold one question each.

Implementation details worth knowing:
 1. An option's score is the mean (or sum) of its tokens' log-probabilities after the prompt. Prompt and option are
    tokenised apart, as the trainer tokenises prompt and completion; no EOS is scored.
 2. What the options of a prompt, and the questions on a passage, begin with is encoded once: they share its key-value
    cache, and each goes on with its own rest.
 3. Batches depend on the examples alone, and processes take one each: neither their number nor where a run was stopped
    changes a bit of the scores. The first process writes all predictions down after every round.
 4. With --chat_template the prompt is a user's turn, rendered by the tokenizer's template, and the options are answers.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import inspect
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
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig

from colm_data import Parser, UserError, hush_libraries, one_line, prompt_ids, read_rows, start_tokens
from eval_math import find_file, load, out_of_memory, trained_on_chats, wilson
from train_colm import BASE_PRECISIONS, trained_precision

OFFICIAL_MAX_LENGTH = 2048  # MeZO's, whose prompts these are; 512 cuts 8.8 % of MultiRC's prompts (Phi-2's tokens)

# ------------------------------------------------------------------------------------------------------------ questions


class Question(NamedTuple):
    """What a row of the file asks once."""

    place: str  # within the row: "" for the only question, ".2.0" for the third question's first answer
    fields: dict  # of the prompt's template
    options: dict  # label in the file -> text to score; empty where the answer is generated
    accepted: list  # labels, texts (ReCoRD, SQuAD) or lists of spans (DROP)


class Texts(dict):
    """Fields of a template, without surrounding blanks."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if not isinstance(value, str):
            raise TypeError(f"field {name!r} is a {type(value).__name__}, not a text")
        return value.strip()


# Each of these functions yields the questions of one row in the release's form; `options` are those of the task.


def one_question(row: dict, options: dict) -> Iterator[Question]:
    yield Question("", row, options, [row["label"]])


def boolq_question(row: dict, options: dict) -> Iterator[Question]:
    question = Texts(row)["question"].rstrip("?")  # the template adds one question mark
    question = question[:1].upper() + question[1:]
    label = row["label"] if "label" in row else row["answer"]  # google/boolq calls it answer
    yield Question("", row | {"question": question}, options, [label])


def wsc_question(row: dict, options: dict) -> Iterator[Question]:
    spans = Texts(row["target"])
    fields = {"text": row["text"], "pronoun": spans["span2_text"].lower(), "noun": spans["span1_text"]}
    yield Question("", fields, options, [row["label"]])


def copa_question(row: dict, options: dict) -> Iterator[Question]:
    """A choice goes on with the sentence that the prompt begins, so that its first word is not capitalised."""
    text = Texts(row)
    options = {}
    for label, choice in enumerate([text["choice1"], text["choice2"]]):
        if choice.split(" ")[0] != "I":
            choice = choice[:1].lower() + choice[1:]
        options[label] = " " + choice
    conjunction = "because" if text["question"] == "cause" else "so"
    fields = {"premise": text["premise"].removesuffix("."), "conjunction": conjunction}
    yield Question("", fields, options, [row["label"]])


def multirc_questions(row: dict, options: dict) -> Iterator[Question]:
    """Whether an answer is correct is asked of every answer of every question."""
    for q, question in enumerate(row["passage"]["questions"]):
        for a, answer in enumerate(question["answers"]):
            fields = {"passage": row["passage"]["text"], "question": question["question"], "answer": answer["text"]}
            yield Question(f".{q}.{a}", fields, options, [answer["label"]])


def record_questions(row: dict, options: dict) -> Iterator[Question]:
    """The options are the query with each entity of the passage in its gap."""
    passage = row["passage"]["text"]
    entities = []
    for entity in row["passage"]["entities"]:
        if isinstance(entity, str):  # on the hub
            entities.append(entity.strip())
        else:  # `end` is the place of the last character
            entities.append(passage[entity["start"] : entity["end"] + 1].strip())
    fields = {"passage": passage.replace("@highlight\n", "- ")}
    for q, question in enumerate(row["qas"]):
        query = Texts(question)["query"]
        options = {}
        for entity in entities:
            options[entity] = " " + query.replace("@placeholder", entity)
        yield Question(f".{q}", fields, options, texts_of(question["answers"]))


def squad_questions(row: dict, options: dict) -> Iterator[Question]:
    for p, paragraph in enumerate(row["paragraphs"]):
        for q, question in enumerate(paragraph["qas"]):
            fields = {"title": row["title"], "context": paragraph["context"], "question": question["question"]}
            yield Question(f".{p}.{q}", fields, options, texts_of(question["answers"]))


def drop_questions(row: dict, options: dict) -> Iterator[Question]:
    for q, question in enumerate(row["qa_pairs"]):
        accepted = []
        for answer in [question["answer"], *question.get("validated_answers", [])]:
            spans = drop_spans(answer)
            if any(spans):  # some answers of the release are empty
                accepted.append(spans)
        fields = {"passage": row["passage"], "question": question["question"], "source": row["source"]}
        yield Question(f".{q}", fields, options, accepted)


def texts_of(answers: list[dict]) -> list[str]:
    return [Texts(answer)["text"] for answer in answers]


def drop_spans(answer: dict) -> list[str]:
    """A number, the spans, or a date as 'day month year' (answer_json_to_strings of the official script)."""
    number = str(answer["number"]).strip()
    if number:
        return [number]
    if answer["spans"]:
        return list(map(str.strip, answer["spans"]))
    date = answer["date"]
    return [" ".join([date.get("day", ""), date.get("month", ""), date.get("year", "")]).strip()]


# ---------------------------------------------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    questions: Callable[[dict, dict], Iterator[Question]]
    template: str  # of the prompt
    options: dict  # label in the file -> text to score; empty where rows have their own, or the answer is generated
    hub: str  # dataset and config that are read where no file is given
    hub_labels: tuple = ()  # what the hub's integer labels stand for; 0 and 1 are Python's False and True


YES_NO = {True: "Yes", False: "No"}
TASKS = {
    "SST-2": Task(
        one_question,
        "{sentence} It was",
        {"1": " great", "0": " terrible"},
        "nyu-mll/glue:sst2",
        ("0", "1"),
    ),
    "CB": Task(
        one_question,
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        "aps/super_glue:cb",
        ("entailment", "contradiction", "neutral"),
    ),
    "RTE": Task(
        one_question,
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        {"entailment": "Yes", "not_entailment": "No"},
        "aps/super_glue:rte",
        ("entailment", "not_entailment"),
    ),
    # MeZO has three templates for BoolQ and uses its third, with the option on a line of its own
    "BoolQ": Task(boolq_question, "{passage} {question}?\n", YES_NO, "aps/super_glue:boolq"),
    "WiC": Task(
        one_question,
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        YES_NO,
        "aps/super_glue:wic",
    ),
    "WSC": Task(
        wsc_question,
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n',
        YES_NO,
        "aps/super_glue:wsc.fixed",
    ),
    "COPA": Task(copa_question, "{premise} {conjunction}", {}, "aps/super_glue:copa"),
    "MultiRC": Task(
        multirc_questions,
        '{passage}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        YES_NO,
        "aps/super_glue:multirc",
    ),
    "ReCoRD": Task(record_questions, "{passage}\n-", {}, "aps/super_glue:record"),
    "SQuAD": Task(
        squad_questions,
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        {},
        "rajpurkar/squad:plain_text",
    ),
    "DROP": Task(
        drop_questions,
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        {},
        "EleutherAI/drop:default",
    ),
}
SPAN_SEPARATOR = "; "  # between the spans of a DROP answer, in completions and in what the model writes


@dataclass
class Example:
    """One question, ready to be asked."""

    id: str  # task, row of the file and place in the row: "MultiRC 3.0.1"
    task: str
    prompt: str
    options: dict  # label in the file -> text; empty where the answer is generated
    gold: list  # what is accepted: the label, texts (ReCoRD, SQuAD) or lists of spans (DROP)
    source: str | None
    prompt_ids: list[int] = field(default_factory=list)
    option_ids: list[list[int]] = field(default_factory=list)  # in the order of `options`
    shortened: bool = False  # the prompt lost tokens on its left

    @property
    def passage(self) -> str:
        """Equal for questions that begin alike. A prompt that was cut no longer begins like the others."""
        if self.options and not self.shortened:
            return self.id.split(".")[0]
        return self.id


# -------------------------------------------------------------------------------------------------------- reading files


def split_argument(argument: str, hub_split: str) -> tuple[str, str]:
    """The task, and its file or hub dataset with its split, of an argument TASK, TASK=FILE or TASK=org/name...."""
    name, equals, where = argument.partition("=")
    if name not in TASKS or (equals and not where):
        raise UserError(f"{argument}: write TASK or TASK=FILE, with a task of {', '.join(TASKS)}")
    if not equals:
        return name, f"{TASKS[name].hub}:{hub_split}"
    if is_hub_id(where) and ":" not in where:
        return name, f"{where}:{hub_split}"
    return name, where


def is_hub_id(where: str) -> bool:
    """Whether `where` has the form org/name, org/name:split or org/name:config:split, and is no file."""
    has_form = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", where)
    return bool(has_form) and not Path(where).exists() and not where.endswith((".json", ".jsonl", ".gz", ".tsv"))


def read_hub(task: str, where: str) -> tuple[list[dict], list[str]]:
    """Rows of a hub dataset, and where each stands."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{task}: {where} is no file, and the hub needs a package: pip install datasets, or give {task}=FILE"
        ) from None
    path, *config, split = where.split(":")  # the config may be left out
    rows, places = [], []
    try:
        for number, row in enumerate(load_dataset(path, *config, split=split), 1):
            rows.append(row)
            places.append(f"{where} row {number}")
    except Exception as error:  # the hub's errors have no common class
        reason = one_line(error)
        raise UserError(f"{task}: {where} can't be read from the hub ({reason}): give {task}=FILE") from None
    return rows, places


def read_table(task: str, where: str) -> tuple[list[dict], list[str]]:
    """Rows of a file or hub dataset, and where each stands."""
    if is_hub_id(where):
        return read_hub(task, where)
    if not Path(where).exists():
        remedy = f"give a file, or {task} alone for the hub's {TASKS[task].hub}"
        raise UserError(f"{task}={where} does not exist: {remedy}")
    if task in ("SST-2", "SQuAD", "DROP") and not where.endswith((".jsonl", ".gz")):
        return read_single(task, where)
    return read_rows(where)


def read_single(task: str, path: str) -> tuple[list[dict], list[str]]:
    """Rows of a file that is no JSON lines: SST-2's table, or the one JSON object of SQuAD or DROP."""
    rows, places = [], []
    with open(path, encoding="utf-8", newline="") as f:
        if task == "SST-2":
            table = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)  # quotation marks are text
            for row in table:
                rows.append(row)
                places.append(f"{path} line {table.line_num}")
            return rows, places
        content = json.load(f)
    if task == "SQuAD":
        for i, article in enumerate(content["data"]):
            rows.append(article)
            places.append(f"{path} article {i}")
        return rows, places
    for name, passage in content.items():  # DROP's passages are called nfl_201, history_12 and so on
        rows.append(passage | {"source": name.split("_")[0]})
        places.append(f"{path} passage {name}")
    return rows, places


def release_form(task: str, row: dict) -> dict:
    """A row of the hub's copy in the release's form (MultiRC: `join_multirc`); a row of the release as it is."""
    names = TASKS[task].hub_labels
    label = row.get("label")
    if names and type(label) is int and 0 <= label < len(names):  # -1 marks the hub's unlabelled test rows
        return row | {"label": names[label]}
    if task == "WSC" and "span1_text" in row:
        return row | {"target": {"span1_text": row["span1_text"], "span2_text": row["span2_text"]}}
    if task == "ReCoRD" and isinstance(row["passage"], str):
        question = {"query": row["query"], "answers": as_texts(row["answers"])}
        return {"passage": {"text": row["passage"], "entities": row["entities"]}, "qas": [question]}
    if task == "SQuAD" and "context" in row:
        question = {"question": row["question"], "answers": as_texts(row["answers"]["text"])}
        return {"title": row["title"], "paragraphs": [{"context": row["context"], "qas": [question]}]}
    if task == "DROP" and "section_id" in row:
        if "answers_spans" in row:  # ucinlp/drop
            raise ValueError("it joins all accepted answers in one list, use EleutherAI/drop")
        validated = row["validated_answers"]
        if isinstance(validated, dict):  # `datasets` turns a list of dicts into a dict of lists
            columns = zip(validated["number"], validated["date"], validated["spans"], strict=True)
            validated = [{"number": number, "date": date, "spans": spans} for number, date, spans in columns]
        question = {"question": row["question"], "answer": row["answer"], "validated_answers": validated}
        return {"passage": row["passage"], "qa_pairs": [question], "source": row["section_id"].split("_")[0]}
    return row


def as_texts(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def join_multirc(rows: list[dict], places: list[str]) -> tuple[list[dict], list[str]]:
    """Passages in the release's form; the hub's rows, one for each answer, are joined to them.

    A question is right where all of its answers are, and its answers share their passage: both need them together.
    """
    joined, starts = [], []
    passages: dict[int, dict] = {}  # by the number of the paragraph
    questions: dict[tuple, dict] = {}  # by the numbers of paragraph and question
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict) or "paragraph" not in row:  # the release's form, or what read_task refuses
            joined.append(row)
            starts.append(place)
            continue
        paragraph, question = row["idx"]["paragraph"], row["idx"]["question"]
        if paragraph not in passages:
            passages[paragraph] = {"text": row["paragraph"], "questions": []}
            joined.append({"passage": passages[paragraph]})
            starts.append(place)
        if (paragraph, question) not in questions:
            questions[paragraph, question] = {"question": row["question"], "answers": []}
            passages[paragraph]["questions"].append(questions[paragraph, question])
        answer = {"text": row["answer"], "label": row["label"]}
        questions[paragraph, question]["answers"].append(answer)
    return joined, starts


def read_task(name: str, where: str) -> list[Example]:
    """Every question of a file or hub dataset; whatever is amiss with it ends here."""
    task = TASKS[name]
    examples, place, unanswered = [], where, 0
    try:
        rows, places = read_table(name, where)
        if name == "MultiRC":
            rows, places = join_multirc(rows, places)
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            for question in task.questions(release_form(name, row), task.options):
                gold = question.accepted
                if question.options:  # ReCoRD accepts spellings that are no entity of the passage
                    gold = [answer for answer in question.accepted if answer in question.options]
                if name == "DROP" and not gold:  # a few questions of the release
                    unanswered += 1
                    continue
                if not gold:
                    known = "an answer (as in SQuAD 2.0)"
                    if question.options:
                        known = f"one of {', '.join(map(repr, question.options))}"
                    raise UserError(f"{place}: {question.accepted} is not {known}: fix or remove the row")
                prompt = task.template.format_map(Texts(question.fields))
                id = f"{name} {number}{question.place}"
                examples.append(Example(id, name, prompt, question.options, gold, question.fields.get("source")))
    except KeyError as error:
        raise UserError(f"{place} has no field {error}: give a labelled file in {name}'s release format") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{place} can't be read as {name} ({error}): give a file in its release format") from None
    if unanswered and os.environ.get("RANK", "0") == "0":
        print(f"{where}: {unanswered} questions have no answer and are left out", file=sys.stderr)
    if not examples:
        raise UserError(f"{where} holds no question of {name}: give a file in its release format")
    return examples


def read_tasks(args) -> list[Example]:
    """The questions of all tasks, or those on --limit random passages of each."""
    hub_split = "train" if args.command == "prepare" else "validation"
    examples, seen = [], set()
    for argument in args.tasks:
        name, where = split_argument(argument, hub_split)
        if name in seen:
            raise UserError(f"{argument}: {name} is given twice: give each task once")
        seen.add(name)
        found = read_task(name, where)
        if args.limit:
            # whole passages are drawn: their questions share the passage's encoding, and MultiRC's EM needs them all
            passages = {}
            for e in found:
                passages.setdefault(e.passage, []).append(e)
            generator = random.Random(f"{name} {args.seed}")
            drawn = set(generator.sample(list(passages), min(args.limit, len(passages))))
            found = [e for e in found if e.passage in drawn]  # in the order of the file
        examples += found
    return examples


# -------------------------------------------------------------------------------------------------------- training rows


def training_row(example: Example, mixture: bool, chat: bool = False) -> dict:
    """A row of train_colm.py: prompt and completion, or messages. In a mixture the tasks are the sources."""
    best = example.gold[0]
    if example.options:
        completion = example.options[best]
    elif isinstance(best, str):
        completion = " " + best
    else:
        completion = " " + SPAN_SEPARATOR.join(best)
    if chat:
        row = {"messages": [as_turn("user", example.prompt), as_turn("assistant", completion)]}
    else:
        row = {"prompt": example.prompt, "completion": completion}
    source = example.task if mixture else example.source
    if source:
        row["source"] = source
    return row


def as_turn(role: str, text: str) -> dict:
    """A turn of a chat; the blanks that join prompt and option are the template's business."""
    return {"role": role, "content": text.strip()}


def prepare(args) -> None:
    path = Path(args.output)
    if path.exists() and not args.overwrite:
        raise UserError(f"--output {path} exists: add --overwrite or choose another")
    rows, counts = [], Counter()
    for e in read_tasks(args):
        rows.append(training_row(e, mixture=len(args.tasks) > 1, chat=bool(args.chat_template)))
        counts[e.task] += 1
    save(path, json_lines(rows))
    for task, count in counts.items():
        print(f"{path}: {count} rows of {task}")


# ----------------------------------------------------------------------------------------------------- from text to ids


ANSWER = "ANSWER"  # stands in for an option while the chat template is rendered


def chat_parts(tokenizer, prompt: str) -> tuple[str, str, str]:
    """What a chat has before an answer to `prompt`, the blanks that belong to the answer, and what comes after it.

    The template renders a whole exchange, which is cut at the answer. In most templates the part before it is the
    generation prompt. Where that opens a block of reasoning, an option would be scored as a thought: in the whole
    exchange the block is there and empty, or left out, as in training.
    """
    messages = [as_turn("user", prompt), as_turn("assistant", ANSWER)]
    try:
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what their authors chose
        raise UserError(f"--chat_template: the template refuses a question and an answer ({error}): drop it") from None
    before, found, after = chat.rpartition(ANSWER)
    if not found:
        raise UserError("--chat_template: the template leaves out the assistant's answer: drop it")
    blanks = before[len(before.rstrip(" ")) :]  # " Yes" is another token than "Yes"
    return before.removesuffix(blanks), blanks, after


def encode(examples: list[Example], tokenizer, args) -> None:
    """Fill in the tokens. Prompts are cut on their left, but for BOS, to fit with the longest option or answer."""
    start = start_tokens(tokenizer)
    prompts, options = [], []  # of each example: token ids, texts
    ids_of = {}  # most tasks have the same two or three options for all questions: each text is tokenised once
    for e in examples:
        texts = list(e.options.values())
        if args.chat_template:
            before, blanks, _ = chat_parts(tokenizer, e.prompt)
            # the template writes BOS itself, or wants none
            prompts.append(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
            texts = [blanks + text.strip() for text in texts]
        else:
            prompts.append(prompt_ids(tokenizer, e.prompt))
        options.append(texts)
        ids_of.update(dict.fromkeys(texts))
    if ids_of:
        tokens = tokenizer(list(ids_of), add_special_tokens=False, verbose=False)["input_ids"]
        ids_of = dict(zip(ids_of, tokens, strict=True))

    for e, prompt, texts in zip(examples, prompts, options, strict=True):
        e.option_ids = [ids_of[text] for text in texts]
        longest = max(map(len, e.option_ids), default=args.max_new_tokens)
        room = args.max_length - longest  # the same for all options, so that they share the prompt
        if room < max(2, len(start) + 1):  # two tokens: one that is encoded once, one that each option goes on from
            raise UserError(f"--max_length {args.max_length} leaves {e.id} no prompt before {longest} tokens: raise it")
        kept = len(start) if prompt[: len(start)] == start else 0
        e.shortened = len(prompt) > room
        if e.shortened:
            prompt = prompt[:kept] + prompt[kept - room :]
        e.prompt_ids = prompt


def batches_of(examples: list[Example], args) -> list[list[list[Example]]]:
    """Batches of passages with their questions, of similar length; options and generation apart."""
    passages: dict[str, list[Example]] = {}
    for e in examples:
        passages.setdefault(e.passage, []).append(e)

    def width(group: list[Example]) -> int:
        longest = 0
        for e in group:
            answer = max(map(len, e.option_ids), default=args.max_new_tokens)
            longest = max(longest, len(e.prompt_ids) + answer)
        return longest

    scored, generated = [], []
    for group in sorted(passages.values(), key=width, reverse=True):  # the longest first: memory runs out at once
        if group[0].options:
            scored.append(group)
        else:
            generated.append(group)
    batches = []
    for left in (scored, generated):
        while left:
            count = max(1, args.max_tokens_per_batch // width(left[0]))  # padding makes all as wide as the first
            batches.append(left[:count])
            left = left[count:]
    return batches


# ------------------------------------------------------------------------------------------------------ scoring options


class Row(NamedTuple):
    """A row of a batch: what goes on from a group's cached beginning, and the options that are read from it."""

    group: int
    tail: tuple[int, ...]  # the rest of the prompt and an option without its last token
    options: list[tuple[str, int, list[int]]]  # (id of the example, number of the option, its tokens)


@torch.inference_mode()
def score_options(model, groups: list[list[Example]], args) -> list[dict]:
    """Predictions for groups of questions: the beginning of a group runs once, every row goes on from its cache."""
    prefixes, rows = rows_of(groups)
    prefix, prefix_mask = pad(prefixes, "left", model.device)  # [groups, P]
    cache = DynamicCache()  # of full length: sliding windows are the mask's business
    forward(model, prefix, prefix_mask, cache, keep=1)  # fills the cache; its own logits are not needed

    scores: dict[str, list[float]] = {}
    for group in groups:
        for e in group:
            scores[e.id] = [0.0] * len(e.options)

    # a passage with many questions has more rows than passages: they run in parts of at most --max_tokens_per_batch
    longest_tail = max(len(row.tail) for row in rows)
    step = max(1, args.max_tokens_per_batch // (prefix.shape[1] + longest_tail))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        owners, tails = [], []
        for row in part:
            owners.append(row.group)
            tails.append(row.tail)
        owner = torch.tensor(owners, device=model.device)  # [rows]
        tail, tail_mask = pad(tails, "right", model.device)  # [rows, T]
        copies = DynamicCache((layer.keys[owner], layer.values[owner]) for layer in cache.layers)
        mask = torch.cat([prefix_mask[owner], tail_mask], 1)  # [rows, P + T]
        logits = forward(model, tail, mask, copies)  # [rows, T, V]
        for id, number, log_p in log_probabilities(logits, part):
            # long options have a smaller sum, whatever they say: the mean leaves their length out
            score = log_p.mean() if args.option_score == "mean" else log_p.sum()
            scores[id][number] = score.item()

    predictions = []
    for group in groups:
        for e in group:
            best = scores[e.id].index(max(scores[e.id]))  # the first of equals
            predictions.append({"id": e.id, "prediction": list(e.options)[best], "scores": scores[e.id]})
    return predictions


def rows_of(groups: list[list[Example]]) -> tuple[list[list[int]], list[Row]]:
    """What each group begins with, and the rows that continue from there.

    An option's last token predicts nothing that is asked for: options that differ in it alone share a row.
    """
    prefixes = []
    rows: dict[tuple, Row] = {}
    for g, group in enumerate(groups):
        # a prompt's last token stays out of what is shared: it predicts the first tokens of the options
        shared = group[0].prompt_ids[:-1]
        for e in group:
            shared = common_start(shared, e.prompt_ids[:-1])
        prefixes.append(shared)
        for e in group:
            for number, option in enumerate(e.option_ids):
                tail = (*e.prompt_ids[len(shared) :], *option[:-1])
                row = rows.setdefault((g, tail), Row(g, tail, []))
                row.options.append((e.id, number, option))
    return prefixes, list(rows.values())


def common_start(a: list[int], b: list[int]) -> list[int]:
    """The tokens that both begin with."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


def log_probabilities(logits: Tensor, rows: list[Row]) -> Iterator[tuple[str, int, Tensor]]:
    """(id, number of an option, log-probabilities of its tokens): a tail's last positions predict them."""
    options, lengths, where = [], [], []
    for r, row in enumerate(rows):
        for id, number, tokens in row.options:
            options.append((id, number))
            lengths.append(len(tokens))
            first = len(row.tail) - len(tokens)
            for i, token in enumerate(tokens):
                where.append((r, first + i, token))
    # only these positions go through the softmax: [rows, T, V] in float32 would be the largest tensor of the run
    row, position, token = torch.tensor(where, device=logits.device).unbind(1)  # each [tokens of all options]
    log_p = -cross_entropy(logits[row, position].float(), token, reduction="none").cpu()
    for (id, number), part in zip(options, log_p.split(lengths), strict=True):
        yield id, number, part


def pad(rows: list, side: str, device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, T]."""
    tensors = list(map(torch.tensor, rows))
    ids = pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=side).to(device)
    return ids.clamp(min=0), (ids >= 0).long()  # padding is masked, so that any id will do


def forward(model, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int = 0) -> Tensor:
    """Logits of the last `keep` (0: all) of `ids`, which continue the cache; the mask [B, cached + T] covers both."""
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # the newer and the older name
    options = {name: cache}
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = keep
    # positions count real tokens, so that a row on the right of padding has the positions that it has alone
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [B, T]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **options).logits


# ----------------------------------------------------------------------------------------------------------- generation


def greedy(tokenizer, args) -> GenerationConfig:
    """Until EOS, the end of the line, the end of a chat's turn or --max_new_tokens."""
    stop = [tokenizer.eos_token_id]
    for token in range(len(tokenizer)):
        if "\n" in tokenizer.decode([token]):  # alone, or with other characters
            stop.append(token)
    if args.chat_template:  # many templates end a turn with another token than EOS
        _, _, after = chat_parts(tokenizer, "question")
        stop += tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"][:1]
    limit = {"max_new_tokens": args.max_new_tokens, "eos_token_id": stop, "pad_token_id": stop[0]}
    return GenerationConfig(do_sample=False, **limit)


@torch.no_grad()
def generate(model, tokenizer, groups: list[list[Example]]) -> list[dict]:
    """Predictions for groups of one question each: the first line of greedy answers."""
    prompts = [e.prompt_ids for (e,) in groups]
    ids, mask = pad(prompts, "left", model.device)  # [B, T]
    new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]  # [B, up to --max_new_tokens]
    predictions = []
    for (e,), text in zip(groups, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
        predictions.append({"id": e.id, "prediction": text.split("\n")[0].strip()})
    return predictions


# -------------------------------------------------------------------------------------------------------------- metrics


def accuracy(right: list) -> dict:
    """Right answers in per cent, with the 95 % Wilson interval; `right` holds True or 1.0, False or 0.0."""
    count, hits = len(right), int(sum(right))
    return {"score": 100 * hits / count, "interval": wilson(hits, count), "count": count}


def bootstrap(units: list, statistic: Callable[[Tensor], Tensor]) -> dict:
    """A statistic in per cent, with the 95 % percentile interval of 1,000 bootstrap samples of the units."""
    values = torch.tensor(units, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # the same interval each time
    picks = torch.randint(len(values), (1000, len(values)), generator=generator)
    samples = torch.stack([statistic(values[pick]) for pick in picks])  # [1000]
    interval = 100 * samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"score": 100 * statistic(values).item(), "interval": interval.tolist(), "count": len(units)}


def class_f1(units: Tensor) -> Tensor:
    """Mean F1 over classes from [n, classes, 3] hits, predicted and right; classes that never occur are left out."""
    hit, predicted, right = units.sum(0).unbind(-1)  # each [classes]
    return (2 * hit / (predicted + right)).nanmean().nan_to_num()  # 0 / 0 of a class that never occurs is NaN


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks (official scripts of SQuAD and ReCoRD)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
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
    words = []
    for word in re.split(" |-", text.lower()):
        if not is_number(word):  # the point of a number is no punctuation
            word = normalize(word)
        if is_number(word):  # perhaps only now: "$10"
            word = str(float(word))
        if word:
            words.append(word)
    return " ".join(words)


def drop_scores(prediction: str, gold: list[list[str]]) -> tuple[float, float]:
    """Exact match and F1 of spans aligned one to one, each the best over the accepted answers (DROP)."""
    predicted, predicted_bags = drop_bags(prediction.split(SPAN_SEPARATOR))
    em = f1 = 0.0
    for spans in gold:
        answer, answer_bags = drop_bags(spans)
        same = set(predicted) == set(answer) and len(predicted) == len(answer)
        em = max(em, float(same))
        f1 = max(f1, round(align(predicted_bags, answer_bags), 2))  # rounded in the official script
    return em, f1


def drop_bags(spans: list[str]) -> tuple[list[str], list[set]]:
    """The spans, normalised, and the words of each."""
    texts, bags = [], []
    for span in spans:
        text = drop_normalize(span)
        texts.append(text)
        bags.append(set(text.split()))
    return texts, bags


def align(predicted: list[set], gold: list[set]) -> float:
    """Mean F1 of bags of words under the best one-to-one alignment."""
    # Alignments are built bag by bag. Which gold bags are taken is all that matters for the rest, so that the best
    # sum of each set of taken bags is kept, the sets written as the bits of an integer.
    best = {0: 0.0}
    for bag in predicted:
        for taken, total in list(best.items()):  # a copy: this bag may be used once
            for j, other in enumerate(gold):
                f1 = bag_f1(bag, other)
                if f1 > 0 and not taken & 1 << j:  # a pair that adds nothing would only multiply the sets
                    with_j = taken | 1 << j
                    best[with_j] = max(best.get(with_j, 0.0), total + f1)
    return max(best.values()) / max(len(predicted), len(gold))


def bag_f1(predicted: set, gold: set) -> float:
    """F1 of two bags of words; without any of the gold bag's numbers it is 0."""
    if not predicted and not gold:
        return 1.0
    numbers = set(filter(is_number, gold))
    if numbers and not numbers & predicted:
        return 0.0
    return 2 * len(predicted & gold) / (len(predicted) + len(gold))


def metrics_of(task: str, pairs: list[tuple[Example, object]]) -> dict[str, dict]:
    """The official metrics of a task from (example, prediction)."""
    if task in ("SQuAD", "DROP", "ReCoRD"):
        judge = drop_scores if task == "DROP" else text_scores
        exact, f1 = [], []
        for e, prediction in pairs:
            scores = judge(prediction, e.gold)
            exact.append(scores[0])
            f1.append(scores[1])
        return {"em": accuracy(exact), "f1": bootstrap(f1, torch.mean)}

    right = []
    questions: dict[str, list[bool]] = {}  # of MultiRC: its answers, right or not
    for e, prediction in pairs:
        right.append(prediction == e.gold[0])
        question = e.id.rpartition(".")[0]  # without the number of the answer
        questions.setdefault(question, []).append(right[-1])
    metrics = {"accuracy": accuracy(right)}
    if task == "CB":
        metrics["macro_f1"] = bootstrap(class_counts(pairs, list(TASKS["CB"].options)), class_f1)
    if task == "MultiRC":
        metrics["em"] = accuracy(list(map(all, questions.values())))  # questions whose answers are all right
        metrics["f1a"] = bootstrap(class_counts(pairs, [True]), class_f1)  # over all answers, of "correct" alone
    return metrics


def class_counts(pairs: list[tuple[Example, object]], classes: list) -> list[list[tuple[bool, bool, bool]]]:
    """For every pair and class: whether it is a hit, predicted, and right."""
    counts = []
    for e, prediction in pairs:
        of_pair = []
        for label in classes:
            predicted, is_right = prediction == label, e.gold[0] == label
            of_pair.append((predicted and is_right, predicted, is_right))
        counts.append(of_pair)
    return counts


# -------------------------------------------------------------------------------------------------------------- results


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
    records = {}
    if path.exists():
        for line in path.read_text().split("\n")[:-1]:  # what follows the last line's end is empty or cut short
            record = json.loads(line)
            records[record["id"]] = record
    return records


def settings_of(args, examples: list[Example]) -> dict:
    """All that shapes the scores: a run may only go on with the same."""
    settings = {}
    for name, value in vars(args).items():
        if name not in ("command", "output_dir", "overwrite", "max_tokens_per_batch"):
            settings[f"--{name}"] = value
    digest = hashlib.sha256()
    for path in sorted(Path(args.model).glob("*.safetensors")):
        digest.update(repr((path.name, path.stat().st_mtime_ns)).encode())
    for e in examples:  # with the tokens: a chat template may print today's date
        digest.update(repr((e.id, e.prompt, e.options, e.gold, e.prompt_ids)).encode())
    settings["files of the data and the model"] = digest.hexdigest()[:16]
    return settings


def open_folder(folder: Path, settings: dict, overwrite: bool) -> None:
    """Check that --output_dir holds nothing, or a part of this very run."""
    path = folder / "settings.json"
    if overwrite:
        for name in ("predictions.jsonl", "results.json", "settings.json"):
            (folder / name).unlink(missing_ok=True)
    if path.exists():
        saved = json.loads(path.read_text())
        for name, value in settings.items():
            if saved.get(name) != value:
                what = f"{name} is {value}, but {folder} holds a run with {saved.get(name)}"
                raise UserError(f"{what}: use the same, choose another --output_dir or add --overwrite")
    save(path, json.dumps(settings, indent=1))


def report(folder: Path, settings: dict, examples: list[Example], records: dict) -> None:
    """results.json and a table."""
    results = {}
    print(f"\n{'task':<8} {'metric':<9} {'score':>6}   {'95 % interval':<14} {'count':>6} {'shortened':>9}")
    pairs: dict[str, list] = {}
    shortened = Counter()
    for e in examples:
        pairs.setdefault(e.task, []).append((e, records[e.id]["prediction"]))
        shortened[e.task] += e.shortened
    for task in pairs:
        metrics = metrics_of(task, pairs[task])
        cut = shortened[task]
        results[task] = metrics | {"questions": len(pairs[task]), "shortened_prompts": cut}
        for name, metric in metrics.items():
            interval = "{:.1f} to {:.1f}".format(*metric["interval"])
            print(f"{task:<8} {name:<9} {metric['score']:>6.1f}   {interval:<14} {metric['count']:>6} {cut:>9}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    content = {"results": results, "settings": settings, "versions": versions}
    save(folder / "results.json", json.dumps(content, indent=1))


# ----------------------------------------------------------------------------------------------------------------- main


def choose_defaults(args, model, tokenizer) -> None:
    """What depends on the model: --max_length and --chat_template, where they are not given."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 1:  # models without learned positions have none, or -1
        positions = sys.maxsize
    if args.max_length is None:
        args.max_length = min(OFFICIAL_MAX_LENGTH, positions)
    if args.max_length > positions:
        raise UserError(f"--max_length {args.max_length} exceeds the model's {positions} positions: lower it")
    if args.chat_template is None:
        args.chat_template = trained_on_chats(args.model)
    if args.chat_template and not tokenizer.chat_template:
        raise UserError(f"--chat_template: the tokenizer of {args.model} has none: drop it, or give --no-chat_template")


def score(args) -> None:
    examples = read_tasks(args)
    path = Path(args.output_dir, "predictions.jsonl")
    state = PartialState()
    if args.base_precision is None:
        args.base_precision = trained_precision(find_file(args.model, "settings.json"))
    model, tokenizer, *_ = load(args, state.device)
    choose_defaults(args, model, tokenizer)
    encode(examples, tokenizer, args)
    settings = settings_of(args, examples)
    if state.is_main_process:
        open_folder(path.parent, settings, args.overwrite)
        save(path, json_lines(read_predictions(path).values()))  # without a line that was cut short
    state.wait_for_everyone()

    # what an earlier run has predicted is left out, batch by batch: batches are the same in every run
    done = read_predictions(path)
    batches = []
    for batch in batches_of(examples, args):
        ids = {e.id for group in batch for e in group}
        if ids - done.keys():
            batches.append(batch)

    # one batch for each process and round; the main process writes down what all of them found
    model.generation_config = greedy(tokenizer, args)  # the checkpoint's own may sample
    ranks = state.num_processes
    for first in tqdm(range(0, len(batches), ranks), "scoring", disable=not state.is_main_process):
        mine = first + state.process_index
        predictions = []
        if mine < len(batches):  # the last round may have fewer batches than processes
            batch = batches[mine]
            if batch[0][0].options:
                predictions = score_options(model, batch, args)
            else:
                predictions = generate(model, tokenizer, batch)
        records = gather_object(predictions)
        if state.is_main_process:
            with open(path, "a") as f:
                f.write(json_lines(records))

    if state.is_main_process:
        records = read_predictions(path)
        save(path, json_lines(records[e.id] for e in examples))
        report(path.parent, settings, examples, records)


def build_parser() -> Parser:
    parser = Parser("eval_superglue.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,score}")
    flag = argparse.BooleanOptionalAction
    epilog = "A task without a file is read from the Hugging Face hub (pip install datasets):"
    for name, task in TASKS.items():
        epilog += f"\n  {name:<8} {task.hub}"
    for name, what in (("prepare", "write training rows for train_colm.py"), ("score", "evaluate a model or adapter")):
        raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the epilog
        command = commands.add_parser(
            name, help=what, description=what, epilog=epilog, formatter_class=raw, allow_abbrev=False
        )
        add = command.add_argument
        add(
            "tasks",
            nargs="+",
            metavar="TASK[=FILE]",
            help=f"a task of {', '.join(TASKS)}, with a labelled file or a hub dataset as org/name:config:split",
        )
        add("--limit", type=positive, help="so many random questions of each task (passages of MultiRC and ReCoRD)")
        add("--seed", type=int, default=0, help="of --limit")
        add("--overwrite", action=flag, default=False, help="replace what the output holds")
        add(
            "--chat_template",
            action=flag,
            help="questions and answers as turns of a chat: `prepare` writes messages, `score` uses the tokenizer's "
            "template; default in `score`: as the adapter was trained",
        )
    commands.choices["prepare"].add_argument("--output", required=True, help="a .jsonl file")
    # `add` is that of `score`, the last command, from here on
    add("--model", required=True, help="folder or hub id of a causal LM or of a PEFT adapter")
    add("--base_model", help="the adapter's base, where it has moved")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--output_dir", required=True)
    add("--option_score", choices=["mean", "sum"], default="mean", help="of an option's token log-probabilities")
    add(
        "--max_length",
        type=positive,
        help=f"tokens; longer prompts are cut on their left; default: {OFFICIAL_MAX_LENGTH}, or the model's window "
        "where that is shorter",
    )
    add("--max_new_tokens", type=positive, default=50, help="of an answer to SQuAD and DROP")
    add("--max_tokens_per_batch", type=positive, default=16384, help="padding included")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
    add("--base_precision", choices=BASE_PRECISIONS, help="nf4: base weights in 4 bits; default: as trained")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, give 1 or more")
    return int(text)


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can fix into one line and exit code 2."""
    hush_libraries()
    try:
        args = build_parser().parse_args(argv)
        if args.command == "prepare":
            prepare(args)
        else:
            score(args)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # one line, however many processes
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:  # of this process, whichever it is
        print(out_of_memory(args), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
