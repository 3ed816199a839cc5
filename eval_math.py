"""Score a causal language model or a LoRA adapter on mathematics.

The protocol of Nguyen et al., ICLR 2025, arXiv 2407.19580v4, section 5, and of its official code (BigML-CS-UCLA/CoLM,
math_eval): zero-shot Alpaca prompts, greedy decoding, chain of thought or program of thought, on GSM8K, MATH, NumGLUE,
SVAMP, DeepMind, SimulEq and any .json or .jsonl file of questions and answers.

    python eval_math.py --model out/final --tasks gsm8k svamp --data_dir data
    accelerate launch eval_math.py --model out/final --data_dir data --mode pot --cot_backup --execute_programs

Without --data_dir the sets are fetched. The rows are the paper's; the sources are

    gsm8k     hub dataset openai/gsm8k, config main, split test: question; answer, whose last line is "#### 18"
    math      hub dataset EleutherAI/hendrycks_math, its seven configs, split test: problem; solution with \\boxed{...}
    svamp     hub dataset ChilleD/SVAMP, splits train and test: Body; Question; Answer
    numglue, deepmind, simuleq    the files of the official repository, at a fixed commit: question; answer

and --data_dir holds gsm8k.jsonl, math.jsonl and numglue.json, svamp.json, deepmind.json, simuleq.json, each a JSON list
or one JSON object a line. A row of any file has a question (`question` or `problem`) and an answer (`answer`, `correct`
or the last box of `solution`), which is a text, a number, or a list that begins with one, such as the official
MATH.json's ["1/2", 0.5]. So MATH-500 and AQuA (`options`, `correct`) are read as they are.

Implementation details worth knowing:
 1. Rows that are done leave the KV cache and waiting prompts take their place. predictions.jsonl grows row by row, and
    a run that was cut short goes on.
 2. Programs run beside the decoding, caged: they may compute, print and read Python's own files, but not the user's,
    and not write, fork, signal or open a socket.
 3. Each answer gets two verdicts. *paper* is the official scorer's, faults included: on MATH equal strings, equal
    integers after rounding, or other numbers within 4 %; on the other sets equal strings. *strict* asks for the same
    value: numbers, units and options here, other LaTeX by math-verify.
 4. Prompts, stop words, token and time limits, how programs run and when a row is asked again are the official ones.
    Where a program fails that way, it is run as a file of its own, too (a code fence is read, the last line is the
    answer): that counts for *strict* alone. With --chat_template there are no stop words: a model ends its turn.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import math
import operator
import os
import re
import signal
import struct
import sys
import sysconfig
import tempfile
import unicodedata
import urllib.request
import warnings
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import AutoConfig, DynamicCache
from transformers.utils import cached_file

from colm_data import (
    Parser,
    UserError,
    chat_prompt,
    hush_libraries,
    load_tokenizer,
    one_line,
    prompt_and_completion,
    prompt_ids,
    read_rows,
    replacing,
    stop_ids,
)
from train_colm import BASE_PRECISIONS, load_base, noted, quantisation_section, trained_precision

# -------------------------------------------------------------------------------------------------------------- flags

FILES = {
    "gsm8k": "gsm8k.jsonl",
    "math": "math.jsonl",
    "numglue": "numglue.json",
    "svamp": "svamp.json",
    "deepmind": "deepmind.json",
    "simuleq": "simuleq.json",
}
# The hub datasets with the paper's rows, as (id, config, split). MATH has a config for each of its subjects, and others
# split SVAMP's 1,000 questions for training: the paper asks them all.
MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
MATH_SUBJECTS += ("number_theory", "prealgebra", "precalculus")
HUB = {
    "gsm8k": [("openai/gsm8k", "main", "test")],
    "math": [("EleutherAI/hendrycks_math", subject, "test") for subject in MATH_SUBJECTS],
    "svamp": [("ChilleD/SVAMP", "default", "train"), ("ChilleD/SVAMP", "default", "test")],
}
# These three samples are on no hub: they come from where the paper's authors published them.
OFFICIAL = "https://raw.githubusercontent.com/BigML-CS-UCLA/CoLM/395abfd86cacb40e404bf5fd96a0b7d5918ac8a8"
URLS = {
    "numglue": f"{OFFICIAL}/math_eval/dataset/numglue/numglue.json",
    "deepmind": f"{OFFICIAL}/math_eval/dataset/deepmind/deepmind.json",
    "simuleq": f"{OFFICIAL}/math_eval/dataset/simuleq/simuleq.json",
}

FREE_ON_RESUME = ("output_dir", "overwrite", "data_dir", "max_tokens_per_batch")  # the others shape the predictions


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, and the rules that need no data."""
    parser = Parser(
        "eval_math.py",
        description=__doc__.partition("Implementation details")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="folder or hub id of a causal LM or of a PEFT adapter")
    add("--base_model", help="the adapter's base, where it has moved")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--tasks", nargs="+", default=list(FILES), help=f"of {', '.join(FILES)}, or .json/.jsonl files")
    add("--data_dir", help=f"folder of {', '.join(FILES.values())}; without it they are fetched, see above")
    add("--max_rows", type=int, help="score the first rows of each task only")
    add("--output_dir", default="colm_output/eval_math")
    add("--overwrite", action=flag, default=False, help="delete the run that --output_dir holds")
    add("--mode", choices=["cot", "pot"], default="cot", help="chain of thought, or program of thought")
    add("--chat_template", action=flag, help="ask through the tokenizer's chat template; default: as it was trained")
    add("--execute_programs", action=flag, default=False, help="allow programs that the model wrote to run")
    add("--cot_backup", action=flag, default=False, help="ask again without a program where it gives no answer")
    # The official defaults: run_open.py stops a program after 5 s, and vLLM an answer after 1,024 tokens.
    add("--program_seconds", type=float, default=5.0, help="wall time and CPU time of one program")
    add("--max_new_tokens", type=int, default=1024)
    add("--max_tokens_per_batch", type=int, default=65536, help="prompt and new tokens in the KV cache, with padding")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
    add("--base_precision", choices=BASE_PRECISIONS, help="nf4: base weights in 4 bits; default: as trained")
    args = parser.parse_args(argv)
    for name in ("max_rows", "program_seconds", "max_new_tokens", "max_tokens_per_batch"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} is out of range: give a positive number")
    if args.mode == "pot" and not args.execute_programs:
        raise UserError("--mode pot runs programs that the model wrote: allow it with --execute_programs")
    if args.cot_backup and args.mode == "cot":
        raise UserError("--cot_backup has no effect with --mode cot: use --mode pot")
    return args


# -------------------------------------------------------------------------------------------------------------- tasks


class Row(NamedTuple):
    """A question of a task, and its number in the file, from 0."""

    task: str
    number: int
    question: str
    gold: str
    kind: str = "numbers"  # how the official scorer reads an answer: math, numglue, options or numbers
    value: float | None = None  # the gold answer as a number, where the file gives it beside the text (MATH.json)


def text_field(row: dict, place: str, names: tuple[str, ...]) -> str:
    """The first of these fields that a row has, as text."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise UserError(f"{place}: field {name!r} is {json.dumps(value)[:80]}: it must be a text or a number")
        return str(value)
    raise UserError(f"{place} has no field {' or '.join(map(repr, names))}: give a question and an answer")


def question_of(task: str, row: dict, place: str) -> str:
    """The question as the official code asks it: some sets keep their trailing blanks, which a model sees."""
    if "Body" in row:  # SVAMP; where the body has no full stop, none is added
        return text_field(row, place, ("Body",)).strip() + " " + text_field(row, place, ("Question",)).strip()
    question = text_field(row, place, ("question", "problem"))
    if isinstance(row.get("options"), list):  # AQuA: "A)21" -> " (A) 21"
        options = "(" + "(".join(map(str, row["options"]))
        return question.strip() + "\nAnswer Choices:" + options.replace("(", " (").replace(")", ") ")
    if task == "gsm8k":
        question = question.strip()
    return question


def gold_of(task: str, row: dict, place: str) -> tuple[str, float | None]:
    """The gold answer as text, and as a number where the file gives both."""
    answer = row.get("answer")
    if isinstance(answer, list) and answer:  # the official MATH.json: ["1/2", 0.5], or [text, null]
        text = text_field({"answer": answer[0]}, place, ("answer",)).strip()
        number = answer[1] if len(answer) > 1 else None
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            number = None
        return text, number
    if answer is None and "boxed" in str(row.get("solution")):  # MATH as its authors published it
        return boxed(row["solution"]).strip(), None
    gold = text_field(row, place, ("answer", "Answer", "correct")).split("####")[-1].strip()  # GSM8K's reasoning ends
    if "Body" in row:  # SVAMP's numbers are floats
        gold = gold.removesuffix(".0")
    return gold, None


def kind_of(task: str, row: dict, gold: str) -> str:
    """How the official scorer reads an answer to this row; by the fields where the file is not one of its sets."""
    if task == "math" or "problem" in row or isinstance(row.get("answer"), list):
        return "math"
    if task == "numglue":
        return "numglue"
    if gold in ("A", "B", "C", "D", "E"):
        return "options"
    return "numbers"


def fetch(name: str, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The rows of a set, and where each stands, from the hub or the official repository."""
    if name in URLS:
        try:
            with urllib.request.urlopen(URLS[name], timeout=60) as answer:
                rows = json.load(answer)
        except (OSError, ValueError) as error:
            raise UserError(f"{URLS[name]}: {error}: save it as {FILES[name]} and give --data_dir") from None
        return rows, places_of(URLS[name], rows)
    try:
        from datasets import load_dataset
    except ImportError:
        remedy = f"pip install datasets, or give --data_dir with {FILES[name]}"
        raise UserError(f"--tasks {name} without --data_dir needs a package: {remedy}") from None
    rows, places = [], []
    for path, config, split in HUB[name]:
        try:
            part = list(load_dataset(path, config, split=split))
        except Exception as error:  # the hub's errors have no common class
            remedy = f"reach the hub, or give --data_dir with {FILES[name]}"
            raise UserError(f"{path}: {one_line(error)}: {remedy}") from None
        rows += part
        places += places_of(f"{path}:{config}:{split}", part)
    return rows, places


def places_of(source: str, rows: list) -> list[str]:
    """Where each row stands, for error messages."""
    return [f"{source} row {i + 1}" for i in range(len(rows))]


def read_task(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a set or of a file."""
    task = re.sub(r"\.jsonl?(\.gz)?$", "", Path(name).name)
    if name not in FILES and task == Path(name).name:
        raise UserError(f"--tasks {name} is unknown: choose of {', '.join(FILES)}, or give a .json or .jsonl file")
    if name not in FILES:
        found, places = read_rows(name)
    elif args.data_dir is not None:
        found, places = read_rows(str(Path(args.data_dir, FILES[name])))
    else:
        found, places = fetch(name, args)
    rows = []
    for number, (row, place) in enumerate(zip(found, places, strict=True)):
        if number == args.max_rows:
            break
        if not isinstance(row, dict):
            raise UserError(f"{place} is a {type(row).__name__}: every row must be a JSON object")
        question = question_of(task, row, place)
        gold, value = gold_of(task, row, place)
        rows.append(Row(task, number, question, gold, kind_of(task, row, gold), value))
    return rows


# --------------------------------------------------------------------------------------------------------- generation

# Where the official run (vLLM) ends an answer: a model that does not stop goes on with a new task in these words.
STOP_WORDS = re.compile("Question|USER|ASSISTANT|Instruction|Response")


@dataclass
class Request:
    """A prompt and the tokens written so far."""

    row: Row
    prompt: list[int]
    program: bool = False  # asked for a program
    known: dict = field(default_factory=dict)  # of its record: asked again, it keeps what the program gave
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class Batch:
    """Requests that are being decoded, and their KV cache [B, heads, L, d], padded on the left.

    `max_tokens` bounds the cache, `max_new` an answer; a request is done at a token of `stop`, or when `ended` says so
    of its tokens.
    """

    def __init__(self, model, max_tokens: int, max_new: int, stop: set[int], ended=None):
        self.model, self.max_tokens, self.max_new, self.stop, self.ended = model, max_tokens, max_new, stop, ended
        self.requests: list[Request] = []
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        self.options = {"use_cache": True}
        if "logits_to_keep" in takes:
            self.options["logits_to_keep"] = 1

    @torch.inference_mode()
    def step(self, queue: deque[Request]) -> list[Request]:
        """Decode one token of each request, and let waiting ones in; returns the requests that are done now."""
        done = []
        if sum(r.done for r in self.requests) * 8 >= len(self.requests):  # moving the cache costs about a step
            self.compact()
            done = self.admit(queue)
        if self.requests:
            done = done + self.forward(self.requests, self.cache)
        return done

    def forward(self, requests: list[Request], cache: DynamicCache) -> list[Request]:
        """Write one more token of each request; returns those that are done now."""
        new = [r.tokens[-1:] or r.prompt for r in requests]
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in new])  # [B, P], or [B, 1] once prompts are read
        total = cache.get_seq_length() + width
        lengths = torch.tensor([len(r.prompt) + len(r.tokens) for r in requests])
        mask = (torch.arange(total) >= total - lengths[:, None]).long()  # [B, L]; of no meaning where a row is done
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            **{self.cache_name: cache},
            **self.options,
        ).logits  # [B, 1 or P, V]
        best = logits[:, -1].argmax(-1)  # [B]
        done = []
        for request, token in zip(requests, best.tolist(), strict=True):
            if request.done:  # it waits for the next compaction; what it writes is of no use
                continue
            request.tokens.append(token)
            over = token in self.stop or len(request.tokens) >= self.max_new
            # Decoding to text takes 17 us a request: at every 16th token that is below 2 % of a large batch's step.
            if not over and self.ended and len(request.tokens) % 16 == 0:
                over = self.ended(request.tokens)
            if over:
                request.done = True
                done.append(request)
        return done

    def admit(self, queue: deque[Request]) -> list[Request]:
        """Take waiting requests while the cache has room, padding counted; returns those that are done at once."""
        longest = max((len(r.prompt) for r in (*self.requests, *queue)), default=0)
        rows = max(1, self.max_tokens // (longest + self.max_new)) - len(self.requests)
        taken = [queue.popleft() for _ in range(min(rows, len(queue)))]
        if not taken:
            return []
        cache = DynamicCache()  # without a config, so of full length: sliding windows are the mask's business
        done = self.forward(taken, cache)
        if self.requests:
            width = max(self.cache.get_seq_length(), cache.get_seq_length())
            for old, new in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = [getattr(old, name), getattr(new, name)]
                    both = [pad(x, (0, 0, width - x.shape[2], 0)) for x in both]  # [b, heads, width, d] each
                    setattr(new, name, torch.cat(both))  # [B, heads, width, d]
                    setattr(old, name, None)  # or two caches would lie in memory
        self.requests, self.cache = self.requests + taken, cache
        return done

    def compact(self) -> None:
        """Drop the rows that are done, and the columns that are padding in all the others."""
        keep = [i for i, r in enumerate(self.requests) if not r.done]
        self.requests = [self.requests[i] for i in keep]
        if self.requests:
            self.cache.batch_select_indices(torch.tensor(keep, device=self.model.device))
            used = max(len(r.prompt) + len(r.tokens) - 1 for r in self.requests)  # the last token is yet to be read
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, -used:], layer.values[:, :, -used:]


def generate(rows: list[Row], model, tokenizer, room: int, args: argparse.Namespace, path: Path, show: bool) -> None:
    """Append a record of every row to a file: decoding in this thread, programs in others.

    `room` is the number of tokens that a prompt may have; a longer one loses its beginning.
    """
    stop, own = stop_ids(tokenizer), model.generation_config.eos_token_id
    if own is not None:
        stop.update(own if isinstance(own, list) else [own])
    chat = getattr(args, "chat_template", False)

    def ended(tokens: list[int]) -> bool:
        """Whether a stop word is in the newest text: the 16 unseen tokens, and 16 that may hold a word's beginning."""
        return STOP_WORDS.search(tokenizer.decode(tokens[-32:], skip_special_tokens=True)) is not None

    # A chat model ends its turn itself, and may well write of a "Question".
    batch = Batch(model, args.max_tokens_per_batch, args.max_new_tokens, stop, None if chat else ended)
    queue, running = deque(), set()

    def ask(row: Row, **options) -> None:
        text = row.question
        if options.get("program"):
            text += " Let's write a program."  # the official words, which MathInstruct's programs were asked with
        if chat:
            prompt = chat_prompt(tokenizer, [{"role": "user", "content": text}])
        else:
            alpaca, _ = prompt_and_completion({"instruction": text, "output": ""}, row.task, tokenizer)
            prompt = prompt_ids(tokenizer, alpaca)
        queue.append(Request(row, prompt[-room:], **options))

    for row in rows:
        if args.mode == "pot":
            ask(row, program=True)
        else:
            ask(row)
    bar = tqdm(total=len(rows), desc="rows", disable=not show)
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(4) as pool, bar:
        while queue or batch.requests or running:
            for request in batch.step(queue):
                text = tokenizer.decode(request.tokens, skip_special_tokens=True)
                cut = None if chat else STOP_WORDS.search(text)
                if cut:
                    text = text[: cut.start()]
                record = {"task": request.row.task, "row": request.row.number, "output": text}
                record["ended"] = request.tokens[-1] in stop or cut is not None
                record |= request.known
                running.add(pool.submit(with_program, request, record, args))
            # While rows are being decoded, take what is finished; afterwards wait for the programs.
            busy = bool(queue or batch.requests)
            over, running = wait(running, 0 if busy else None, FIRST_COMPLETED)
            for future in over:
                request, record = future.result()
                if request.program and args.cot_backup and paper_reading(request.row, record) == "":
                    # The official rule: ask again, without a program, where the scorer finds no answer at all.
                    known = {"program_text": record.pop("output")}
                    for name in ("program", "error", "own_program", "own_printed"):
                        if name in record:
                            known[name] = record[name]
                    ask(request.row, known=known)
                else:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    bar.update()


# ----------------------------------------------------------------------------------------------------------- programs


def official_program(text: str) -> str:
    """The program that the official code makes of a response, as Python source of ours.

    It is the body of a function, compiled with some imports before it, which the function does not see: they land in
    the locals of exec. What it does see are the names of the official module; it is not "__main__". Left by exit() it
    gives nothing, though it has printed.
    """
    body = text.split("### Instruction")[0].replace("```python", "").split("```")[0]
    lines = ["def run_it():", *("  " + line for line in body.split("\n")), "run_it()"]
    return (
        "import json, math, re, threading\nfrom functools import lru_cache\nfrom io import StringIO\n"
        '__name__ = "utils"\n'
        f"try:\n    exec({chr(10).join(lines)!r}, globals(), {{}})\n"
        'except SystemExit:\n    raise RuntimeError("the program left by exit()") from None\n'
    )


def own_program(text: str) -> str:
    """The program of a response for *strict*: what its code fence holds, else all of it; empty where it has none."""
    text = text.split("### Instruction")[0]
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    program = fenced[1] if fenced else text
    return program.strip("\n") if "print(" in program else ""


def with_program(request: Request, record: dict, args: argparse.Namespace) -> tuple[Request, dict]:
    """Run the program of a response: any response that prints is one to the official code, in either mode.

    Where the official way to run it fails, the program is run as a file of its own, for *strict* alone.
    """
    text = record["output"]
    if "print(" not in text:
        if request.program:
            record |= {"program": "none", "error": ""}
        return request, record
    name = "backup_program" if "program" in record else "program"  # the answer without a program may be one, too
    if not args.execute_programs:
        record[name] = "not run"
        return request, record
    ran = run_program(official_program(text), seconds=args.program_seconds)
    record |= {name: ran.status, "error": ran.error, "printed": ran.output if ran.status == "ok" else ""}
    mine = own_program(text)
    if mine and (ran.status == "error" or (ran.status == "ok" and not ran.output)):
        ran = run_program(mine, seconds=args.program_seconds)
        record["own_program"] = ran.status
        if ran.status == "ok" and ran.output:
            record["own_printed"] = ran.output
    return request, record


def paper_reading(row: Row, record: dict) -> str:
    """What the official scorer takes for the answer of a record."""
    text = record["output"]
    if "printed" in record:
        text = "The answer is " + record["printed"]
    return paper_answer(row.kind, text)


# ------------------------------------------------------------------------------------------------- programs in a cage

# What a computing interpreter asks of an x86_64 kernel: no fork, exec, socket, signal, trace or change of files.
SYSCALLS = """read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 pread64 17 readv 19 writev 20 access 21 select 23 sched_yield 24
mremap 25 madvise 28 nanosleep 35 setitimer 38 getpid 39 exit 60 uname 63 getcwd 79 readlink 89 gettimeofday 96
getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 sigaltstack 131 gettid 186
time 201 futex 202 sched_getaffinity 204 getdents64 217 restart_syscall 219 clock_gettime 228 clock_getres 229
clock_nanosleep 230 exit_group 231 newfstatat 262 readlinkat 267 faccessat 269 pselect6 270 ppoll 271
set_robust_list 273 getrandom 318 membarrier 324 statx 332 rseq 334 faccessat2 439"""
LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self; in the kernel since 5.13


def filter_code() -> bytes:
    """A seccomp program in BPF: SYSCALLS and open to read are allowed, the rest gets EPERM."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill, writing = 0x7FFF0000, 0x00050001, 0x80000000, 0o1103  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
    code = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, kill), (load, 0, 0, 0)]  # x86_64
    for number in SYSCALLS.split()[1::2]:
        code += [(equal, 0, 1, int(number)), (give, 0, 0, allow)]
    for number, place in ((2, 1), (257, 2)):  # open and openat, and which argument holds their flags
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (any_bit, 0, 1, writing)]
        code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code.append((give, 0, 0, refuse))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def package_folders() -> list[str]:
    """The folders of sys.path that a program may import from, those of PYTHONPATH and of the user among them.

    The child's -I hides the last two. A folder that holds the working folder, the home folder, temporary files or this
    project is left out: it may hold the gold answers.
    """
    private = [Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(__file__).parent]
    folders = []
    for entry in sys.path:
        path = Path(entry).resolve()
        holds_private = any(p.resolve().is_relative_to(path) for p in private)
        if entry and path.exists() and not holds_private:
            folders.append(str(path))
    return folders


def readable_places(folder: str) -> list[str]:
    """What a program may read: Python, its packages, shared libraries, time zones, random bytes, and its own folder."""
    python = []
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        python.append(sysconfig.get_path(name))
    for prefix in (sys.prefix, sys.base_prefix):
        python += [f"{prefix}/lib", f"{prefix}/lib64"]
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime"]
    return [*python, *package_folders(), *system, "/dev/urandom", "/dev/null", folder]


def cage():
    """Give up every power, then run a program: the child interpreter is given this function's source."""
    import ctypes, io, json, os, resource, struct, sys  # noqa: E401, I001

    given = json.load(sys.stdin)
    sys.path += given["packages"]
    for name, limit in given["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + 1))  # first SIGXCPU, then SIGKILL
    libc, code = ctypes.CDLL(None), bytes.fromhex(given["filter"])
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with the evaluator
    if os.getppid() != given["parent"]:  # it was killed before that call
        os._exit(1)
    libc.unshare(0x10000000)  # a user namespace of its own and no capabilities: no other process's memory can be read
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which both filters below ask for
        sys.exit("OSError: the kernel does not filter system calls")

    # Landlock: what is named here can be read, and nothing else opened. An old kernel has no such call: it goes on.
    create, add, restrict = given["landlock"]
    rules = libc.syscall(create, struct.pack("Q", 0x1FFF), ctypes.c_size_t(8), 0)  # handle all rights of version 1
    if rules >= 0:
        for place in given["readable"]:
            try:
                opened = os.open(place, os.O_PATH)
            except OSError:  # not every system has every one of these folders
                continue
            rights = 4 | 8 if os.path.isdir(place) else 4  # to read files and to list folders
            libc.syscall(add, rules, 1, struct.pack("=Qi", rights, opened), 0)  # 1: everything beneath that place
            os.close(opened)
        if libc.syscall(restrict, rules, 0):
            sys.exit("OSError: the kernel has Landlock, but refuses the rules")
        os.close(rules)

    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP
        sys.exit("OSError: the kernel does not filter system calls")
    sys.stdin, sys.argv = io.StringIO(given["data"]), ["program"]
    try:
        exec(compile(given["source"], "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # exit() is an end like any other
            return
        # The evaluator judges by the exception's class, not by words that a program can print, too.
        kinds = [kind.__name__ for kind in type(error).__mro__]
        told = {"kinds": kinds, "errno": getattr(error, "errno", None), "error": str(error)[:200]}
        os.write(2, f"\n{json.dumps(told)}".encode())
        os._exit(1)


class Result(NamedTuple):
    """How a program ended, what it printed, and the last line of its complaints."""

    status: str  # ok, timeout, memory, output, refused, error, killed or failed (it was not started)
    output: str
    error: str


def run_program(source: str, data: str = "", seconds: float = 5.0, megabytes: int = 1024) -> Result:
    """Run Python source in the cage. Its output goes to files, so that the kernel's file size limit bounds it."""
    size = 64 * 1024
    limits = {"CPU": math.ceil(seconds), "AS": megabytes << 20, "FSIZE": size, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    given = {"source": source, "data": data, "limits": limits, "filter": filter_code().hex(), "landlock": LANDLOCK}
    given |= {"packages": package_folders(), "parent": os.getpid()}
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", inspect.getsource(cage) + "\ncage()"]
    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given["readable"] = readable_places(folder)
            child = Popen(command, stdin=PIPE, stdout=out, stderr=err, cwd=folder, env=threads, start_new_session=True)
            with suppress(TimeoutExpired):
                child.communicate(json.dumps(given).encode(), timeout=seconds)
            code = child.returncode  # None while it runs
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            output = os.pread(out.fileno(), size, 0).decode("utf-8", "replace")
            complaint = os.pread(err.fileno(), size, 0).decode("utf-8", "replace")
    except OSError as error:  # no memory, process or file descriptor is left: this row's fate, not the run's
        return Result("failed", "", f"{type(error).__name__}: {error}"[:200])
    last = complaint.strip().rpartition("\n")[2]
    told = {"kinds": [last.partition(":")[0].rpartition(".")[2]], "errno": None, "error": last.partition(": ")[2]}
    with suppress(ValueError):  # without the cage's own line, as when memory was out for it, the interpreter's
        line = json.loads(last)
        if isinstance(line, dict) and line.keys() == told.keys():
            told = line
    full = max(len(output), len(complaint)) > size - 400 or told["errno"] == 27  # EFBIG
    error = ""
    if code != 0:
        error = " ".join(f"{told['kinds'][0]}: {told['error']}".split())[:200]
    return Result(status_of(code, told["kinds"], told["errno"], full), output.strip("\n"), error)


def status_of(code: int | None, kinds: list[str], errno: int | None, full: bool) -> str:
    """A word for an exit code and the exception that led to it; `full`: output met its limit."""
    if code is None or code == -signal.SIGXCPU:
        return "timeout"
    if full:
        return "output"
    if code == 0:
        return "ok"
    if code < 0:
        return "killed"
    if "MemoryError" in kinds or errno == 12:  # ENOMEM
        return "memory"
    if "PermissionError" in kinds:
        return "refused"
    return "error"


PROBE = """
for path in {paths!r}:
    try:
        open(path).read(1)
        print(path)
    except PermissionError:
        pass
"""


def check_programs() -> None:
    """Refuse where no program can run; warn of what programs can read here that they should not."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("a secret")
        file.flush()
        environment = f"/proc/{os.getpid()}/environ"
        result = run_program(PROBE.format(paths=[file.name, environment]), seconds=30)
        if result.status != "ok":
            reason = result.error or result.status
            raise UserError(f"--execute_programs needs Linux on x86_64 ({reason}): use --mode cot")
        if file.name in result.output:
            print("warning: without Landlock (Linux 5.13) programs can read files, gold answers, too", file=sys.stderr)
        if environment in result.output:
            print("warning: this system lets programs read the evaluator's environment", file=sys.stderr)


# ------------------------------------------------------------------------------------------------- the paper's verdict

# This section says what math_eval/run_open.py and utils.py of the official code say, step by step, faults included.


def without_extra_zeros(text: str) -> str:
    """A number without superfluous zeros, 3.50 as 3.5 and 3.0 as 3; another text as it is."""
    try:
        digits = str(float(text)).rstrip("0")  # of 1e+20, too: it becomes 100.0, as there
    except ValueError:
        return text
    return str(int(digits[:-1])) if digits.endswith(".") else str(float(digits))


def boxed(text: str) -> str:
    """What the last \\boxed{...} holds; empty where there is none."""
    if "boxed" not in text:
        return ""
    rest = text.rpartition("boxed")[2]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for i, letter in enumerate(rest):
        if letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0:
                return rest[1:i]
    return rest[1:]


def paper_math_string(text: str) -> str:
    """The string that MATH answers are compared by: units, spaces and spellings of fractions and roots removed."""
    for dress in ("\n", "\\!"):
        text = text.replace(dress, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dress in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(dress, "")
    text = text.split("\\text{ ")[0].replace("\\%", "")  # a unit, where it begins with a blank
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "x = 5"
        text = sides[1]
    first, *rest = text.split("\\sqrt")
    for part in rest:  # \\sqrt3 with braces
        first += "\\sqrt" + (part if part[:1] in ("", "{") else "{" + part[0] + "}" + part[1:])
    text = paper_fractions(first.replace(" ", ""))
    if re.fullmatch(r"(-?[1-9]\d*|0)/(-?[1-9]\d*|0)", text, re.A):  # as int() would write both
        text = r"\frac{{{}}}{{{}}}".format(*text.split("/"))
    return text


def paper_fractions(text: str) -> str:
    """\\frac12 and \\frac1{23} with braces; all is left as it is where one has a single letter after it."""
    first, *rest = text.split("\\frac")
    done = first
    for part in rest:
        done += "\\frac"
        if not part or part[0] == "{":
            done += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            done += "{" + part[0] + "}" + part[1:]
        else:
            done += "{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return done


# The official scorer calls Python's eval on what a model wrote. Here a syntax tree is walked instead: literals,
# arithmetic, comparisons, tuples and lists, and the names of the math module, which eval sees there.
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitXor: operator.xor,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
MATH_NAMES = ("pi", "e", "sqrt", "exp", "log", "sin", "cos", "tan", "ceil", "floor")
LARGEST = 1 << 4096  # an integer beyond a float's range is no number to the scorer; this leaves room for quotients


def calculated(node: ast.AST):
    """The value of an expression; ValueError where it is not arithmetic, or its numbers grow beyond LARGEST."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return list(map(calculated, parts))
        case ast.UnaryOp(op=op, operand=operand):
            values = [calculated(operand)]
        case ast.BinOp(left=left, op=op, right=right):
            values = [calculated(left), calculated(right)]
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            values = [calculated(left), calculated(right)]
        case ast.BoolOp(op=op, values=parts):  # "1 or 2" without its blanks is Python, and 1
            for part in parts:
                value = calculated(part)
                if bool(value) == isinstance(op, ast.Or):
                    break
            return value
        case ast.Attribute(value=ast.Name(id="math"), attr=name) if name in MATH_NAMES:
            return getattr(math, name)
        case ast.Call(func=ast.Attribute() as function, args=[argument], keywords=[]):
            called, value = calculated(function), calculated(argument)
            return called(value)
        case _:
            raise ValueError("not arithmetic")
    for value in values:
        if not isinstance(value, (int, float, complex)):
            raise ValueError("not a number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("too large")
    if isinstance(op, ast.Pow):
        base, power = values
        whole = isinstance(base, int) and isinstance(power, int)  # floats and complex numbers do not grow
        if whole and (abs(power) > 4096 or base.bit_length() * abs(power) > 4096):
            raise ValueError("too large")
    return ARITHMETIC[type(op)](*values)


def evaluated(text: str):
    """What Python's eval gives for an answer, as far as it is arithmetic; None for all else."""
    if len(text.partition("#")[0]) > 300:  # no number is that long, and a deep tree could exhaust the stack
        return None
    try:
        with warnings.catch_warnings():  # "1or2" is valid, and deprecated
            warnings.simplefilter("ignore")
            return calculated(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


def to_number(value) -> int | float | None:
    """float(), and an int where the number is whole."""
    try:
        value = float(value)
        return round(value) if value.is_integer() else value
    except (TypeError, ValueError, OverflowError):
        return None


def paper_number(text: str) -> int | float | None:
    """The number that the official scorer reads in a MATH answer."""
    if "frac" in text:
        text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
        value = evaluated(text)
        if value is not None:
            text = str(value)
    else:
        text = text.replace(",", "")  # and so (2,3) is 23
    number = to_number(text)
    if number is None:
        value = evaluated(text)
        if isinstance(value, list):
            value = value[0] if value else None
        number = to_number(value)
    return number


def paper_math_answer(text: str) -> str:
    """The answer that the official scorer reads out of a response to a MATH question."""
    if "The answer is " in text:
        answer = text.split("The answer is ")[-1].strip()
    elif "the answer is " in text:
        answer = text.split("the answer is ")[-1].strip()
    elif "boxed" in text:
        answer = paper_math_string(boxed(text))
    else:
        found = re.findall(r"-?\d*\.?\d+", text) or [""]
        answer = found[-1]
    answer = paper_math_string(answer.removesuffix(".").removesuffix("/"))
    return paper_math_string(boxed(answer)) if "boxed" in answer else answer


def paper_answer(kind: str, text: str) -> str:
    """The answer that the official scorer reads out of a response; empty where it finds none."""
    if kind == "math":
        return paper_math_answer(text)
    if text.count("####") > 1 or text.count("The answer is") > 1:
        text = text.split("\n\n")[0]
    parts = re.split("####|The answer is", text)
    answer = parts[-1]
    if "=" in answer:
        answer = answer.split("=")[-1].strip()
    found = []
    if kind in ("options", "numglue"):
        found = re.findall(r"\b([A-E])\b", answer.upper())  # the article "a" is read as option A
    if kind == "options" and not found:
        found = [answer.strip().strip(".")]
    if kind != "options" and not found:
        for number in re.findall(r"-?\d+/?\.?\d*", answer.replace(",", "")):
            found.append(without_extra_zeros(number))
    if not found:
        return ""
    # After the trigger words the first counts, without them the last.
    answer = found[0] if len(parts) > 1 else found[-1]
    return answer.removesuffix(".").removesuffix("/")


def paper_correct(row: Row, text: str) -> bool:
    """The official verdict on a response."""
    answer = paper_answer(row.kind, text)
    if row.kind == "numbers" and row.task not in ("deepmind", "simuleq"):  # those two golds are taken as they are
        return answer == without_extra_zeros(row.gold.replace(",", ""))
    if row.kind != "math":
        return answer == row.gold
    gold = paper_math_string(row.gold)
    target = paper_number(gold) if row.value is None else row.value
    number = paper_number(answer)
    if answer == gold:
        return True
    if number is None or target is None or math.isnan(number):
        return False
    if isinstance(target, int):
        return math.isfinite(number) and round(number) == target
    return target - abs(target) * 0.04 <= number <= target + abs(target) * 0.04


# -------------------------------------------------------------------------------------------------- the strict verdict

# Ways to write the same: signs of Unicode as LaTeX, for both rules below.
SIGNS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup "}
SIGNS |= {"≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "≈": r"\approx ", "′": "'", "’": "'"}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inche|
ft foot feet|yd yard|mi mile|l liter litre|ml milliliter|mg milligram|g gram|kg kilogram|lb pound|oz ounce|
s sec second|min minute|h hr hour|day|week|month|year|cent|dollar|deg degree"""
UNIT_OF = {}  # each spelling, without a plural's s -> one name
for line in UNITS.replace("\n", "").split("|"):
    for spelling in line.split():
        UNIT_OF[spelling] = line.split()[0]
RATES = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour"}
# Beside a number these make another value of it, so that "half of 6" and "3 dozen" are no numbers to the rule below. Of
# the words before it "more than" and "twice" do, after it "3 more apples" and "3 times" are 3. Of the words after it
# spelled numbers count while they are near: "3 and a half", but not "3 apples in each of the two boxes" ...
SPELLED = r"""(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|
two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|
(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:hundred|thousand|million|billion|trillion)(?:ths?|s)?)"""
SPELLED = SPELLED.replace("\n", "")
OPERATION = (
    "pi|sqrt|root|log|ln|sin|cos|tan|exp|power|squared|cubed|factorial|dozens?|doubled|tripled|plus|minus|not|or"
)
CHANGING_BEFORE = (
    "no|less|more|fewer|least|most|than|over|under|between|times|double|twice|triple|pairs?|couples?|scores?"
)
CHANGING_BEFORE = re.compile(rf"\b(?:{OPERATION}|{CHANGING_BEFORE}|{SPELLED})\b")
CHANGING_AFTER = re.compile(rf"\b(?:{OPERATION})\b|^(?:\W*[a-z]+){{0,2}}\W*\b{SPELLED}\b")
# ... and these tell apart two answers of one number: 3 km north is not 3 km south.
SIDES = re.compile(r"\b(?:am|pm|a\.m|p\.m|north|south|east|west|left|right|above|below|clockwise|counterclockwise)\b")

THOUSANDS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
POWER = r"(?: ?(?:e|(?:x|\\times|\\cdot|\*) ?10 ?(?:\^|\*\*) ?)[{(]?([-+]?\d{1,3})[)}]?)?"
NUMBER = re.compile(rf"([-+]?) ?([$€£]?)([-+]?)(?:(?:(\d+)[ -])?(\d+) ?/ ?(\d+)|({THOUSANDS}){POWER})( ?%)?", re.I)

# A unit after a formula: words in \\text, but for the last of a list, and units of two letters or more without it.
UNIT_AT_END = "|".join(unit for unit in UNIT_OF if len(unit) > 1)
UNIT_AT_END = rf"(?:square |cubic |sq )?(?:{UNIT_AT_END}|unit)s?"
UNIT_AT_END = r"(?<=[\d})a-z ]) ?(?:\\(?:text|mbox|mathrm) ?\{(?! *(?:and|or)\b)[^{}]*\}|" + UNIT_AT_END
UNIT_AT_END = re.compile(UNIT_AT_END + r")(?:\^\{?[23]\}?)?$")


def undress(text: str) -> str:
    """A text without what only sets it: dollar signs, bold type, \\left, spacing, the full stop; Unicode as LaTeX."""
    text = re.sub(r"(\d)([¼-¾⅐-⅞])", r"\1 \2", text)  # "1½" is 1 1/2, not 11/2
    text = re.sub(r"√ ?(\d+(?:\.\d+)?|[a-z])", r"\\sqrt{\1}", re.sub(r"√ ?\(([^()]*)\)", r"\\sqrt{\1}", text))
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda found: "^{" + found[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree\b|º", "°", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")  # ½ is 1/2 now, thin spaces are spaces
    for sign, latex in SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub(r"(?<!\\)\$\$", "", text)
    text = re.sub(r"(?<!\\)\$([^$]*[^$\\])\$", r"\1", text)  # $...$, but not the sign of a price
    text = re.sub(r"(?<!\\)\\[()\[\]]|(?<!\\)\$(?!\d)", "", text)
    text = re.sub(r"(?:^|(?<=\s))\*\*|\*\*(?=[\s.,:;]|$)|`|\\displaystyle", "", text)  # bold type, but not a power
    text = re.sub(r"\\left|\\right(?!arrow)|\\!", "", text)
    text = text.replace("\\$", "$").replace("{,}", ",")
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ",", text)  # thousands: 12\,345
    text = re.sub(r"(?<!\\)\\[,;: ]|~", " ", text)
    text = re.sub(r"\b(?:negative|minus) (?=[\d$\\(])", "-", text)
    text = re.sub(r"\s+", " ", text).strip().removesuffix("\\").strip()
    if not text.endswith("..."):
        text = text.rstrip(".").strip()
    return text


def formula(text: str) -> str:
    """LaTeX for math-verify: without a unit, and what Python prints in its form: 3*x**2, sqrt(2), Fraction(1, 3)."""
    text = UNIT_AT_END.sub("", text.replace("°", ""))
    if "\\" in text:
        return text.replace("**", "^")
    text = re.sub(r"\b(?:Fraction|Rational)\((-?\d+), ?(\d+)\)", r"\\frac{\1}{\2}", text)
    table = re.fullmatch(r"(?:Matrix|array|matrix|np\.array)?\(?\[(\[[^\[\]]*\](?:,? ?\[[^\[\]]*\])*)\]\)?", text)
    if table:  # [[1, 2], [3, 4]]
        lines = re.findall(r"\[([^\[\]]*)\]", table[1])
        cells = [" & ".join(re.split(r"[,\s]+", line.strip())) for line in lines]  # NumPy prints them without commas
        return r"\begin{pmatrix} " + r" \\ ".join(cells) + r" \end{pmatrix}"
    text = re.sub(r"(\d)\*?[Ii]\b|(?<!\w)I\b", r"\1i", text)  # 2*I of SymPy
    text = re.sub(r"(?<![a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![a-zA-Z])pi\b", r"\\pi ", re.sub(r"(?<![a-zA-Z])oo\b", r"\\infty", text))
    text = re.sub(r"\^(?:\(([^()]*)\)|(-?\d+(?:\.\d+)?))", r"^{\1\2}", text.replace("**", "^"))
    return text.replace("*", r" \cdot ")


def key(text: str) -> str:
    """Texts of equal keys are equal."""
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[td]frac", r"\\frac", text).replace("°", "")
    text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).casefold().strip(".:"))
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


class Number(NamedTuple):
    """What the number rule reads: the value, whether in per cent, decimals written, unit and side if any."""

    value: Fraction
    percent: bool
    decimals: int  # 0 where none are written, or a power of ten is
    rounded: bool  # written with decimals or a power of ten, as a float is printed
    unit: str | None
    side: str | None


def numbers_in(text: str) -> list[re.Match]:
    """All numbers of a text; the pattern also matches where there is no digit."""
    return [found for found in NUMBER.finditer(text) if re.search(r"\d", found[0])]


def number_of(text: str) -> Number | None:
    """The only number of a text: bare, or among words that don't change it; None for all else."""
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[td]?frac\s*(\d|\{\s*-?\d+\s*\})\s*(\d|\{\s*\d+\s*\})", r" \1/\2", text)
    text = re.sub(r"\{\s*(-?\d+)\s*\}/", r"\1/", re.sub(r"/\{\s*(\d+)\s*\}", r"/\1", text))
    text = text.replace("°", " degrees ")
    text = re.sub(r"\\?%| per ?cent\b", "%", re.sub(r"\\approx|~|≈", " about ", text))
    text = re.sub(r"(?<=[a-z])(?:\^\{?[23]\}?)", "", text)  # cm^2: the unit, not its power, is compared
    text = re.sub(r"\s*\([a-z ,.'-]*\)$", "", text.strip(), flags=re.I)  # 5 (five)
    spelled = re.fullmatch(rf"(?:(?:{SPELLED}|zero|one|an?|and|-| )+)\((.*)\)", text, re.I)
    text = spelled[1] if spelled else text  # six (6)
    found = numbers_in(text)
    if len(found) != 1:
        return None
    sign, dollar, inner, whole, top, bottom, digits, power, percent = found[0].groups()
    shown = found[0][0].lstrip()
    before, after = text[: found[0].end() - len(shown)].lower(), text[found[0].end() :].lower()

    # A sign after a letter or a bracket is an operation, n+18 or 8-i, unless it begins a word of its own: "is -5".
    operation = re.match(r"\s*[-+*/^_=<>({\[]", after) or re.search(r"[-+*/^_=<>(){}\[\]\\]\s*$", before)
    joined = re.search(r"[a-z0-9)]$", before) and (sign or inner or not before.endswith(" "))
    spaced = re.search(r"[a-z0-9)]\s+$", before) and re.match(r"[-+] ", shown)
    # A letter alone is a variable, 3x or 3 x, but for "a" before and the units m, g, l, s, h, in after.
    variable = re.match(r"[a-z](?![a-z])", after) or re.search(r"(?<![a-z'])[b-hj-z](?![a-z.])", before)
    variable = variable or re.match(r"\s+[a-fijkn-rt-z](?![a-z.])", after)
    other_signs = re.search(r"[^a-z\s.,:;'\"!?/-]|!!|\d", before + " " + after)
    if operation or joined or spaced or variable or other_signs:
        return None

    scale = after.strip().partition(" ")[0]
    rest = after.replace(scale, "", 1) if scale in SCALES else after
    if CHANGING_BEFORE.search(before) or CHANGING_AFTER.search(rest):
        return None
    try:
        value = Fraction(int(top), int(bottom)) if top else Fraction(digits.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # more than 4,300 digits; 3/0
        return None
    value = (value + int(whole or 0)) * SCALES.get(scale, 1)  # 1 1/2 million
    value *= Fraction(10) ** int(power or 0)
    if "-" in (sign, inner):
        value = -value
    decimals = len(digits.partition(".")[2]) if digits and not power else 0
    side = SIDES.search(rest)
    rounded = bool(decimals or power)
    return Number(value, bool(percent), decimals, rounded, unit_of(rest, dollar), side and side[0].replace(".", ""))


def unit_of(words: str, dollar: str) -> str | None:
    """The unit that follows a number, over a time where it is a rate: "km", "mi/h"; None where there is none known."""
    for rate, spelled in RATES.items():
        words = re.sub(rf"\b{rate}\b", spelled, words)
    units = []
    for part in re.split(r"\bper\b|/|\ban?\b(?= hour| day| week| minute)", words):
        for word in re.findall(r"[a-z]+", part):
            unit = UNIT_OF.get(word) or UNIT_OF.get(word.removesuffix("s"))
            if unit:
                units.append(unit)
                break
        else:
            units.append("dollar" if dollar and not units else "")
    return "/".join(units).strip("/") or None


def same_number(answer: Number, gold: Number) -> bool:
    """The same value, where units and sides don't differ: 50 % may be 50 or 0.5, and 0.333333 is 1/3."""
    if None not in (answer.unit, gold.unit) and answer.unit != gold.unit:
        return False
    if None not in (answer.side, gold.side) and answer.side != gold.side:
        return False
    if answer.percent != gold.percent and (answer.unit or gold.unit):
        return False
    values = [answer.value]
    if answer.percent != gold.percent:
        values.append(answer.value / 100 if answer.percent else answer.value * 100)
    if gold.decimals >= 2:  # a gold answer of two decimals or more was rounded to them
        values += [Fraction(round(value, gold.decimals)) for value in values]
    # What printing a float loses: 0.333333 for 1/3, 3.0000000001 for 3, 1.2e-16 for 0.
    room = min(abs(gold.value) * Fraction(2, 10**6), Fraction(1, 1000)) or Fraction(1, 10**12)
    if not answer.rounded and not gold.rounded:  # whole numbers and fractions lose nothing
        room = 0
    return any(abs(value - gold.value) <= room for value in values)


ANSWER_IS = re.compile(r"####|\banswer\s+is\b\s?:?|\banswer\s?:", re.I)


def strict_answer(text: str) -> str:
    """What a response states: after its last "answer is", or in its last box; else its last formula or number."""
    text = text.split("### Instruction")[0][-8000:].strip()
    statements = list(ANSWER_IS.finditer(text))
    box = text.rfind("\\boxed")
    if statements:
        stated = statement(text[statements[-1].end() :])
        later_box = box > statements[-1].end()
        says = re.search(r"[\d\\]", stated) or box < 0  # "our answer is correct" says nothing beside a box
        if "boxed" in stated:
            return undress(boxed(stated))[:400]
        if says and not later_box:
            return undress(stated)[:400]
    if box >= 0:
        return undress(boxed(text))[:400]
    last = text.rpartition("\n")[2]
    if re.search(r"\([A-F]\)", last):
        return undress(last)[:400]
    formulas = re.findall(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)", last)
    if formulas and re.search(r"[\d\\]", "".join(formulas[-1])):
        return undress("".join(formulas[-1]).rpartition("=")[2])[:400]
    numbers = numbers_in(text)
    if numbers:
        last = numbers[-1][0]
    return undress(last)[:400]


def statement(rest: str) -> str:
    """What follows "answer is": a formula set apart, on the next line or later, or a sentence of this line."""
    rest = re.sub(r"^[\s:*]+(?=\S)", "", rest)
    apart = re.match(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$", rest, re.S)
    if apart:
        return apart[1] or apart[2] or ""
    # A line, but a matrix and a pair of braces may have several.
    line = re.match(r"(?:\\begin.*?\\end|\{[^{}]*\}|[^\n])*", rest, re.S)[0]
    return re.split(r"(?<!approx)\.\s|[,;]? ?\b(?:because|since)\b", line.strip() + " ")[0].strip()


def chosen(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by its text or its letter; "a web" names the web, not option A."""
    words = key(re.sub(r"^(?:an?|the) ", "", answer, flags=re.I))
    for letter, text in options.items():
        if key(text.strip(" ,\n")) == words:
            return letter
    named = set(re.findall(r"\(([A-F])\)", answer)) or set(re.findall(r"\(([a-f])\)", answer))
    if not named:  # "B", "b.", "Option B", "choice B: 5", "B (car)", "B is correct"
        letter = r"(?:(?:the )?(?:correct |right )?(?:option|choice|answer)(?: is)? )?\(?([A-F])\)?"
        found = re.match(letter + r"(?:$|[.:)]| ?\(| is\b| -)", answer, re.I)
        if found and (found[1].isupper() or re.match(r".{0,3}$", answer)):  # a small "a" is an article
            named = {found[1]}
    if len(named) != 1:
        return None
    return named.pop().upper()


def options_of(question: str) -> dict[str, str]:
    """The options that a question lists: "Answer Choices: (A) web (B) tree"."""
    listed = re.split("Answer Choices:|Options:", question)
    if len(listed) == 1:
        return {}
    parts = re.split(r"\(([A-F])\)", listed[-1])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def in_order(answer: str) -> str:
    """The values of "x = 3, y = 4" as a pair; another text as it is."""
    parts = re.split(r",| and ", answer)
    values = []
    for part in parts:
        named = re.fullmatch(r"\s*(?:\\text\{)?[a-z]\w?\s*=\s*([^=]+)", part)
        if not named:
            return answer
        values.append(named[1].strip())
    if len(values) == 1:
        return answer
    return f"({', '.join(values)})"


def strict_verdict(row: Row, text: str) -> bool | tuple[str, str]:
    """Does a response state the gold answer's value? Of expressions, the two that math-verify has to compare."""
    answer = strict_answer(text)
    options = options_of(row.question)
    if row.gold in options:
        return chosen(answer, options) == row.gold
    gold = row.gold
    if row.task == "deepmind":
        gold = re.sub(r"^\[(.*)\]$", r"\1", gold)  # its prime factors are a set
        if re.fullmatch(r"-?\d+(?: -?\d+)+", gold):  # and its polynomials lists of coefficients
            gold = f"({gold.replace(' ', ', ')})"
            if re.fullmatch(r"-?\d+(?: -?\d+)+", answer):
                answer = f"({answer.replace(' ', ', ')})"
    gold = undress(gold)
    if "[" not in gold and gold[:1] != "(":
        answer = re.sub(r"^\[([^\[\]]*)\]$", r"\1", answer)  # a Python list for a set
    if key(answer) == key(gold) or re.search(r"\d_", gold + answer):  # numbers in other bases are texts here
        return key(answer) == key(gold)
    if "=" not in gold:
        answer = in_order(answer)
        # Of a chain of equations the last side counts; 3/7 = 0.4286 states 3/7, though.
        sides = re.split(r"=|\\approx", answer)
        first, last = number_of(sides[0]), number_of(sides[-1])
        target = number_of(gold)
        if len(sides) > 1 and first and last and target and first.value == target.value:
            return round(first.value, last.decimals) == last.value
        answer = sides[-1].strip()
    if re.match(r"(?:\\(?:text|mbox) ?\{)? *[a-zA-Z]{3,}", gold):
        return False  # a text, even and June 20, is equal or not
    numbers = number_of(answer), number_of(gold)
    if None not in numbers:
        return same_number(*numbers)
    # What follows is for a parser of formulas. It would multiply the letters of words, join the digits of "1 8", and
    # take a ratio for a quotient.
    if prose(answer) and not prose(gold):
        return False
    for odd in (r"(?<!frac) \d+ \d+(?! ?/)|^\d+ \d+(?! ?/)", r"\d ?: ?\d"):
        if re.search(odd, answer) and not re.search(odd, gold):
            return False
    if re.search(r"i\b", gold) and "j" not in gold:
        answer = re.sub(r"(?<=\d)j\b", "i", answer)  # Python's 1+2j
    return formula(answer), formula(gold)


def prose(text: str) -> bool:
    """Whether a text has English words, outside of LaTeX's own and of functions' names."""
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}", r" \1 ", text)
    words = re.findall(r"[a-zA-Z]{3,}", re.sub(r"\\[a-zA-Z]+(?:\{[a-z]*(?:matrix|array)\})?", " ", text))
    known = {"sqrt", "and", "sin", "cos", "tan", "log", "exp", "cot", "sec", "csc", "matrix", "fraction", "rational"}
    for word in words:
        word = word.lower()
        if word not in known and word not in UNIT_OF and word.removesuffix("s") not in UNIT_OF:
            return True
    return False


JUDGE_SECONDS = 3  # of CPU time for a pair; one that takes longer is a tower of powers, not an answer
JUDGE = """
import json, logging, signal, sys
from dataclasses import replace
from math_verify import LatexExtractionConfig, parse, verify
logging.disable()
# Without its way with units, which takes the t of 8/3 t for a ton and drops it.
rules = LatexExtractionConfig()
rules = [replace(rules, normalization_config=replace(rules.normalization_config, units=False))]
seconds, *pairs = map(json.loads, sys.stdin)
for pair in pairs:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends this process, and the pair it was at is unequal
    try:
        answer, gold = [parse(f"${x}$", rules, "no_fallback", parsing_timeout=None) for x in pair]
        print(int(verify(gold, answer, timeout_seconds=None)), flush=True)
    except Exception:
        print(0, flush=True)
"""


def strict_scores(cases: list[tuple[Row, str]]) -> list[bool]:
    """Verdicts on (row, response). math-verify is caged: 10^{10^{10}} ends it, another goes on."""
    found = [strict_verdict(row, text) for row, text in cases]
    pairs = []
    for verdict in dict.fromkeys(found):
        if isinstance(verdict, tuple):
            pairs.append(verdict)
    judged: list[bool] = []
    while len(judged) < len(pairs):
        some = pairs[len(judged) : len(judged) + 500]
        lines = "\n".join(map(json.dumps, [JUDGE_SECONDS, *some]))
        ran = run_program(JUDGE, lines, seconds=3000, megabytes=2048)
        lines = ran.output.split()
        judged += [line == "1" for line in lines]
        if len(lines) < len(some):  # the pair that ended the process is unequal
            judged.append(False)
    verdicts = dict(zip(pairs, judged, strict=True))
    return [verdicts.get(verdict, verdict) for verdict in found]


# ------------------------------------------------------------------------------------------------------------ results


def find_file(model: str, name: str) -> str | None:
    """The path of a file of a folder or hub id; None where it has none, or there is no such folder and id."""
    try:
        return cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # loading the model says so better
        return None


def read_adapter(args: argparse.Namespace, base: str, dtype: torch.dtype, device: torch.device):
    """An adapter on its base, unmerged."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base, args, dtype, device), args.model).eval()


@torch.no_grad()
def merged(model):
    """The base with the adapter of a PeftModel merged into its weights, or None where that makes another model of it.

    An adapter on an embedding that is tied to the output's also changes the other one when it is merged. So the logits
    of some tokens, spread over the vocabulary, are compared before and after.
    """
    ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, 16).long()[None]  # [1, 16]
    before = model(input_ids=ids).logits
    model = model.merge_and_unload()
    after = model(input_ids=ids).logits
    # Rounding in float32 stays a hundred times below this part of the largest logit.
    if (after - before).abs().max() > 1e-3 * before.abs().max():
        return None
    return model


def load(args: argparse.Namespace, device: torch.device):
    """The model (an adapter merged into its base where that is exact), the tokenizer, and a prompt's room in tokens."""
    remote = {"trust_remote_code": args.trust_remote_code}
    config = find_file(args.model, "adapter_config.json")  # of an adapter; a whole model has none
    base, remedy = args.model, "give a causal LM's folder or hub id, or an adapter's"
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    try:
        if config is None:
            model = load_base(base, args, dtype, device)
        else:
            base = args.base_model or json.loads(Path(config).read_text())["base_model_name_or_path"]
            remedy = f"its base is {base}, name another with --base_model"
            model = load_adapter(args, base, dtype, device)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub, configs, adapters and remote code each raise their own kinds
        raise UserError(f"--model {args.model}: {one_line(error)}: {remedy}") from None
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not window or window < 0:  # without positions of its own, or -1: no limit
        window = 2**31
    room = window - args.max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in {window}: lower it")
    if config is not None and find_file(args.model, "tokenizer_config.json") is None:
        tokenizer = load_tokenizer(argparse.Namespace(model=base, **remote))
    else:
        tokenizer = load_tokenizer(argparse.Namespace(model=args.model, **remote))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a new plan for each shape, and every token makes a new one
    if getattr(model, "is_quantized", False):
        model = model.to(device)  # its layers have precisions of their own
    else:
        model = model.to(device, dtype)
    return model.eval(), tokenizer, room


def load_adapter(args: argparse.Namespace, base: str, dtype: torch.dtype, device: torch.device):
    """An adapter merged into its base where that is exact, or else beside it."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    if args.base_precision == "nf4" or quantisation_section(config) is not None:
        # The layers of the base, which hold the adapter's: what PeftModel.forward would call.
        return read_adapter(args, base, dtype, device).get_base_model()
    # In half precision, small adapters would be rounded away.
    model = merged(read_adapter(args, base, torch.float32, device))
    if model is None:
        print(f"warning: merging {args.model} would change its answers: it stays apart", file=sys.stderr)
        model = read_adapter(args, base, torch.float32, device).get_base_model()
    return model


def trained_on_chats(model: str) -> bool:
    """Whether the trainer noted beside an adapter or model that its rows were rendered by the chat template."""
    return bool(noted(find_file(model, "colm_prompts.json")).get("chat_template"))


def open_folder(args: argparse.Namespace, rows: list[Row]) -> tuple[dict, bool]:
    """What shapes the predictions, and whether --output_dir holds a part of this very run."""
    files = []
    for path in sorted(Path(args.model).glob("*.safetensors")):
        files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    settings = dict(vars(args))
    for name in FREE_ON_RESUME:
        del settings[name]
    settings["content"] = hashlib.sha256(repr((rows, files)).encode()).hexdigest()[:16]  # of tasks and model
    path = Path(args.output_dir, "settings.json")
    if not path.is_file() or args.overwrite:
        return settings, False
    saved = json.loads(path.read_text())
    for name, value in settings.items():
        if saved.get(name) != value:
            remedy = "use the same, another --output_dir or --overwrite"
            raise UserError(f"{name} is {value}, but {path.parent} holds a run with {saved.get(name)}: {remedy}")
    return settings, True


def read_records(folder: Path) -> dict[tuple[str, int], dict]:
    """All predictions of a folder, whichever process made them; a line that a kill cut short is left out."""
    records = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                records[record["task"], record["row"]] = record
    return records


def save_records(folder: Path, records: dict) -> None:
    """One predictions.jsonl in place of every process's file."""
    with replacing(folder / "predictions.jsonl") as aside:
        aside.write_text("".join(json.dumps(records[key]) + "\n" for key in sorted(records)), encoding="utf-8")
    for path in folder.glob("predictions-*.jsonl"):
        path.unlink()


def score(rows: list[Row], records: dict, strict: bool) -> None:
    """Add both verdicts to the records."""
    cases = []
    for row in rows:
        record = records[row.task, row.number]
        text = record["output"]
        if "printed" in record:
            text = "The answer is " + record["printed"]
        record |= {"gold": row.gold, "paper_answer": paper_answer(row.kind, text), "paper": paper_correct(row, text)}
        # strict reads a program's last line, and what the program printed as a file of its own, where that is all.
        printed = record.get("own_printed") or record.get("printed")
        if printed is not None:
            text = "The answer is " + (printed.splitlines() or [""])[-1]
        record["answer"] = strict_answer(text)
        cases.append((row, text))
    if strict:
        for row, verdict in zip(rows, strict_scores(cases), strict=True):
            records[row.task, row.number]["strict"] = verdict


def wilson(right: int, count: int, z: float = 1.959964) -> list[float]:
    """95 % interval of a proportion, in per cent (Wilson, 1927)."""
    centre = right + z * z / 2
    half_width = z * math.sqrt(right * (count - right) / count + z * z / 4)
    low = (centre - half_width) / (count + z * z)
    high = (centre + half_width) / (count + z * z)
    return [round(100 * low, 2), round(100 * high, 2)]


def report(rows: list[Row], records: dict, settings: dict, names: list[str]) -> dict:
    """The contents of results.json; prints the table."""
    header = f"{'task':<16} {'rows':>6}"
    for name in names:
        header += f" {name:>8} {'95 %':>14}"
    print(header)
    of_task = {}
    for row in rows:
        of_task.setdefault(row.task, []).append(records[row.task, row.number])
    tasks, idle = {}, 0
    for task, mine in of_task.items():
        found = {"rows": len(mine), "unended": sum(not r["ended"] for r in mine)}
        statuses = Counter(r["program"] for r in mine if "program" in r)
        idle += statuses["not run"]
        if statuses:
            found["programs"] = dict(sorted(statuses.items()))
        line = f"{task:<16} {len(mine):>6}"
        for name in names:
            right = sum(r[name] for r in mine)
            value, (low, high) = round(100 * right / len(mine), 2), wilson(right, len(mine))
            found[name] = {"score": value, "correct": right, "interval": [low, high]}
            line += f" {value:>8.2f} {f'{low:.2f}-{high:.2f}':>14}"
        print(line, found.get("programs", ""))
        tasks[task] = found
    average, line = {}, f"{'average':<23}"
    for name in names:
        average[name] = round(sum(found[name]["score"] for found in tasks.values()) / len(tasks), 2)
        line += f" {average[name]:>8.2f} {'':>14}"
    print(line)
    if idle:
        print(f"{idle} answers hold programs, which the paper's scorer runs in this mode, too: --execute_programs")
    versions = {"python": sys.version}
    for package in ("torch", "transformers", "accelerate", "peft", "math-verify", "sympy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"tasks": tasks, "average": average, "settings": settings, "versions": versions}


def main(argv: list[str]) -> None:
    """Read, generate what the folder doesn't hold yet, score."""
    args = parse_args(argv)
    if args.chat_template is None:
        args.chat_template = trained_on_chats(args.model)
    if args.base_precision is None:
        args.base_precision = trained_precision(find_file(args.model, "settings.json"))
    rows = []
    for name in args.tasks:
        rows += read_task(name, args)
    if len({(row.task, row.number) for row in rows}) < len(rows):
        raise UserError(f"--tasks {' '.join(args.tasks)} names a task twice: name each once")
    folder, (settings, goes_on) = Path(args.output_dir), open_folder(args, rows)
    state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])  # of the slowest rank
    if args.execute_programs:
        check_programs()
    [strict] = strict_scores([(Row("", 0, "", "x + 1"), "The answer is 1 + x")])
    if not strict:
        state.print("warning: no strict score: it needs Linux and pip install 'math-verify[antlr4_13_2]'")
    model, tokenizer, room = load(args, state.device)
    if args.chat_template and not tokenizer.chat_template:
        raise UserError(
            "--chat_template: the tokenizer has none: use a tokenizer with a template, or --no-chat_template"
        )
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not goes_on:
            for path in [*folder.glob("predictions*.jsonl"), *folder.glob("results.json")]:
                path.unlink()
        save_records(folder, read_records(folder))
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    state.wait_for_everyone()
    done = read_records(folder)
    state.wait_for_everyone()  # before any process adds records
    # The longest first: those that are let in together are of like length, and the last ones short.
    waiting = [row for row in rows if (row.task, row.number) not in done]
    waiting.sort(key=lambda row: -len(row.question))
    mine = waiting[state.process_index :: state.num_processes]
    path = folder / f"predictions-{state.process_index}.jsonl"
    generate(mine, model, tokenizer, room, args, path, show=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        records = read_records(folder)
        score(rows, records, strict)
        save_records(folder, records)
        results = report(rows, records, settings, ["paper", "strict"] if strict else ["paper"])
        (folder / "results.json").write_text(json.dumps(results | {"device": state.device.type}, indent=1))
    state.end_training()


def out_of_memory(args: argparse.Namespace) -> str:
    what = f"error: --model {args.model} with --max_tokens_per_batch {args.max_tokens_per_batch}"
    return f"{what} takes more memory than the GPU has free: lower the latter, and the run goes on"


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can fix into one line and exit code 2."""
    hush_libraries()
    try:
        main(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:  # of this process, whichever it is
        print(out_of_memory(parse_args(argv)), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
