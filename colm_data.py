"""From files to token ids: reading rows, rendering them as text, tokenising them for the trainer and the evaluations.

    files -> rows (dicts) -> texts with their answers -> token ids and a mask of the supervised tokens

The order of this file is that order. One mechanism serves all formats: a row becomes a text and the character spans of
its answers; the tokens of these spans, each with the token that ends it, are supervised, and nothing else is.

    row                                               supervised (--train_on last: the last answer alone)
    instruction, input, output                        output and EOS, after Alpaca's prompt
    the same with system, history                     every answer of the history, and the output, each with EOS
    prompt, completion (strings)                      completion and EOS
    messages, conversations (ShareGPT),               every assistant turn and the token that ends it, as the
    prompt and completion as lists (TRL)              tokenizer's chat template writes them

Also here, because every script needs them: `UserError`, the flag parser, and writing files whole or not at all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import difflib
import glob
import gzip
import hashlib
import json
import logging
import os
import random
import re
import shutil
import tempfile
import warnings
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm


class UserError(Exception):
    """Something the user can fix: one line with the value, the rule and the remedy; exit code 2."""


def one_line(error: Exception) -> str:
    """An exception's kind and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


# ---------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """Errors in one line, which name the flag that a misspelt one resembles."""

    def error(self, message):
        if message.startswith("unrecognized arguments: -"):
            given = message.split()[2].split("=")[0]
            for name in difflib.get_close_matches(given, self.flags(), 1, 0.75):  # --lr is far from --lora_r
                message += f" (did you mean {name}?)"
        raise UserError(f"{message}: see {self.prog} --help")

    def flags(self) -> list[str]:
        """Names of all flags, with those of subcommands: what these do not know, the parser above them reports."""
        names = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for subcommand in action.choices.values():
                    names += subcommand.flags()
        return names


def hush_libraries() -> None:
    """Drop warnings of libraries about one another, which nobody who runs a script can do anything about."""
    # transformers 5.24 has new names for these; PEFT 0.21 asks for the old one, and older versions have no other.
    old_names = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    # A CPU kernel from the hub, which bitsandbytes misses when it is imported, as PEFT does, used or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def config_flags(path: str) -> list[str]:
    """The settings of a YAML file as command-line flags."""
    import yaml  # comes with accelerate

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}: give a readable YAML file") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} is not a mapping: write one flag a line, as in 'pool_size: 128'")
    if "config" in settings:
        raise UserError(f"--config {path} names another config, which would not be read: put all flags in one file")
    flags = []
    for key, value in settings.items():
        if isinstance(value, bool):
            prefix = "" if value else "no-"
            flags.append(f"--{prefix}{key}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{key}={value}")  # in one piece: -1e-3 alone would look like a flag
    return flags


# -------------------------------------------------------------------------------------------------- files to rows

FORMATS = ".json, .jsonl, .csv, .tsv or .parquet"  # what messages ask for
FILE_NAME = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|arrow|gz|zip|zst)$")  # so a missing file is no hub id
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:\[\]]+(\[.*\])?)*")  # org/name, org/name:split, org/name:config:split


def expand_paths(patterns: str | list[str]) -> list[str]:
    """The files and hub datasets that paths and globs name: patterns in the order given, each glob's files sorted."""
    if isinstance(patterns, str):
        patterns = [patterns]
    paths = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern) or HUB_NAME.fullmatch(pattern):
            paths.append(pattern)
            continue
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"{pattern} matches no file: give {FORMATS} files")
        paths += found
    return paths


def read_rows(patterns: str | list[str]) -> tuple[list[dict], list[str]]:
    """All rows of files or hub datasets, and where each stands, for error messages."""
    rows, places = [], []
    for path in expand_paths(patterns):
        for row, place in iterate_rows(path):
            rows.append(row)
            places.append(place)
    return rows, places


def iterate_rows(path: str) -> Iterator[tuple[dict, str]]:
    """The rows of one file or hub dataset and where each stands, one by one: a large file never lies in memory."""
    file = Path(path)
    if not file.exists():
        if HUB_NAME.fullmatch(path) and not FILE_NAME.search(path):
            yield from hub_rows(path)
            return
        raise UserError(f"{path} does not exist: give a {FORMATS} file, or a hub dataset id such as org/name")
    if file.is_dir():
        raise UserError(f"{path} can't be read, it is a folder: name its files, as in '{path}/*.jsonl'")
    kind = Path(path.removesuffix(".gz")).suffix
    empty = True
    try:
        if kind == ".parquet":
            rows = parquet_rows(path)
        elif kind == ".csv":
            rows = table_rows(path, ",")
        elif kind == ".tsv":
            rows = table_rows(path, "\t")
        else:
            rows = json_rows(path)
        for pair in rows:
            empty = False
            yield pair
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} can't be read ({reason}): give a UTF-8 {FORMATS} file, plain or .gz") from None
    if empty:
        raise UserError(f"{path} is empty, it holds no rows: give a file with rows")


def open_text(path: str):
    """A plain or gzipped text file without its byte order mark; only \\n ends a line, as JSON lines have it."""
    opener = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def json_rows(path: str) -> Iterator[tuple[dict, str]]:
    """JSON lines, a JSON array, or an object whose `data` is the array: the beginning tells which."""
    first = ""
    with open_text(path) as f:
        for line in f:
            first = line.strip()
            if first:
                break
    if first.startswith("["):
        return json_array_rows(path)
    if first.startswith("{"):
        try:
            row = json.loads(first)
        except json.JSONDecodeError:
            return json_object_rows(path)  # its first line is no row: one object over several lines, or broken
        if isinstance(row.get("data"), list):
            return json_object_rows(path)
    elif first:
        raise UserError(f"{path} starts with {first[:40]!r}, which is not JSON: give a {FORMATS} file so named")
    return json_line_rows(path)


def broken_json(path: str, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{path} line {line}: broken JSON ({error.msg}): fix that line")


def json_line_rows(path: str) -> Iterator[tuple[dict, str]]:
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise broken_json(path, number, error) from None
            yield row, f"{path} line {number}"


def json_object_rows(path: str) -> Iterator[tuple[dict, str]]:
    """`{"data": [...]}`, as many sets wrap their rows."""
    with open_text(path) as f:
        text = f.read()
    try:
        rows = json.loads(text).get("data")
    except json.JSONDecodeError as error:
        raise broken_json(path, error.lineno, error) from None
    if not isinstance(rows, list):
        raise UserError(f'{path} is one JSON object: give {{"data": [rows]}}, an array of rows, or one row a line')
    for number, row in enumerate(rows, 1):
        yield row, f"{path} row {number}"


def json_array_rows(path: str) -> Iterator[tuple[dict, str]]:
    """The elements of a JSON array, decoded one by one from a window that slides over the file.

    json.load would hold the text and all rows at once, and one emoji makes Python keep four bytes a character.
    """
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*,?\s*")  # between two elements
    size = 1 << 20  # characters read at a time: far longer than a row, far smaller than a file
    with open_text(path) as f:
        window = f.read(size)
        at = window.index("[") + 1
        line = 1  # of the window's first character
        number = 0
        while True:
            at = gap.match(window, at).end()
            if window[at : at + 1] == "]":
                return
            try:
                row, end = decoder.raw_decode(window, at)
            except json.JSONDecodeError as error:
                more = f.read(size)
                if not more:
                    broken = line + window.count("\n", 0, error.pos)
                    raise broken_json(path, broken, error) from None
                line += window.count("\n", 0, at)
                window, at = window[at:] + more, 0
                size *= 2  # a row longer than the window is tried again: doubling keeps the work linear
                continue
            at = end
            number += 1
            yield row, f"{path} row {number}"


def table_rows(path: str, delimiter: str) -> Iterator[tuple[dict, str]]:
    """The rows of a CSV or TSV file whose first line names the columns; every value is a string."""
    csv.field_size_limit(1 << 30)  # the default of 131,072 characters is shorter than some conversations
    with open_text(path) as f:
        table = csv.DictReader(f, delimiter=delimiter)
        for row in table:
            place = f"{path} line {table.line_num}"
            if None in row or None in row.values():  # what DictReader makes of cells without a column, and missing ones
                raise UserError(f"{place} does not have the {len(table.fieldnames)} columns of the first line: fix it")
            yield row, place


def parquet_rows(path: str) -> Iterator[tuple[dict, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs a package: pip install pyarrow") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path} row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} can't be read as Parquet ({one_line(error)}): give a whole .parquet file") from None


@lru_cache(maxsize=4)  # asked for its content's key, then for its rows
def hub_dataset(path: str):
    """org/name, org/name:split or org/name:config:split; with `:stream` at the end nothing is kept on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{path} is no file; a hub dataset needs a package: pip install datasets") from None
    name, *parts = re.split(r":(?![^\[]*\])", path)  # not at the colon of a slice such as train[:1000]
    streaming = parts[-1:] == ["stream"]
    if streaming:
        parts.pop()
    if len(parts) > 2:
        raise UserError(f"{path} has too many parts: write org/name:config:split, with :stream to stream it")
    split = parts.pop() if parts else "train"
    try:
        return load_dataset(name, *parts, split=split, streaming=streaming)
    except Exception as error:  # the hub's errors have no common class
        raise UserError(f"{path}: {one_line(error)}: give a file or a reachable dataset id") from None


def hub_rows(path: str) -> Iterator[tuple[dict, str]]:
    for number, row in enumerate(hub_dataset(path), 1):
        yield row, f"{path} row {number}"


def source_of_files(paths: list[str]) -> list[str]:
    """The source of a file's rows that name none: the file's name among several files, "all" where there is one."""
    if len(paths) == 1:
        return ["all"]
    stems = []
    for path in paths:
        stem = Path(path).name
        while FILE_NAME.search(stem):
            stem = FILE_NAME.sub("", stem)
        stems.append(stem)
    if len(set(stems)) < len(set(paths)):  # a/train.jsonl and b/train.jsonl
        return paths
    return stems


def demo_rows(split: str, scale: int = 1) -> list[dict]:
    """A generated, imbalanced mixture of seven instruction sources; four lie below the mean size."""
    rng = random.Random(f"colm demo {split}")
    words = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx", "mole", "newt"]

    def sentence(low=2, high=5):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    def numbers():
        return rng.randint(0, 99), rng.randint(0, 99)

    def make(source):
        text, (a, b) = sentence(), numbers()
        return {
            "repeat": (f"Repeat: {text}", text),
            "reverse": (f"Reverse the words: {text}", " ".join(text.split()[::-1])),
            "compare": (f"Which is larger, {a} or {b}?", str(max(a, b))),
            "add": (f"Add {a} and {b}.", f"{a} + {b} = {a + b}"),
            "count": (f"How many words: {text}", str(len(text.split()))),
            "sort": (f"Sort the words: {text}", " ".join(sorted(text.split()))),
            "last": (f"Name the last word: {text}", text.split()[-1]),
        }[source]

    # The mean size is 21, so that the method keeps four sources whole and chooses among the rows of three.
    sizes = {"repeat": 60, "reverse": 40, "compare": 30, "add": 8, "count": 6, "sort": 4, "last": 2}
    rows = []
    for source, size in sizes.items():
        for _ in range(size * scale):
            prompt, answer = make(source)
            rows.append({"source": source, "instruction": prompt, "output": answer})
    return rows


# -------------------------------------------------------------------------------------------------- rows to texts

PROMPT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
FIELDS = "instruction and output, prompt and completion, messages, or conversations"

ROLES = {  # other names for the roles of chat templates, as in ShareGPT's files
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates and their users call it
# A chat template may print today's date. The same row must give the same tokens tomorrow and on every host, so it
# prints this one instead, the date that Llama 3.1's template takes where it is told none.
TEMPLATE_DATE = datetime.date(2024, 7, 26)


class Answer(NamedTuple):
    """A supervised part of a text."""

    start: int  # character where it begins
    end: int  # character after it, and after the token that ends it where the text holds one
    add_eos: bool  # whether the EOS token must be put after it


class Text(NamedTuple):
    """A rendered row."""

    text: str
    answers: list[Answer]  # in order
    form: str  # "alpaca", "text" or "messages": how an evaluation must prompt the model
    unused: tuple[str, ...] = ()  # fields of the row that are not in the text


class Remarks:
    """What was done with unusual rows: said once for each kind, with the number of rows and the place of the first."""

    def __init__(self):
        self.kinds: dict[str, list] = {}  # what: [number of rows, first place]
        self.unused: dict[str, None] = {}  # fields that no text holds, in order of appearance

    def add(self, what: str, place: str) -> None:
        self.kinds.setdefault(what, [0, place])[0] += 1

    def lines(self) -> list[str]:
        lines = []
        if self.unused:
            lines.append(f"not used: the fields {', '.join(self.unused)}")
        for what, (count, place) in self.kinds.items():
            noun = "row" if count == 1 else "rows"
            lines.append(f"{count:,} {noun} with {what} (first: {place})")
        return lines


def render(row: dict, place: str, chat: ChatTemplate, remarks: Remarks, train_on: str = "all") -> Text:
    """A row of any format as its text and the spans of its answers: all of them, or the last with `train_on` last.

    Raises UserError with the row's place where the row is malformed.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place} is a {type(row).__name__}: every row must be a JSON object")
    if row.get("messages") is not None:
        turns, used = row["messages"], ("messages", "system", "tools")
    elif row.get("conversations") is not None:  # ShareGPT
        turns, used = row["conversations"], ("conversations", "system", "tools")
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):  # TRL
        turns, used = row["prompt"] + row["completion"], ("prompt", "completion", "system", "tools")
    elif "prompt" in row:
        turns, used = None, ("prompt", "completion")
    else:
        turns, used = None, ("instruction", "input", "output", "system", "history")

    if turns is not None:
        messages = conversation(turns, row.get("system"), place)
        tools = decoded(row.get("tools"), list, f"{place}: field 'tools'")
        own = "\n".join(message["content"] for message in messages)
        text = chat.text(messages, tools, place, remarks, train_on)
    else:
        text = prompt_text(row, place) if "prompt" in row else alpaca_text(row, place)
        own = text.text
        if train_on == "last":
            text = text._replace(answers=text.answers[-1:])
        for answer in text.answers:
            if not own[answer.start : answer.end].strip():
                remarks.add("an empty answer, which trains the model to end at once", place)
    if chat.special and chat.special.search(own):
        remarks.add("special tokens in its own text, which are read as these tokens", place)
    unused = tuple(name for name in row if name not in used and row[name] is not None)
    return text._replace(unused=unused)


def prompt_and_completion(row: dict, place: str, tokenizer=None) -> tuple[str, str]:
    """The texts before and of a row's last answer, as training renders them."""
    text = render(row, place, ChatTemplate(tokenizer), Remarks(), "last")
    last = text.answers[-1]
    return text.text[: last.start], text.text[last.start : last.end]


def string_field(row: dict, name: str, place: str) -> str:
    if name not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{place} has no field {name!r} (it has {found[:100]}): give {FIELDS}")
    if not isinstance(row[name], str):
        raise UserError(f"{place}: field {name!r} is a {type(row[name]).__name__}: it must be a string")
    return row[name]


def prompt_text(row: dict, place: str) -> Text:
    """Prompt and completion as they are."""
    prompt, completion = string_field(row, "prompt", place), string_field(row, "completion", place)
    return Text(prompt + completion, [Answer(len(prompt), len(prompt) + len(completion), True)], "text")


def alpaca_text(row: dict, place: str) -> Text:
    """Alpaca's prompt. LLaMA-Factory's `system` takes the preamble's place, and `history` holds earlier turns."""
    instruction, output = string_field(row, "instruction", place), string_field(row, "output", place)
    context, text = "", PROMPT
    if row.get("input"):
        context, text = string_field(row, "input", place), PROMPT_WITH_INPUT
    if row.get("system"):
        text = string_field(row, "system", place)
    answers = []
    history = decoded(row.get("history"), list, f"{place}: field 'history'") or []
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise UserError(f"{place}: field 'history' must be a list of [instruction, output] pairs of strings")
        text += f"\n\n### Instruction:\n{turn[0]}\n\n### Response:"
        answers.append(Answer(len(text), len(text) + len(turn[1]), True))
        text += turn[1]
    text += f"\n\n### Instruction:\n{instruction}"
    if context:
        text += f"\n\n### Input:\n{context}"
    text += "\n\n### Response:"
    answers.append(Answer(len(text), len(text) + len(output), True))
    return Text(text + output, answers, "alpaca")


def decoded(value, kind: type, what: str):
    """A list or object, or the same written as JSON, as tables and some datasets hold it; None where there is none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{what} is a string that is not JSON ({error.msg}): give a {kind.__name__}") from None
    if not isinstance(value, kind):
        raise UserError(f"{what} is a {type(value).__name__}: it must be a {kind.__name__}")
    return value


def conversation(turns, system, place: str) -> list[dict]:
    """Turns under any of their names (role and content, from and value) as the messages that chat templates take."""
    rule = f"{place}: messages must be a list of objects with role and content"
    messages = []
    for turn in decoded(turns, list, f"{place}: field 'messages'") or []:
        if not isinstance(turn, dict):
            raise UserError(f"{rule}, not of {type(turn).__name__}")
        name = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # in parts, as models that also see images take it
            content = "".join(text_part(part, place) for part in content)
        if content is None and turn.get("tool_calls"):  # how OpenAI's format writes a turn that only calls tools
            content = ""
        if not isinstance(name, str) or not isinstance(content, str):
            raise UserError(f"{rule}, both strings (content may be a list of text parts)")
        message = {"role": ROLES.get(name, name), "content": content}
        for key, value in turn.items():
            if key not in ("role", "from", "content", "value") and value is not None:
                message[key] = value
        if name == "function_call":  # LLaMA-Factory's ShareGPT: the value is the call as JSON
            call = decoded(content, dict, f"{place}: the value of a function_call")
            message |= {"content": "", "tool_calls": [call]}
        if "tool_calls" in message:
            message["tool_calls"] = [tool_call(call, place) for call in message["tool_calls"]]
        messages.append(message)
    if system:
        if any(message["role"] == "system" for message in messages):
            raise UserError(f"{place} has a field 'system' and a system message: keep one of them")
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise UserError(f"{rule}, it is empty: remove the row")
    return messages


def text_part(part, place: str) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = type(part).__name__
    if isinstance(part, dict):
        kind = part.get("type")
    raise UserError(f"{place}: a message has a part of type {kind!r}: only text can be trained on")


def tool_call(call, place: str) -> dict:
    """A call as templates take it: {type, function: {name, arguments}}, with the arguments decoded."""
    function = call
    if isinstance(call, dict) and "function" in call:
        function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{place}: a tool call must be an object with the function's name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's format: an object written as JSON, which templates would quote again
        with suppress(json.JSONDecodeError):  # not JSON: the template prints the string as it is
            arguments = json.loads(arguments)
    normal = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        normal["id"] = call["id"]
    return normal


class ChatTemplate:
    """A tokenizer's chat template, and which characters of a rendered conversation its assistant wrote.

    Where the template marks them ({% generation %}), the marks are taken. Elsewhere the conversation is rendered up to
    each assistant turn with the generation prompt, and up to its end: growing prefixes of the whole text. An answer
    begins after the generation prompt and ends with the token that ends the turn, which the model must learn to write.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.sources: dict[bool, str] = {}  # with and without tools: some tokenizers have a template for each
        self.prints_tools: bool | None = None  # unknown until a row has tools
        self.special = None  # a pattern of the special tokens
        if tokenizer is not None:
            self.special = re.compile(token_pattern(tokenizer, special=True))

    def source(self, tools: list | None) -> str:
        """The template, with calls of the clock replaced by TEMPLATE_DATE."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template, which messages need: use prompt and completion")
        if bool(tools) not in self.sources:
            source = self.tokenizer.get_chat_template(tools=tools)
            calls = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
            source = re.sub(calls, lambda call: json.dumps(TEMPLATE_DATE.strftime(call[2])), source)
            if "strftime_now(" in source:
                raise UserError("the chat template prints the time in a form that can't be fixed: set a date in it")
            self.sources[bool(tools)] = source
        return self.sources[bool(tools)]

    def render(self, messages: list[dict], tools: list | None, place: str, prompt: bool = False) -> str:
        """The messages as text, with the generation prompt after them if `prompt`."""
        source = self.source(tools)
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what their authors chose, such as "roles must alternate"
            reason = one_line(error)
            raise UserError(f"{place}: the chat template refuses these messages ({reason}): fix the row") from None

    @cached_property
    def turn(self) -> tuple[str, str, str]:
        """The generation prompt, what stands before an answer, and what ends it, seen on a question and its answer.

        The first two differ where the template makes the model think: R1's generation prompt ends with <think>, its
        rendered turns have none; Qwen3 renders an empty block of thoughts, which the model has to write itself.
        """
        answer = "0answer0"  # no template prints it by itself
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        before = self.render(messages[:1], None, "a question")
        asked = self.render(messages[:1], None, "a question", prompt=True)
        whole = self.render(messages, None, "a question and its answer")
        at = whole.find(answer)
        if at < 0:
            raise UserError("the chat template does not print an assistant's turn: use prompt and completion")
        if not asked.startswith(before):  # Phi-3 puts EOS after a conversation that does not go on
            question_end = re.compile(rf"question\s*(?:{token_pattern(self.tokenizer)})?\s*")
            before = asked[: question_end.search(asked).end()]
        prompt = asked.removeprefix(before)
        header = whole[:at].removeprefix(before)
        rest = whole[at + len(answer) :].rstrip()
        # Some templates print more after the last turn, such as <|end|> and then EOS: a turn ends with the first token.
        first = re.match(rf"\s*(?:{token_pattern(self.tokenizer)})", rest)
        return prompt, header, first[0] if first else rest

    def text(self, messages: list[dict], tools, place: str, remarks: Remarks, train_on: str) -> Text:
        """The rendered conversation and the spans of its assistant's answers, up to the last of them.

        A turn that the template does not print whole (reasoning cut from all but the last turn) is context without
        loss: trained on, it would teach the model to answer without the thoughts that its author wrote.
        Raises UserError where the template rewrites earlier turns, so that no span of the text is an answer's own.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise UserError(
                f"{place} has messages, but the tokenizer has no chat template: "
                "take a --model with one, as instruct models have, or write prompt and completion"
            )
        # 1. The conversation up to its last answer: nothing after it has a loss, and no answer sees it.
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) < 2:
            return Text("", [], "messages")
        prompt, _, ending = self.turn
        for message in messages:
            content = message["content"].rstrip()
            if message["role"] == "assistant" and ending.strip() and content.endswith(ending.strip()):
                message["content"] = content.removesuffix(ending.strip())  # one that brings its end gets no second
        if tools and self.prints_tools is None:
            self.prints_tools = self.render(messages, tools, place) != self.render(messages, None, place)
        if tools and not self.prints_tools:
            remarks.add("tools, which the chat template does not print", place)

        whole = self.render(messages, tools, place)

        # 2. The characters of each assistant turn. A first message of the assistant is context: it has no prompt that
        # generation would start from.
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        spans = self.marked_spans(whole, messages, tools)
        if spans is None:
            if train_on == "last":
                numbers = numbers[-1:]
            spans = [self.span(whole, messages, i, tools, place) for i in numbers]
        elif len(spans) != len(numbers):
            numbers = [None] * len(spans)  # the template marks other turns as well, or fewer: its author knows why
        if train_on == "last":
            numbers, spans = numbers[-1:], spans[-1:]

        # 3. Which of them are trained on.
        answers = []
        for number, (start, end) in zip(numbers, spans, strict=True):
            message = {"content": whole[start:end]}
            if number is not None:
                message = messages[number]
            if message.get("weight") == 0 or message.get("train") is False:  # how OpenAI's and axolotl's files say so
                continue
            if not prints(whole[max(0, start - len(prompt)) : end], message):
                if number != len(messages) - 1:
                    remarks.add("an earlier answer that the chat template cuts: that answer carries no loss", place)
                    continue
                whole, start, end = self.uncut(whole, messages, tools, place, answers)
                remarks.add("reasoning in the last answer that the chat template cuts: it is put back", place)
            if not (message["content"].strip() or message.get("tool_calls")):
                remarks.add("an empty answer, which trains the model to end at once", place)
            answers.append(Answer(start, end, add_eos=not ending.strip()))
        return Text(whole, answers, "messages")

    def marked_spans(self, whole: str, messages: list[dict], tools) -> list[tuple[int, int]] | None:
        """The spans between the template's {% generation %} marks, None where it has no marks."""
        source = self.source(tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        names = self.tokenizer.special_tokens_map
        _, marks = render_jinja_template(
            [messages], tools, chat_template=source, return_assistant_tokens_mask=True, **names
        )
        prompt, header, ending = self.turn
        spans = []
        for start, end in marks[0]:
            if spans and spans[-1][1] == start:  # one turn in several marks
                start = spans.pop()[0]
            spans.append((start, end))
        for i, (start, end) in enumerate(spans):
            # Marks that include (part of) the role's header begin too early: the generation prompt is not answered.
            for lead in filter(None, (prompt, header)):
                outside = characters_before(whole, start, lead)
                if outside is not None:
                    start += len(lead) - outside
                    break
            # Marks that leave out the token that ends the turn end too early.
            if not whole[:end].rstrip().endswith(ending.strip()) and whole[end:].startswith(ending):
                end += len(ending)
            spans[i] = start, start + len(whole[start:end].rstrip())
        return spans

    def span(self, whole: str, messages: list[dict], number: int, tools, place: str) -> tuple[int, int]:
        """The characters of `whole` that message `number`, an assistant's, added after the generation prompt."""
        prompt, header, ending = self.turn
        rewrites = UserError(
            f"{place}: the chat template rewrites earlier turns, so that no part of the text is this answer's alone: "
            "train the last answer with --train_on last, or use prompt and completion"
        )
        before = self.render(messages[:number], tools, place, prompt=True)
        if not whole.startswith(before):  # the generation prompt says more than the turn's header, such as <think>
            before = self.render(messages[:number], tools, place) + header
        if not whole.startswith(before):
            raise rewrites
        start = len(before)

        upto = whole
        if number < len(messages) - 1:
            upto = self.render(messages[: number + 1], tools, place)
        content = messages[number]["content"].strip()
        at = whole.find(content, start)
        if at < 0:  # it may begin with what the generation prompt ends with, such as <think>
            at = whole.find(content, max(0, start - len(prompt)))
        after_content = start  # the content may hold the token that ends turns
        if at >= 0:
            after_content = max(start, at + len(content))
        if whole.startswith(upto):
            found = whole.find(ending, after_content, len(upto))
            end = found + len(ending)
            if not ending or found < 0:  # a turn that ends in another token, as calls of tools do in Llama 3
                end = start + len(whole[start : len(upto)].rstrip())
        elif at < 0 or whole[start:at].strip():  # the template cuts this turn where it is not the last
            return start, start
        else:
            # As the last turn it is printed otherwise: with thoughts before it, or with an EOS after it. Its end must
            # follow the content, or stand in what both have in common: any later one is another turn's.
            found = whole.find(ending, after_content)
            in_common = len(os.path.commonprefix([whole, upto]))
            if not ending or found < 0 or (whole[after_content:found].strip() and found + len(ending) > in_common):
                raise rewrites
            end = found + len(ending)
        return start, end

    def uncut(self, whole: str, messages: list[dict], tools, place: str, answers: list[Answer]) -> tuple[str, int, int]:
        """The conversation with its last answer as the model would write it, where the template cuts its reasoning."""
        *earlier, last = messages
        said = last["content"]
        for name in REASONING:
            if isinstance(last.get(name), str):
                said = f"<think>\n{last[name]}\n</think>\n\n{last['content']}"
                break
        before = self.render(earlier, tools, place, prompt=True)
        known = whole[: answers[-1].end] if answers else ""  # what the earlier answers' spans stand in
        if "</think>" not in said or last.get("tool_calls") or not before.startswith(known):
            raise UserError(
                f"{place}: the chat template does not print the last answer whole: use prompt and completion"
            )
        if before.rstrip().endswith("<think>"):  # the prompt has opened the thoughts
            said = said.lstrip().removeprefix("<think>").lstrip("\n")
        text = before + said.rstrip() + self.turn[2]
        return text, len(before), len(text)


def characters_before(text: str, at: int, lead: str) -> int | None:
    """How many characters of `lead`, which ends at or after position `at`, stand before it; None: no lead is there."""
    for outside in range(min(at, len(lead)) + 1):
        if text.startswith(lead, at - outside):
            return outside
    return None


def prints(text: str, message: dict) -> bool:
    """Whether a rendered turn holds all that its message says; templates trim and pad, so blanks do not count."""
    said = [message["content"]]
    for name in REASONING:
        if isinstance(message.get(name), str):
            said.append(message[name])
    for call in message.get("tool_calls", []):
        said.append(call["function"]["name"])
    squeezed = "".join(text.split())
    return all("".join(part.split()) in squeezed for part in said)


# ------------------------------------------------------------------------------------------------ texts to tokens


def token_pattern(tokenizer, special: bool = False) -> str:
    """A regular expression of the tokens that stand outside the vocabulary's words, or of the special ones alone."""
    names = {*tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.content.strip() and (token.special or not special):
            names.add(token.content)
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing


def start_tokens(tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before every text, such as BOS."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(whole[: whole.index(plain[0])])


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a prompt, for training and both evaluations: start tokens, then the text's own.

    No tokens are put after it: EOS after a prompt, which tokenizers with add_eos_token add, tells the model to stop.
    A text that begins with the start tokens, such as one rendered beforehand, gets no second ones.
    """
    start = start_tokens(tokenizer)
    ids = encode(tokenizer, [text])[0]
    if ids[: len(start)] == start:
        return ids
    return start + ids


def chat_prompt(tokenizer, messages: list[dict], tools: list | None = None) -> list[int]:
    """The token ids of a conversation with the generation prompt after it, as training saw it before an answer."""
    text = ChatTemplate(tokenizer).render(messages, tools, "a prompt", prompt=True)
    return encode(tokenizer, [text])[0]


def stop_ids(tokenizer) -> set[int]:
    """The tokens that end an answer: EOS, and the token that ends a turn of the chat template."""
    ids = {tokenizer.eos_token_id}
    with suppress(UserError):  # no template, or one that refuses a plain question and its answer
        ending = encode(tokenizer, [ChatTemplate(tokenizer).turn[2].strip()])[0]
        if len(ending) == 1 and ending[0] in tokenizer.get_added_vocab().values():  # no word of the text
            ids.update(ending)
    return ids


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of many texts without special tokens around them, in parallel where the tokenizer can.

    The tokenizers library is called directly: transformers would build masks and offsets too, a third of the time.
    """
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()  # its file may ask for it
        tokenizer.backend_tokenizer.no_padding()
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def encode_pieces(tokenizer, texts: list[Text]) -> list[tuple[list[int], bytes]]:
    """Each text cut at the borders of its answers and the pieces tokenised apart, as generation does.

    Ids, and for each a byte: 1 where the token belongs to an answer.
    """
    pieces = []
    for text in texts:
        at = 0
        for answer in text.answers:
            said = text.text[answer.start : answer.end]
            if answer.add_eos and said.rstrip().endswith(tokenizer.eos_token):  # rendered beforehand: no second EOS
                said = said.rstrip().removesuffix(tokenizer.eos_token)
            pieces += [text.text[at : answer.start], said]  # DIFFERS 12: not as one string
            at = answer.end
    coded = iter(encode(tokenizer, pieces))
    results = []
    for text in texts:
        ids, mask = [], b""
        for answer in text.answers:
            before, said = next(coded), next(coded)
            if answer.add_eos and (text.form != "messages" or answer is text.answers[-1]):
                said = [*said, tokenizer.eos_token_id]
            ids += before + said
            mask += b"\0" * len(before) + b"\1" * len(said)
        results.append((ids, mask))
    return results


def encode_chats(tokenizer, texts: list[Text]) -> list[tuple[list[int], bytes]]:
    """Conversations tokenised whole, as the template's own users do; which tokens are answers is seen from offsets.

    Where a token reaches over an answer's border (two line ends in one token, say) the text is cut there, as it is
    when the model writes the answer; so is every text of a tokenizer that has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return encode_pieces(tokenizer, texts)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    encodings = tokenizer.backend_tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
    results = []
    for text, encoding in zip(texts, encodings, strict=True):
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]  # ends: the characters at which tokens end
        mask, last, torn = bytearray(len(ids)), 0, False
        for answer in text.answers:
            first, last = bisect_right(ends, answer.start), bisect_right(ends, answer.end)
            mask[first:last] = b"\1" * (last - first)
            # The token before a border must end at it. Its own start is no sign: offsets leave out leading blanks.
            for border, token in ((answer.start, first), (answer.end, last)):
                torn = torn or (token > 0 and ends[token - 1] != border)
        if torn:
            results += encode_pieces(tokenizer, [text])
            continue
        ids, mask = ids[:last], mask[:last]  # what stands after the last answer has no loss
        if text.answers and text.answers[-1].add_eos:
            ids, mask = [*ids, tokenizer.eos_token_id], mask + b"\1"
        results.append((ids, bytes(mask)))
    return results


class Encoded(NamedTuple):
    """A row's token ids before they are fitted into --max_length; they end with its last answer."""

    start: list[int]  # start tokens, which stay whatever is cut
    ids: list[int]
    mask: bytes  # 1 for each id of an answer
    form: str


def fit(row: Encoded, max_length: int) -> tuple[list[int], bytes] | None:
    """Ids and mask of at most `max_length` tokens; None where there is no answer, or no room for it.

    Whatever stands before the last answer is shortened from the left; its end, which says when to stop, is never cut.
    """
    mask = row.mask
    answer = len(mask) - (mask.rfind(b"\0") + 1)  # tokens of the last answer
    context = len(mask) - answer
    room = max_length - len(row.start) - answer  # for the context
    if answer == 0 or room < min(1, context) or len(row.start) + len(mask) < 2:  # < 2: nothing predicts the answer
        return None
    cut = max(0, context - room)
    if cut and mask[cut - 1] and mask[cut]:  # an earlier answer cut in two: what is left of it carries no loss
        rest = mask.index(b"\0", cut)
        mask = bytes(rest) + mask[rest:]
    mask = bytes(len(row.start)) + mask[cut:]
    return row.start + row.ids[cut:], b"\0" + mask[1:]


# ---------------------------------------------------------------------------------------------- the tokenised rows

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 can't


class Example(NamedTuple):
    """One row as the model sees it."""

    ids: Tensor  # [T] token ids
    supervised: Tensor  # [T] bool: tokens that carry loss; never the first, which nothing predicts


@dataclass
class TokenizedRows:
    """All rows end to end in flat tensors; row i is ids[offsets[i]:offsets[i + 1]].

    A number counts the rows of all files in the order in which they were given, dropped ones included: `place` maps it
    to its file and row.
    """

    ids: Tensor  # [tokens] int32
    supervised: Tensor  # [tokens] bool
    offsets: list[int]  # [rows + 1]
    sources: Tensor  # [rows] into names
    numbers: Tensor  # [rows] 0-based row numbers over all files
    names: list[str]
    shortened: int
    dropped: int
    files: list[tuple[str, int]] = field(default_factory=list)  # of each file its path and the number of its first row
    forms: dict[str, int] = field(default_factory=dict)  # rows of each form: alpaca, text, messages
    remarks: list[str] = field(default_factory=list)  # what was done with unusual rows, one line each

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, row: int) -> Example:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return Example(self.ids[span], self.supervised[span])

    def length(self, row: int) -> int:
        return self.offsets[row + 1] - self.offsets[row]

    def supervised_tokens(self, rows: Tensor) -> Tensor:
        """Number of supervised tokens of each of `rows`, [n] float32."""
        counts = [int(self.example(row).supervised.sum()) for row in rows.tolist()]
        return torch.tensor(counts, dtype=torch.float32)

    @property
    def rendering(self) -> str:
        """How an evaluation should prompt the model: as most rows were rendered, "alpaca", "text" or "messages"."""
        return max(self.forms, key=self.forms.get, default="text")

    def place(self, number: int) -> str:
        """The file and the 1-based row of a number, as in selection.jsonl."""
        for path, first in reversed(self.files):
            if first <= number:
                return f"{path} row {number - first + 1}"
        raise IndexError(number)

    def without_copies(self) -> TokenizedRows:
        """Less the rows whose tokens and supervised tokens are those of a row before. Numbers and sources stay."""
        seen: set[bytes] = set()
        stays = torch.zeros(len(self), dtype=torch.bool)
        for row in range(len(self)):
            example = self.example(row)
            content = hashlib.sha256(example.ids.numpy())
            content.update(example.supervised.numpy())
            if content.digest() not in seen:
                seen.add(content.digest())
                stays[row] = True
        return self.where(stays, "are copies of")

    def without_near_copies(self, similarity: float, show: bool = False) -> TokenizedRows:
        """Less the rows that resemble a row before them which stays. Numbers and sources stay.

        `similarity` in 0..1 is of the sets of neighbouring tokens of two rows, without the template that most prompts
        share: the size of what they have in common over the size of both (Jaccard), estimated by MinHash. It takes 10 s
        for 50,000 rows; `show` draws a progress bar.
        """
        return self.where(unlike_rows_before(minhash(self), similarity, show), "resemble")

    def where(self, stays: Tensor, how: str) -> TokenizedRows:
        """The rows where `stays` [rows] is true; `how` says what the others have to do with rows before them."""
        left_out = int((~stays).sum())
        if left_out == 0:
            return self
        remarks = [*self.remarks, f"{left_out} rows {how} rows before them, dropped"]
        lengths = torch.tensor(self.offsets).diff()  # [rows]
        tokens = stays.repeat_interleave(lengths)  # [tokens] bool
        sources = self.sources[stays]
        lost = set(self.sources.tolist()) - set(sources.tolist())
        if lost:
            names = ", ".join(self.names[q] for q in sorted(lost))
            remarks.append(f"no row is left of {names}: all {how} rows of other sources")
        return replace(
            self,
            ids=self.ids[tokens],
            supervised=self.supervised[tokens],
            offsets=[0, *lengths[stays].cumsum(0).tolist()],
            sources=sources,
            numbers=self.numbers[stays],
            remarks=remarks,
        )

    def fingerprint(self) -> str:
        """Equal for equal training data: what a resumed run compares."""
        digest = hashlib.sha256(self.ids.numpy())
        digest.update(self.supervised.numpy())
        digest.update(repr((self.offsets, self.sources.tolist(), self.names)).encode())
        return f"{len(self)} rows {digest.hexdigest()[:16]}"


def tokenize(rows, places, tokenizer, args, names: list[str], show: bool) -> TokenizedRows:
    """Tokenise rows as if they were one file; `places` says where each stands."""
    return tokenize_files([("all", "these rows", zip(rows, places, strict=True))], tokenizer, args, names, show)


def tokenize_files(files, tokenizer, args, names: list[str], show: bool) -> TokenizedRows:
    """Tokenise files, each given as (source of its rows that name none, path, iterator of rows and places).

    `names` are sources that are known already and keep their ids. Rows come one by one and go as soon as they are
    tokens, and tokens are kept as machine integers, four bytes each, where Python's lists take forty.
    """
    source_of = {name: q for q, name in enumerate(names)}
    ids, supervised, offsets, sources, numbers = array("i"), bytearray(), [0], [], []
    first_numbers, forms, remarks = [], Counter(), Remarks()
    number, shortened, dropped = 0, 0, 0
    too_long = []  # lengths of the rows that do not fit whole
    with tqdm(desc="tokenising", unit=" rows", delay=1, disable=not show, leave=False) as bar:
        for default_source, path, rows in files:
            first_numbers.append((path, number))
            for place, source, row in encoded_rows(rows, tokenizer, args, remarks):
                length = len(row.start) + len(row.ids)
                if length > args.max_length:
                    too_long.append(length)
                kept = fit(row, args.max_length)
                if kept is None:
                    dropped += 1
                    remarks.add(f"{reason_to_drop(row, args.max_length)}, dropped", place)
                else:
                    if length > args.max_length:
                        shortened += 1
                        remarks.add(f"text before the answer cut on the left to --max_length {args.max_length}", place)
                    ids.extend(kept[0])
                    supervised += kept[1]
                    offsets.append(len(ids))
                    name = default_source
                    if source is not None:
                        name = str(source)
                    sources.append(source_of.setdefault(name, len(source_of)))
                    numbers.append(number)
                    forms[row.form] += 1
                number += 1
                bar.update()

    lines = remarks.lines()
    if shortened + dropped > 0.03 * number and too_long:
        lines.append(how_to_keep(too_long, number))
    if not numbers:
        raise UserError(f"{first_numbers[0][0]}: no row can be trained on: {'; '.join(lines)}")
    return TokenizedRows(
        ids=torch.frombuffer(ids, dtype=torch.int32),  # the array's own memory
        supervised=torch.frombuffer(supervised, dtype=torch.bool),
        offsets=offsets,
        sources=torch.tensor(sources),
        numbers=torch.tensor(numbers),
        names=list(source_of),
        shortened=shortened,
        dropped=dropped,
        files=first_numbers,
        forms=dict(forms),
        remarks=lines,
    )


def encoded_rows(rows, tokenizer, args, remarks: Remarks) -> Iterator[tuple[str, object, Encoded]]:
    """The rows of a file as token ids: place, source (None: the file's) and ids with their mask."""
    chat, start = ChatTemplate(tokenizer), start_tokens(tokenizer)
    rows = with_sources(rows, args.source_field)
    while part := list(islice(rows, 2000)):  # enough rows at a time to occupy all cores
        texts, places = [], []
        for row, place, _ in part:
            text = render(row, place, chat, remarks, args.train_on)
            for name in text.unused:
                if name != args.source_field:
                    remarks.unused[name] = None
            texts.append(text)
            places.append(place)
        tokens = encode_texts(tokenizer, texts, places)
        for (_, place, source), text, (ids, mask) in zip(part, texts, tokens, strict=True):
            begin = start
            if text.form == "messages":  # a template writes its own BOS, or none
                begin = [token for token in ids[:1] if token == tokenizer.bos_token_id]
            if begin and ids[: len(begin)] == begin:  # by the template, or in a prompt that was rendered beforehand
                ids, mask = ids[len(begin) :], mask[len(begin) :]
            yield place, source, Encoded(begin, ids, mask, text.form)


def reason_to_drop(row: Encoded, max_length: int) -> str:
    if 1 not in row.mask:
        return "no answer"
    if len(row.start) + len(row.ids) < 2:
        return "no text"
    return f"a last answer that does not fit in --max_length {max_length}"


def with_sources(rows, source_field: str) -> Iterator[tuple[dict, str, object]]:
    """Rows, their places and their sources: None for all rows of a file in which none has a source.

    Missing, null, NaN and empty sources are the same. Where some rows of a file have a source and others have not, it
    is not ours to guess where the others belong: raises UserError with their number.
    """
    named, missing, first = 0, 0, ""
    for row, place in rows:
        if not isinstance(row, dict):  # refused when it is rendered
            yield row, place, None
            continue
        source = row.get(source_field)
        if isinstance(source, (list, dict)):
            kind = type(source).__name__
            raise UserError(f"{place}: field {source_field!r} is a {kind}: a source must be a string or a number")
        if is_missing(source):
            if not missing:
                what = "no field" if source is None else f"{source!r} as"
                first = f"{place} has {what} {source_field!r}"
            missing += 1
            source = None
        else:
            named += 1
        if named and missing:
            for other, _ in rows:  # to the end of the file, for their number
                missing += isinstance(other, dict) and is_missing(other.get(source_field))
            raise UserError(f"{first}, other rows do: name the source of all rows ({missing:,} have none)")
        yield row, place, source


def is_missing(source) -> bool:
    return source is None or source == "" or source != source  # NaN alone differs from itself


def encode_texts(tokenizer, texts: list[Text], places: list[str]) -> list[tuple[list[int], bytes]]:
    """Ids and mask of each text, as its form asks for it."""
    for text, place in zip(texts, places, strict=True):
        if not text.text.isascii() and LONE_SURROGATE.search(text.text):
            raise UserError(f"{place} has half a surrogate pair (\\ud800 to \\udfff): fix the row")
    chats, others = [], []
    for text in texts:
        if text.form == "messages":
            chats.append(text)
        else:
            others.append(text)
    coded_chats, coded_others = iter(encode_chats(tokenizer, chats)), iter(encode_pieces(tokenizer, others))
    results = []
    for text in texts:  # back in the order of the rows
        if text.form == "messages":
            results.append(next(coded_chats))
        else:
            results.append(next(coded_others))
    return results


def how_to_keep(lengths: list[int], rows: int) -> str:
    """The --max_length that keeps most rows whole, and the one that keeps all, where too many do not fit."""
    lengths = sorted(lengths, reverse=True)
    most = lengths[min(len(lengths) - 1, rows // 100)]
    return f"{len(lengths) / rows:.0%} of the rows do not fit: --max_length {most} keeps 99 % whole, {lengths[0]} all"


# ------------------------------------------------------------------------------------------- rows that resemble others

HASHES = 128  # MinHash values of a row: two rows' similarity is estimated with a standard error of up to 0.044
BAND = 4  # so many values must agree somewhere before two rows are compared: at similarity 0.5 for 87 % of the pairs
BUCKET = 50  # rows with one band in common that later rows are compared with; a frequent phrase would hold thousands


def prompt_tokens(example: Example) -> int:
    """Tokens before the first supervised one."""
    return int(example.supervised.int().argmax())


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


def neighbours(rows: list[Example], head: int, tail: int):
    """One number for every two neighbouring tokens of `rows`, and where each row's begin: two numpy arrays.

    The first `head` and the last `tail` tokens of a prompt are its template and left out.
    """
    parts, starts, begin = [], [], 0
    for example in rows:
        prompt = prompt_tokens(example)
        end = max(0, prompt - tail)
        question, answer = example.ids[min(head, end) : end], example.ids[prompt:]
        gap = example.ids.new_zeros(1)  # it keeps rows apart, and no row is empty
        parts += [question, answer, gap]
        starts.append(begin)
        begin += len(question) + len(answer) + 1
    ids = torch.cat(parts).long()
    pairs = (ids << 32) | ids.roll(-1)  # a token and the one after it
    return pairs.numpy().astype("uint64"), starts


def minhash(data: TokenizedRows):
    """[rows, HASHES] numbers: the share of equal ones in two rows estimates how similar the rows are.

    For each column another hash puts all pairs of tokens in a random order; a row's number is its first pair in it,
    and two rows have the same first pair as often as a pair of either is a pair of both.
    """
    import numpy  # transformers needs it, too

    # From all over the data: rows of one source may have more in common than the template.
    some = min(300, len(data))
    head, tail = template([data.example(i * len(data) // some) for i in range(some)])
    keys = numpy.random.default_rng(0).integers(1, 1 << 62, HASHES, dtype=numpy.uint64)
    values = numpy.empty((len(data), HASHES), dtype=numpy.uint32)
    for first in range(0, len(data), 4096):  # few rows at a time take little memory
        rows = [data.example(i) for i in range(first, min(first + 4096, len(data)))]
        pairs, starts = neighbours(rows, head, tail)
        for column, key in enumerate(keys):
            # SplitMix64's mixing steps, modulo 2^64: a multiplication alone keeps the order of the pairs too well
            mixed = pairs + key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
            upper = (mixed >> numpy.uint64(32)).astype(numpy.uint32)
            values[first : first + len(rows), column] = numpy.minimum.reduceat(upper, starts)
    return values


def unlike_rows_before(values, similarity: float, show: bool) -> Tensor:
    """[rows] bool: a row stays whose estimated similarity with all rows before it that stay is below `similarity`.

    `values` are those of `minhash`. Only rows with a whole band of values in common are compared.
    """
    stays = torch.ones(len(values), dtype=torch.bool)
    rows_with: dict[tuple[int, bytes], list[int]] = {}  # that stay, by the place of a band and its values
    for i, row in enumerate(tqdm(values, "near copies", delay=1, disable=not show, leave=False)):
        bands = [(place, row[place : place + BAND].tobytes()) for place in range(0, HASHES, BAND)]
        buckets = [rows_with.setdefault(band, []) for band in bands]
        candidates = sorted({j for bucket in buckets for j in bucket})
        if candidates and (values[candidates] == row).mean(1).max() >= similarity:
            stays[i] = False
            continue
        for bucket in buckets:
            if len(bucket) < BUCKET:
                bucket.append(i)
    return stays


# -------------------------------------------------------------------------------------------- tokens kept on disk

SMALL = 1 << 20  # bytes: smaller files are tokenised in less than a second


def default_cache_dir() -> str:
    """Beside other programs' caches, not in the output folder: runs that differ in seed or flags share their tokens."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "colm")


def load_tokens(patterns, tokenizer, args, names: list[str], show: bool) -> TokenizedRows:
    """The tokenised rows of files, from --cache_dir where they have been tokenised before.

    One process of a host does the work and the others wait for its file, which all of them map into the same memory.
    """
    paths = expand_paths(patterns)
    sources = source_of_files(paths)

    def build(show_bar: bool) -> TokenizedRows:
        files = zip(sources, paths, map(iterate_rows, paths), strict=True)
        return tokenize_files(files, tokenizer, args, names, show_bar)

    key = None
    if args.cache_dir:
        key = cache_key(paths, tokenizer, args, names)
    if key is None:
        return build(show)
    file = Path(args.cache_dir).expanduser() / f"{key}.safetensors"
    built = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            data = read_cache(file, len(tokenizer))
            if data is None:
                built = build(True)
                write_cache(file, built)
                built = None  # the file's pages are the one copy
                data = read_cache(file, len(tokenizer))
            return data
    except OSError as error:
        data = built or build(show)
        reason = error.strerror or error
        data.remarks.append(
            f"--cache_dir {args.cache_dir} can't be used ({reason}): name another folder, or '' for none"
        )
        return data


def cache_key(paths: list[str], tokenizer, args, names: list[str]) -> str | None:
    """A hash of all that shapes the tokens, None where they need not or can't be kept.

    This file's own text is part of it: another version of the code makes its own tokens.
    """
    contents, size = [], 0
    for path in paths:
        files = [path]
        if not Path(path).exists():
            if not HUB_NAME.fullmatch(path) or FILE_NAME.search(path):
                return None  # reading it says what is wrong
            files = [file["filename"] for file in getattr(hub_dataset(path), "cache_files", [])]
            if not files:
                return None  # streamed: what it holds is known at its end
        for file in files:
            if not Path(file).is_file():
                return None
            size += Path(file).stat().st_size
            contents.append((path, file_hash(Path(file))))
    if size < SMALL:
        return None
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer_files = []
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                tokenizer_files.append((file.name, file_hash(file)))
    parts = {
        "code": file_hash(Path(__file__)),
        "libraries": [tokenizers.__version__, transformers.__version__],
        "files": contents,
        "tokenizer": [type(tokenizer).__name__, tokenizer_files],
        "flags": [args.source_field, args.train_on, args.max_length, names],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path):
    """One process at a time; the system lifts the lock of a process that dies."""
    import fcntl

    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


CACHED_TENSORS = {
    "ids": torch.int32,
    "supervised": torch.bool,
    "offsets": torch.int64,
    "sources": torch.int64,
    "numbers": torch.int64,
}
CACHED_VALUES = ("names", "shortened", "dropped", "files", "forms", "remarks")


def write_cache(file: Path, data: TokenizedRows) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: torch.as_tensor(getattr(data, name)) for name in CACHED_TENSORS}
    values = {name: getattr(data, name) for name in CACHED_VALUES}
    try:
        with replacing(file) as aside:
            save_file(tensors, aside, metadata={"values": json.dumps(values)})
    except SafetensorError as error:  # its name for a full disk and the like
        raise OSError(str(error)) from None


def read_cache(file: Path, vocabulary: int) -> TokenizedRows | None:
    """The rows of a cache file, None where there is none or it is damaged.

    Safetensors and JSON hold numbers and text alone: whoever writes such a file can't make us run anything.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in CACHED_TENSORS}  # mapped, not read
            values = json.loads(f.metadata()["values"])
        values = {name: values[name] for name in CACHED_VALUES}
        if not is_sound(**tensors, sources_known=len(values["names"]), vocabulary=vocabulary):
            return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    tensors["offsets"] = tensors["offsets"].tolist()
    values["files"] = [tuple(entry) for entry in values["files"]]
    return TokenizedRows(**tensors, **values)


def is_sound(ids, supervised, offsets, sources, numbers, sources_known: int, vocabulary: int) -> bool:
    """Whether tensors from a file are rows: what is not would fail far from here, or train on anything."""
    tensors = (ids, supervised, offsets, sources, numbers)
    if [tensor.dtype for tensor in tensors] != list(CACHED_TENSORS.values()):
        return False
    if len(offsets) < 2 or len(sources) != len(offsets) - 1 or len(numbers) != len(sources):
        return False
    if offsets[0] != 0 or offsets[-1] != len(ids) or len(supervised) != len(ids) or (offsets.diff() < 2).any():
        return False
    if supervised[offsets[:-1]].any():  # the first token of a row
        return False
    if ids.min() < 0 or ids.max() >= vocabulary:
        return False
    return bool(sources.min() >= 0 and sources.max() < sources_known)


# ------------------------------------------------------------------------------------------------------ tokenizer


def load_tokenizer(args):
    """The tokenizer of --model, or the demo's own."""
    if args.model is None:
        return demo_tokenizer()
    from transformers import AutoTokenizer

    source = args.model
    adapter = Path(source, "adapter_config.json")
    if adapter.is_file() and not any(Path(source).glob("tokenizer*")):  # saved without one: its base model has it
        source = json.loads(adapter.read_text()).get("base_model_name_or_path") or source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the hub, the tokenizers library and remote code each raise their own kinds
        problem = "no tokenizer could be loaded"
        if not Path(source).exists():
            problem = "there is no such folder, and from the hub no tokenizer could be loaded"
        raise UserError(
            f"--model {source}: {problem} ({one_line(error)}): "
            "give a folder with config.json and a tokenizer, or a reachable hub id"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no EOS token, which ends every completion: set one")
    return tokenizer


def demo_tokenizer():
    """A byte-level BPE of 512 tokens, trained on the generated mixture in a blink."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = ("".join(prompt_and_completion(row, "")) for row in demo_rows("train"))
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


# ----------------------------------------------------------------------------------------------- files, whole or not


@contextmanager
def replacing(path: Path):
    """Write a file or folder aside and rename it: a kill at any instant leaves the old one or the new one."""
    aside, old = path.with_name(f"tmp-{path.name}"), path.with_name(f"tmp-old-{path.name}")
    try:
        yield aside
        if path.is_dir():  # no folder can be renamed onto another
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove(old)
        remove(aside)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
