"""From files to token ids: reading rows, rendering them as text, tokenising them for the trainer and the evaluations.

    files -> rows (dicts) -> prompt and completion texts -> token ids and a mask of the supervised tokens

Also here, because every script needs them: `UserError` and the flag parser.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm


class UserError(Exception):
    """Something the user can mend: one line with the value, the rule and the remedy; exit code 2."""


# ---------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}: see {self.prog} --help")


def config_flags(path: str) -> list[str]:
    import yaml  # comes with accelerate

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}: give a readable YAML file") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} is not a mapping: write one flag a line, as in 'pool_size: 128'")
    flags = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{key}")
        elif value is not None:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


# ----------------------------------------------------------------------------------------------------------- rows

PROMPT = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


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

    sizes = {"repeat": 60, "reverse": 40, "compare": 30, "add": 8, "count": 6, "sort": 4, "last": 2}
    rows = [(source, *make(source)) for source, size in sizes.items() for _ in range(size * scale)]
    return [{"source": source, "instruction": prompt, "output": answer} for source, prompt, answer in rows]


def read_rows(path: str) -> tuple[list[dict], list[str]]:
    """Rows of a file or hub dataset, and where each stands, for error messages."""
    file = Path(path)
    if not file.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", path) and not re.search(r"\.(jsonl?|gz)$", path):
            return read_hub(path)
        raise UserError(f"{path} does not exist: give a .json or .jsonl file, or a hub dataset id such as org/name")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as f:
            text = f.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} can't be read ({error}): give a UTF-8 .json or .jsonl file, plain or .gz") from None
    if not text.strip():
        raise UserError(f"{path} is empty: give a file with rows")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno}: broken JSON ({error.msg}): mend that line") from None
        if not rows:
            raise UserError(f"{path} holds no rows: give a file with rows")
        return rows, [f"{path} row {i + 1}" for i in range(len(rows))]
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: broken JSON ({error.msg}): mend that line") from None
            places.append(f"{path} line {number}")
    return rows, places


def read_hub(name: str) -> tuple[list[dict], list[str]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name} is no file; a hub dataset needs a package: pip install datasets") from None
    path, _, split = name.partition(":")
    try:
        rows = list(load_dataset(path, split=split or "train"))
    except Exception as error:  # the hub's errors have no common class
        raise UserError(
            f"{name}: {' '.join(str(error).split())[:200]}: give a file or a reachable dataset id"
        ) from None
    return rows, [f"{name} row {i + 1}" for i in range(len(rows))]


def prompt_and_completion(row: dict, place: str, tokenizer) -> tuple[str, str]:
    """The two texts of a row; the prompt carries no loss."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is a {type(row).__name__}: every row must be a JSON object")
    if "messages" in row:
        return chat_texts(row["messages"], place, tokenizer)
    names = ("prompt", "completion") if "prompt" in row else ("instruction", "output")
    for name in names + (("input",) if row.get("input") and names[0] == "instruction" else ()):
        if name not in row:
            raise UserError(
                f"{place} has no field {name!r}: give instruction and output, prompt and completion, or messages"
            )
        if not isinstance(row[name], str):
            raise UserError(f"{place}: field {name!r} is a {type(row[name]).__name__}: it must be a string")
    if names[0] == "prompt":
        return row["prompt"], row["completion"]
    if row.get("input"):
        head = f"{PROMPT_WITH_INPUT}### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}"
    else:
        head = f"{PROMPT}### Instruction:\n{row['instruction']}"
    return head + "\n\n### Response:", row["output"]


def chat_texts(messages, place: str, tokenizer) -> tuple[str, str]:
    """The last assistant turn is the completion; everything before it is the prompt."""
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{place}: messages must be a list of role and content that ends with an assistant's turn")
    if not tokenizer.chat_template:
        raise UserError(f"{place} has messages, but the tokenizer has no chat template: use prompt and completion")
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what their authors chose, such as "roles must alternate"
        raise UserError(f"{place}: the chat template refuses these messages ({error}): mend the row") from None
    if not whole.startswith(prompt):  # templates that add a thinking block to the generation prompt, for instance
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
        if not whole.startswith(prompt):
            raise UserError(f"{place}: the chat template rewrites earlier turns: use prompt and completion")
    return prompt, whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 can't


class Example(NamedTuple):
    """One row as the model sees it."""

    ids: Tensor  # [T] token ids
    supervised: Tensor  # [T] bool: tokens that carry loss; never the first, which nothing predicts


@dataclass
class TokenizedRows:
    """All rows end to end in flat tensors; row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: Tensor  # [tokens] int32
    supervised: Tensor  # [tokens] bool
    offsets: list[int]  # [rows + 1]
    sources: Tensor  # [rows] into names
    numbers: Tensor  # [rows] 0-based row numbers of the file
    names: list[str]
    shortened: int
    dropped: int

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

    def fingerprint(self) -> str:
        """Equal for equal training data: what a resumed run compares."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.supervised.numpy().tobytes())
        digest.update(repr((self.offsets, self.sources.tolist(), self.names)).encode())
        return f"{len(self)} rows {digest.hexdigest()[:16]}"


def start_tokens(tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before every text, such as BOS."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: whole.index(plain[0])]


def tokenize(rows, places, tokenizer, args, names: list[str], show: bool) -> TokenizedRows:
    """Tokenise prompts and completions apart, add EOS, shorten long prompts from the left, drop what can't be kept.

    Prompts carry no loss; the end of an answer is never cut.   # DIFFERS 12
    """
    named = [isinstance(row, dict) and row.get(args.source_field) is not None for row in rows]
    has_sources = any(named)
    start, source_of = start_tokens(tokenizer), {name: q for q, name in enumerate(names)}
    ids, supervised, offsets, sources, numbers, shortened, dropped = [], [], [0], [], [], 0, 0
    for first in tqdm(range(0, len(rows), 1000), "tokenising", unit="k rows", disable=not show, leave=False):
        part = range(first, min(first + 1000, len(rows)))
        texts = [prompt_and_completion(rows[i], places[i], tokenizer) for i in part]
        for i, text in zip(part, texts, strict=True):
            if has_sources and not named[i]:
                raise UserError(f"{places[i]} has no field {args.source_field!r}, other rows do: name its source")
            if LONE_SURROGATE.search("".join(text)):
                raise UserError(f"{places[i]} has half a surrogate pair (\\ud800 to \\udfff): mend the row")
        heads, tails = (
            tokenizer([text[k] for text in texts], add_special_tokens=False, verbose=False)["input_ids"] for k in (0, 1)
        )
        for i, prompt, completion in zip(part, heads, tails, strict=True):
            begin, completion = start, [*completion, tokenizer.eos_token_id]
            if "messages" in rows[i]:  # the template has added BOS
                begin = [token for token in prompt[:1] if token == tokenizer.bos_token_id]
                prompt = prompt[len(begin) :]
            room = args.max_length - len(begin) - len(completion)
            if room < bool(prompt) or not (begin or prompt or len(completion) > 1):
                dropped += 1
                continue
            shortened += len(prompt) > room
            ids.append(torch.tensor([*begin, *prompt[max(0, len(prompt) - room) :], *completion], dtype=torch.int32))
            offsets.append(offsets[-1] + len(ids[-1]))
            mask = torch.zeros(len(ids[-1]), dtype=torch.bool)
            mask[max(1, len(ids[-1]) - len(completion)) :] = True
            supervised.append(mask)
            sources.append(source_of.setdefault(str(rows[i][args.source_field]) if named[i] else "all", len(source_of)))
            numbers.append(i)
    if not ids:
        raise UserError(f"{places[0].rsplit(' ', 2)[0]}: no row has a completion within --max_length: raise it")
    sources, numbers = torch.tensor(sources), torch.tensor(numbers)
    ids, supervised = torch.cat(ids), torch.cat(supervised)
    return TokenizedRows(ids, supervised, offsets, sources, numbers, list(source_of), shortened, dropped)


# ------------------------------------------------------------------------------------------------------ tokenizer


def load_tokenizer(args):
    if args.model is None:
        return demo_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # the hub, the tokenizers library and remote code each raise their own kinds
        raise UserError(
            f"--model {args.model}: no tokenizer could be loaded ({' '.join(str(error).split())[:160]}): "
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
    texts = ("".join(prompt_and_completion(row, "", None)) for row in demo_rows("train"))
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
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
