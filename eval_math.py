"""Score a causal language model or a LoRA adapter on mathematics.

The protocol of Nguyen et al., ICLR 2025, arXiv 2407.19580v4, section 5: zero-shot Alpaca prompts, greedy decoding,
chain of thought or program of thought, on GSM8K, MATH, NumGLUE, SVAMP, DeepMind, SimulEq and any .json or .jsonl file
of questions and answers.

    python eval_math.py --model out/final --tasks gsm8k svamp --data_dir data
    accelerate launch eval_math.py --model out/final --data_dir data --mode pot --cot_backup --execute_programs

Rows that are done leave the KV cache and waiting prompts take their place. Programs run beside that, caged: they may
compute, read files and print, but not write, fork, signal or open a socket. predictions.jsonl grows row by row, and a
run that was cut short goes on. Each answer gets two verdicts: *paper*, the MathInstruct scorer, faults included (exact
string, integers after rounding, other numbers within 4 %), and *strict*, the same value (numbers, units and options
here, any other LaTeX by math-verify).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import signal
import struct
import sys
import tempfile
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
from peft import PeftModel
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from colm_data import Parser, UserError, load_tokenizer, prompt_and_completion, read_rows, replacing

# -------------------------------------------------------------------------------------------------------------- flags

FILES = {"gsm8k": "gsm8k.jsonl", "math": "math.jsonl"}
FILES |= {name: f"{name}.json" for name in ("numglue", "svamp", "deepmind", "simuleq")}
FREE_ON_RESUME = ("output_dir", "overwrite", "data_dir", "max_tokens_per_batch")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, and the rules that need no data."""
    parser = Parser("eval_math.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="folder or hub id of a causal LM, or folder of a PEFT adapter")
    add("--base_model", help="the adapter's base, where it has moved")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--tasks", nargs="+", default=list(FILES), help=f"of {', '.join(FILES)}, or .json/.jsonl files")
    add("--data_dir", default="data", help=f"folder of {', '.join(FILES.values())}")
    add("--max_rows", type=int, help="score the first rows of each task only")
    add("--output_dir", default="colm_output/eval_math")
    add("--overwrite", action=flag, default=False, help="delete the run that --output_dir holds")
    add("--mode", choices=["cot", "pot"], default="cot", help="chain of thought, or program of thought")
    add("--execute_programs", action=flag, default=False, help="allow programs that the model wrote to run")
    add("--cot_backup", action=flag, default=False, help="ask again without a program where it gives no answer")
    add("--program_seconds", type=float, default=10.0, help="wall time and CPU time of one program")
    add("--max_new_tokens", type=int, default=512)
    add("--max_tokens_per_batch", type=int, default=65536, help="prompt and new tokens in the KV cache, with padding")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
    args = parser.parse_args(argv)
    for name in ("max_rows", "program_seconds", "max_new_tokens"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give a positive number")
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


def pick(row: dict, place: str, name: str) -> str:
    """A field as text: 51.0 is "51"."""
    if not isinstance(row, dict) or name not in row:
        raise UserError(f"{place} has no field {name!r}: give every row a question and an answer")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UserError(f"{place}: field {name!r} is {json.dumps(value)[:80]}: it must be a text or a number")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def question_and_answer(task: str, row: dict, place: str) -> tuple[str, str]:
    """Question and gold answer of a row, whatever its set calls them."""
    if task == "svamp":
        body = pick(row, place, "Body")
        return body + (" " if body[-1] in ".?!," else ". ") + pick(row, place, "Question"), pick(row, place, "Answer")
    question = pick(row, place, "problem" if task == "math" else "question")
    return question, pick(row, place, "answer").split("####")[-1].strip()  # GSM8K's reasoning ends there


def read_task(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a set or of a file."""
    task, path = re.sub(r"\.jsonl?(\.gz)?$", "", Path(name).name), name
    if name in FILES:
        path = str(Path(args.data_dir, FILES[name]))
    elif task == Path(name).name:
        raise UserError(f"--tasks {name} is unknown: choose of {', '.join(FILES)}, or give a .json or .jsonl file")
    pairs = [question_and_answer(task, *row) for row in zip(*read_rows(path), strict=True)]
    return [Row(task, i, *pair) for i, pair in enumerate(pairs[: args.max_rows])]


# --------------------------------------------------------------------------------------------------------- generation


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
    """Requests that are being decoded, and their KV cache [B, heads, L, d], padded on the left."""

    def __init__(self, model, max_tokens: int, max_new: int, stop: set[int]):
        self.model, self.max_tokens, self.max_new, self.stop = model, max_tokens, max_new, stop
        self.requests: list[Request] = []
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        self.options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})

    @torch.inference_mode()
    def step(self, queue: deque[Request]) -> list[Request]:
        """Decode one token of each request, and let waiting ones in; returns the requests that are done now."""
        done = []
        if sum(r.done for r in self.requests) * 8 >= len(self.requests):  # moving the cache costs about a step
            self.compact()
            done = self.admit(queue)
        return done + (self.forward(self.requests, self.cache) if self.requests else [])

    def forward(self, requests: list[Request], cache: DynamicCache) -> list[Request]:
        """Write one more token of each request; returns those that are done now."""
        new = [r.tokens[-1:] or r.prompt for r in requests]
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in new])  # [B, P], or [B, 1] once prompts are read
        total = cache.get_seq_length() + width
        lengths = torch.tensor([len(r.prompt) + len(r.tokens) for r in requests])
        mask = (torch.arange(total) >= total - lengths[:, None]).long()  # [B, L]; of no meaning where a row is done
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()} | {self.cache_name: cache}
        best = self.model(**inputs, **self.options).logits[:, -1].argmax(-1)  # [B]
        running = [(r, token) for r, token in zip(requests, best.tolist(), strict=True) if not r.done]
        for request, token in running:
            request.tokens.append(token)
            request.done = token in self.stop or len(request.tokens) >= self.max_new
        return [request for request, _ in running if request.done]

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
                new.keys = torch.cat([pad(x.keys, (0, 0, width - x.keys.shape[2], 0)) for x in (old, new)])
                new.values = torch.cat([pad(x.values, (0, 0, width - x.values.shape[2], 0)) for x in (old, new)])
                old.keys = old.values = None  # or two caches would lie in memory
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


def program_in(text: str) -> str:
    """The program of a response; empty where it has none."""
    text = text.split("### Instruction")[0]
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    program = (fenced[1] if fenced else text).strip("\n")
    return program if "print(" in program else ""


def evaluate(rows: list[Row], model, tokenizer, room: int, args: argparse.Namespace, path: Path, show: bool) -> None:
    """Append a record of every row to a file: decoding in this thread, programs in others."""
    ids = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
    batch = Batch(model, args.max_tokens_per_batch, args.max_new_tokens, stop)
    queue, running = deque(), set()

    def ask(row: Row, **options):
        """The trainer's prompt; one that is too long loses its beginning."""
        text = row.question + (" Let's write a program." if options.get("program") else "")
        prompt, _ = prompt_and_completion({"instruction": text, "output": ""}, row.task, tokenizer)
        queue.append(Request(row, tokenizer(prompt, verbose=False)["input_ids"][-room:], **options))

    for row in rows:
        ask(row, **({"program": True, "known": {"program": "none", "error": ""}} if args.mode == "pot" else {}))
    bar = tqdm(total=len(rows), desc="rows", disable=not show)
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(4) as pool, bar:
        while queue or batch.requests or running:
            for request in batch.step(queue):
                text = tokenizer.decode(request.tokens, skip_special_tokens=True)
                record = {"task": request.row.task, "row": request.row.number, "output": text}
                record |= {"ended": request.tokens[-1] in stop} | request.known
                running.add(pool.submit(with_program, request, record, args.program_seconds))
            over, running = wait(running, 0 if queue or batch.requests else None, FIRST_COMPLETED)
            for request, record in (future.result() for future in over):
                if request.program and args.cot_backup and not re.search(r"\w", record.get("printed", "")):
                    known = {"program": record["program"], "error": record["error"], "program_text": record["output"]}
                    ask(request.row, known=known)
                else:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    bar.update()


def with_program(request: Request, record: dict, seconds: float) -> tuple[Request, dict]:
    """Run the program of a response, where it has been asked for one."""
    if request.program and (program := program_in(record["output"])):
        ran = run_program(program, seconds=seconds)
        record |= {"program": ran.status, "error": ran.error, "printed": ran.output if ran.status == "ok" else ""}
    return request, record


# ------------------------------------------------------------------------------------------------- programs in a cage

# What a computing interpreter asks of an x86_64 kernel: no fork, exec, socket, signal, trace or change of files.
SYSCALLS = """read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 pread64 17 readv 19 writev 20 access 21 select 23 sched_yield 24
mremap 25 madvise 28 nanosleep 35 setitimer 38 getpid 39 exit 60 uname 63 getcwd 79 readlink 89 gettimeofday 96
getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 sigaltstack 131 gettid 186
time 201 futex 202 sched_getaffinity 204 getdents64 217 restart_syscall 219 clock_gettime 228 clock_getres 229
clock_nanosleep 230 exit_group 231 newfstatat 262 readlinkat 267 faccessat 269 pselect6 270 ppoll 271
set_robust_list 273 getrandom 318 membarrier 324 statx 332 rseq 334 faccessat2 439"""


def filter_code() -> bytes:
    """A seccomp program in BPF: SYSCALLS and open to read are allowed, the rest gets EPERM."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill, writing = 0x7FFF0000, 0x00050001, 0x80000000, 0o1103  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
    code = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, kill), (load, 0, 0, 0)]  # x86_64
    for number in map(int, SYSCALLS.split()[1::2]):
        code += [(equal, 0, 1, number), (give, 0, 0, allow)]
    for number, place in ((2, 1), (257, 2)):  # open and openat, and which argument holds their flags
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (any_bit, 0, 1, writing)]
        code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in [*code, (give, 0, 0, refuse)])


def cage():
    """Give up every power, then run a program: the child interpreter is given this function's source."""
    import ctypes, io, json, resource, struct, sys  # noqa: E401, I001

    given = json.load(sys.stdin)
    for name, limit in given["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + 1))  # first SIGXCPU, then SIGKILL
    libc, code = ctypes.CDLL(None), bytes.fromhex(given["filter"])
    libc.unshare(0x10000000)  # a user namespace of its own and no capabilities: no other process's memory can be read
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with the evaluator
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        sys.exit("OSError: the kernel does not filter system calls")
    sys.stdin, sys.argv = io.StringIO(given["data"]), ["program"]
    exec(compile(given["source"], "<program>", "exec"), {"__name__": "__main__"})


class Result(NamedTuple):
    """How a program ended, what it printed, and the last line of its complaints."""

    status: str  # ok, timeout, memory, output, refused, error or killed
    output: str
    error: str


def run_program(source: str, data: str = "", seconds: float = 10.0, megabytes: int = 1024) -> Result:
    """Run Python source in the cage. Its output goes to files, so that the kernel's file size limit bounds it."""
    size = 64 * 1024
    limits = {"CPU": math.ceil(seconds), "AS": megabytes << 20, "FSIZE": size, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    given = json.dumps({"source": source, "data": data, "limits": limits, "filter": filter_code().hex()}).encode()
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", inspect.getsource(cage) + "\ncage()"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = Popen(command, stdin=PIPE, stdout=out, stderr=err, cwd=folder, env=threads, start_new_session=True)
        with suppress(TimeoutExpired):
            child.communicate(given, timeout=seconds)
        code = child.returncode  # None while it runs
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        output, error = (os.pread(file.fileno(), size, 0).decode("utf-8", "replace").strip() for file in (out, err))
    last = error.rpartition("\n")[2][:200]
    return Result(status_of(code, last, max(len(output), len(error)) > size - 200), output, last)


def status_of(code: int | None, error: str, full: bool) -> str:
    """A word for an exit code and the last line of stderr; `full`: output met its limit."""
    if code is None or code == -signal.SIGXCPU:
        return "timeout"
    if full or "File too large" in error:
        return "output"
    if code <= 0:
        return "ok" if code == 0 else "killed"
    if "MemoryError" in error.partition(":")[0] or "Cannot allocate memory" in error:
        return "memory"
    return "refused" if re.match("PermissionError|.*not (permitted|allowed)|.*start new thread", error) else "error"


def check_programs() -> None:
    """Refuse where no program can run; warn where the evaluator's own secrets are in reach."""
    result = run_program(f"open('/proc/{os.getpid()}/environ').read(1)")
    if result.status == "ok":
        print("warning: this system lets programs read the evaluator's environment", file=sys.stderr)
    elif result.status != "refused":
        raise UserError(f"--execute_programs needs Linux on x86_64 ({result.error or result.status}): use --mode cot")


# --------------------------------------------------------------------------------------------------------- answers


def paper_number(text: str) -> float | None:
    """The value of a decimal or a fraction; the official scorer calls eval here."""
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text) if "frac" in text else text.replace(",", "")
    top, _, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def boxed(text: str) -> str:
    """What the last \\boxed{...} holds; empty where there is none."""
    rest = text.rpartition("boxed")[2] if "boxed" in text else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depths = list(itertools.accumulate((letter == "{") - (letter == "}") for letter in rest))
    return rest[1 : depths.index(0) if 0 in depths else None]


def paper_math_string(text: str) -> str:
    """The string that MATH answers are compared by: units, spaces and spellings of fractions and roots removed."""
    text = re.sub(r"\n|\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\%", "", text.replace("\\\\", "\\"))
    text = re.sub(r"[td]frac", "frac", text).split("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    text = re.sub(r"^[^=]{0,2}=(?=[^=]*$)", "", text)
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def paper_answer(task: str, text: str, options: bool) -> str:
    """The answer that the official scorer reads out of a response."""
    if task == "math":
        parts = re.split("[Tt]he answer is ", text)
        found = re.findall(r"-?\d*\.?\d+", text) or [""]
        answer = parts[-1].strip() if len(parts) > 1 else boxed(text) if "boxed" in text else found[-1]
        answer = paper_math_string(answer.removesuffix(".").removesuffix("/"))
        return paper_math_string(boxed(answer)) if "boxed" in answer else answer
    if max(text.count("####"), text.count("The answer is")) > 1:
        text = text.split("\n\n")[0]
    parts = re.split("####|The answer is", text)
    answer = parts[-1].split("=")[-1]
    found = re.findall(r"\b[A-E]\b", answer.upper()) if options else []  # the article "a" is read as option A
    found = found or re.findall(r"-?\d+/?\.?\d*", answer.replace(",", "")) or [""]
    return found[0 if len(parts) > 1 else -1].removesuffix(".").removesuffix("/")


def paper_correct(task: str, text: str, gold: str) -> bool:
    """The official verdict: the same string, the same integer after rounding, or within 4 %."""
    answer = paper_answer(task, text, task == "numglue" or gold in list("ABCDE"))
    gold = paper_math_string(gold) if task == "math" else gold.replace(",", "")
    target, number = paper_number(gold), paper_number(answer)
    if target is None or number is None:
        return answer == gold
    return round(number) == target if target.is_integer() else abs(number - target) <= 0.04 * abs(target)


SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = """mm millimeter|cm centimeter|m meter metre|km kilometer|in inch inche|ft foot feet|yd yard|mi mile|l liter|
mg milligram|g gram|kg kilogram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|year|cent|dollar $"""
UNITS = {word: unit for unit in UNITS.split("|") for word in unit.split()}
NOT_UNITS = r"pi|sqrt|log|ln|sin|cos|tan|exp|not|no|less|more|least|most|than|over|under|between|times|squared|cubed"
MANTISSA = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
POWER = r"(?: ?(?:e|(?:×|x|\\times|\\cdot) ?10 ?\^ ?)[{(]?([-+]?\d{1,3})[)}]?)?"
NUMBER = re.compile(rf"([-+]?) ?([$€£]?)([-+]?)(?:(?:(\d+)[ -])?(\d+) ?/ ?(\d+)|({MANTISSA}){POWER})( ?%)?", re.I)


def plain(text: str) -> str:
    """LaTeX dress taken off, and Python's: x = \\dfrac{1}{2}\\text{ cm} becomes x = 1/2 cm, 3*x**2 3 \\cdot x^2."""
    text = re.sub(r"(?<!\\)\$([^$]*[^$\\])\$", r"\1", text.replace("−", "-").replace("–", "-"))
    text = re.sub(r"(?<!\\)\\[()\[\]]|\\!|(?<!\\)\$(?!\d)|\*\*(?=\s|$)|^\*\*|`", "", text)
    text = re.sub(r"\\left|\\right(?!arrow)|\^\{?\\circ\}?|°", "", text.replace("\\$", "$").replace("{,}", ","))
    text = re.sub(r"(?<!\\)\\[,;: ]", " ", re.sub(r"\\[td]frac", r"\\frac", text))
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d|\{\s*-?\d+\s*\})\s*(\d|\{\s*\d+\s*\})", r" \1/\2 ", text)
    text = re.sub(r"\{\s*(-?\d+)\s*\}/", r"\1/", re.sub(r"/\{\s*(\d+)\s*\}", r"/\1", text))
    text = re.sub(r"\b(?:negative|minus) ", "-", re.sub(r"\\%| percent\b", "%", text))
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)  # Python's formulas
    text = re.sub(r"(?<![\\a-zA-Z])pi\b", r"\\pi", text.replace("**", "^"))
    text = re.sub(r"\^\(([^()]*)\)", r"^{\1}", text).replace("*", r" \cdot ")
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
    return f"({text.replace(' ', ', ')})" if re.fullmatch(r"-?\d+(?: -?\d+)+", text) else text  # a list of DeepMind


def key(text: str) -> str:
    """Texts of equal keys are equal."""
    text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\s", "", text).casefold().strip(".:"))
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


def number_of(text: str) -> tuple[Fraction, bool, int, str | None] | None:
    """The only number of a text, bare or among words: value, whether in per cent, decimals written, unit."""
    text = re.sub(r"(?<=[a-z])(?:\^\{?[23]\}?|[²³])", "", text)
    found = [m for m in NUMBER.finditer(text) if re.search(r"\d", m[0])]
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    words = f"{before} {after}".lower()
    letter = re.match(r"[a-z](?![a-z])| [a-fh-kn-z](?![a-z])", after, re.I)  # 3x and 3 x are no numbers
    if letter or before.rstrip().endswith("-") or re.search(rf"[^a-z\s.,:;'\"!?’-]|\b(?:{NOT_UNITS})\b", words):
        return None
    sign, dollar, inner, whole, top, bottom, digits, power, percent = found[0].groups()
    try:
        value = Fraction(int(top), int(bottom)) + int(whole or 0) if top else Fraction(digits.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
    value *= SCALES.get(after.lower().strip().partition(" ")[0], 1)
    value *= Fraction(10) ** int(power or 0) * (-1 if "-" in (sign, inner) else 1)
    known = [UNITS[w] for w in re.findall(r"[a-z]+", after.lower()) for w in (w, w.rstrip("s")) if w in UNITS]
    decimals = len(digits.partition(".")[2]) if digits and not power else 0
    return value, bool(percent), decimals, known[0] if known else UNITS["$"] if dollar else None


def same_number(answer: tuple, gold: tuple) -> bool:
    """The same value, where units don't differ: 50 % may be 50 or 0.5, and 0.333333 is 1/3."""
    (value, percent, _, unit), (gold, gold_percent, decimals, gold_unit) = answer, gold
    values = [value] if percent == gold_percent else [value, value / 100 if percent else value * 100]
    if decimals >= 2:  # a gold answer of two decimals or more was rounded to them
        values += [Fraction(round(v, decimals)) for v in values]
    room = min(abs(gold) * Fraction(2, 10**6), Fraction(1, 1000))  # what printing a float loses
    close = any(abs(v - gold) <= (room if v.denominator > 1 or gold.denominator > 1 else 0) for v in values)
    return close and (unit == gold_unit or None in (unit, gold_unit))


def strict_answer(text: str) -> str:
    """The last answer that a response states, else its last box, else its last number or line."""
    text = text.split("### Instruction")[0][-4000:].strip()
    parts = re.split(r"####|\banswer is\b ?:?|\banswer ?:", text, flags=re.I)
    if len(parts) == 1:
        if "boxed" in text:
            return plain(boxed(text))[:400]
        last = text.rpartition("\n")[2]
        found = [m[0] for m in NUMBER.finditer(text) if re.search(r"\d", m[0])]
        return plain(last) if re.search(r"\([A-F]\)", last) or not found else plain(found[-1].strip())
    answer = re.match(r"(?:\\begin.*?\\end|\{[^{}]*\}|[^\n])*", parts[-1].strip(), re.S)[0]  # a line
    answer = boxed(answer) or answer
    return plain(re.split(r"\.\s|\bbecause\b", answer.strip() + " ")[0])[:400]


def chosen(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by its text or its letter; "a web" names the web, not option A."""
    words = key(re.sub(r"^(?:a|an|the) ", "", answer, flags=re.I))
    named = [letter for letter, text in options.items() if key(text.strip(" ,\n")) == words]
    letters = re.findall(r"\(([A-F])\)|^(?:OPTION )?([A-F])(?:[.:)]|$)", answer.upper())
    return named[0] if named else "".join(letters[0]) if len(set(letters)) == 1 else None


def strict_verdict(task: str, question: str, text: str, gold: str) -> bool | tuple[str, str]:
    """Does a response state the gold answer's value? Of expressions, the two that math-verify has to compare."""
    answer, (_, *listed) = strict_answer(text), re.split("Answer Choices:|Options:", question)
    options = dict(re.findall(r"\(([A-F])\)([^()]*)", listed[-1])) if listed else {}
    if gold in options:
        return chosen(answer, options) == gold
    gold = plain(re.sub(r"^\[(.*)\]$", r"\1", gold) if task == "deepmind" else gold)  # its prime factors are a set
    if gold[:1] not in ("[", "("):
        answer = re.sub(r"^\[(.*)\]$", r"\1", answer)  # a Python list for a set
    if key(answer) == key(gold) or re.search(r"\d_", gold + answer):  # numbers in other bases are texts here
        return key(answer) == key(gold)
    answer = answer if "=" in gold else answer.rpartition("=")[2].strip()
    numbers = number_of(answer), number_of(gold)
    return (answer, gold) if None in numbers else same_number(*numbers)


JUDGE = """
import json, logging, signal, sys
from math_verify import LatexExtractionConfig, parse, verify
logging.disable()
for pair in map(json.loads, sys.stdin):
    signal.setitimer(signal.ITIMER_PROF, 3)  # CPU seconds; ends this process, and the pair it was at is unequal
    try:
        answer, gold = [parse(f"${x}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None) for x in pair]
        print(int(verify(gold, answer, timeout_seconds=None)), flush=True)
    except Exception:
        print(0, flush=True)
"""


def strict_scores(cases: list[tuple[str, str, str, str]]) -> list[bool]:
    """Verdicts on (task, question, response, gold). math-verify is caged: 10^{10^{10}} ends it, another goes on."""
    found = [strict_verdict(*case) for case in cases]
    pairs = [pair for pair in dict.fromkeys(found) if isinstance(pair, tuple)]
    judged: list[bool] = []
    while len(judged) < len(pairs):
        some = pairs[len(judged) : len(judged) + 500]
        lines = run_program(JUDGE, "\n".join(map(json.dumps, some)), seconds=3000, megabytes=2048).output.split()
        judged += [line == "1" for line in lines] + [False] * (len(lines) < len(some))
    verdicts = dict(zip(pairs, judged, strict=True))
    return [verdicts.get(x, x) for x in found]


# ------------------------------------------------------------------------------------------------------------ results


def load(args: argparse.Namespace, device: torch.device):
    """The model (an adapter merged into its base), the tokenizer, and the room for a prompt in tokens."""
    config, base = Path(args.model, "adapter_config.json"), args.model
    remote = {"trust_remote_code": args.trust_remote_code}
    adapter, remedy = config.is_file(), "give a causal LM's folder or hub id"
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    try:
        if adapter:
            base = args.base_model or json.loads(config.read_text())["base_model_name_or_path"]
            remedy = f"its base is {base}, name another folder with --base_model"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if adapter else dtype, **remote)
        if adapter:
            model = PeftModel.from_pretrained(model, args.model).merge_and_unload()
    except Exception as error:  # the hub, configs, adapters and remote code each raise their own kinds
        raise UserError(f"--model {args.model}: {' '.join(str(error).split())[:160]}: {remedy}") from None
    room = getattr(model.config, "max_position_embeddings", 2**31) - args.max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: lower it")
    own = not adapter or config.with_name("tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(argparse.Namespace(model=args.model if own else base, **remote))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and every token makes a new one
    return model.to(device, dtype).eval(), tokenizer, room


def open_folder(args: argparse.Namespace, rows: list[Row]) -> tuple[dict, bool]:
    """What shapes the predictions, and whether --output_dir holds a part of this very run."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(args.model).glob("*.safetensors"))]
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    settings["content"] = hashlib.sha256(repr((rows, files)).encode()).hexdigest()[:16]  # of tasks and model
    path = Path(args.output_dir, "settings.json")
    goes_on = path.is_file() and not args.overwrite
    saved = json.loads(path.read_text()) if goes_on else settings
    for name in (name for name, value in settings.items() if saved.get(name) != value):
        remedy = "use the same, another --output_dir or --overwrite"
        raise UserError(f"{name} is {settings[name]}, but {path.parent} holds a run with {saved.get(name)}: {remedy}")
    return settings, goes_on


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
        printed = record.get("printed")
        lines = (printed or "").splitlines() or [""]
        paper, text = (record["output"] if printed is None else f"The answer is {x}" for x in (printed, lines[-1]))
        record |= {"answer": strict_answer(text), "gold": row.gold, "paper": paper_correct(row.task, paper, row.gold)}
        cases.append((row.task, row.question, text, row.gold))
    for row, verdict in zip(rows, strict_scores(cases), strict=True) if strict else ():
        records[row.task, row.number]["strict"] = verdict


def wilson(right: int, count: int, z: float = 1.959964) -> list[float]:
    """95 % interval of a proportion, in per cent (Wilson, 1927)."""
    centre, width = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
    return [round(100 * (centre + side * width) / (count + z * z), 2) for side in (-1, 1)]


def report(rows: list[Row], records: dict, settings: dict, names: list[str]) -> dict:
    """The contents of results.json; prints the table."""
    print(f"{'task':<16} {'rows':>6}" + "".join(f" {name:>8} {'95 %':>14}" for name in names))
    tasks = {}
    for task in dict.fromkeys(row.task for row in rows):
        mine = [records[row.task, row.number] for row in rows if row.task == task]
        tasks[task] = {"rows": len(mine), "unended": sum(not r["ended"] for r in mine)}
        if settings["mode"] == "pot":
            tasks[task]["programs"] = dict(sorted(Counter(r["program"] for r in mine).items()))
        line = f"{task:<16} {len(mine):>6}"
        for name in names:
            right = sum(r[name] for r in mine)
            value, (low, high) = round(100 * right / len(mine), 2), wilson(right, len(mine))
            tasks[task][name] = {"score": value, "correct": right, "interval": [low, high]}
            line += f" {value:>8.2f} {f'{low:.2f}-{high:.2f}':>14}"
        print(line, tasks[task].get("programs", ""))
    average = {name: round(sum(t[name]["score"] for t in tasks.values()) / len(tasks), 2) for name in names}
    print(f"{'average':<23}" + "".join(f" {value:>8.2f} {'':>14}" for value in average.values()))
    packages = {"torch", "transformers", "accelerate", "peft", "math-verify", "sympy"}
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages} | {
        "python": sys.version
    }
    return {"tasks": tasks, "average": average, "settings": settings, "versions": versions}


def main(argv: list[str]) -> None:
    """Read, generate what the folder doesn't hold yet, score."""
    args = parse_args(argv)
    rows = [row for name in args.tasks for row in read_task(name, args)]
    if len({row[:2] for row in rows}) < len(rows):
        raise UserError(f"--tasks {' '.join(args.tasks)} names a task twice: name each once")
    folder, (settings, goes_on) = Path(args.output_dir), open_folder(args, rows)
    state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])  # of the slowest rank
    if args.execute_programs:
        check_programs()
    [strict] = strict_scores([("", "", "The answer is 1 + x", "x + 1")])
    if not strict:
        state.print("warning: no strict score: it needs Linux and pip install 'math-verify[antlr4_13_2]'")
    model = load(args, state.device)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [] if goes_on else [*folder.glob("predictions*.jsonl"), *folder.glob("results.json")]:
            path.unlink()
        save_records(folder, read_records(folder))
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    state.wait_for_everyone()
    done = read_records(folder)
    state.wait_for_everyone()  # before any process adds records
    rank, ranks = state.process_index, state.num_processes
    waiting = sorted((row for row in rows if row[:2] not in done), key=lambda row: -len(row.question))[rank::ranks]
    evaluate(waiting, *model, args, folder / f"predictions-{rank}.jsonl", show=state.is_main_process)
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
    """Run, and turn what the user can mend into one line and exit code 2."""
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
