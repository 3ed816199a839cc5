"""Score a causal language model or a LoRA adapter on mathematics.

The protocol of Nguyen et al., ICLR 2025, arXiv 2407.19580v4, section 5: zero-shot Alpaca prompts, greedy decoding,
chain of thought or program of thought, on GSM8K, MATH, NumGLUE, SVAMP, DeepMind, SimulEq and any .json or .jsonl file
of questions and answers.

    python eval_math.py --model out/final --tasks gsm8k svamp --data_dir data
    accelerate launch eval_math.py --model out/final --data_dir data --mode pot --cot_backup --execute_programs

Decoding batches continuously: rows that are done leave the KV cache and waiting prompts take their place, while
programs run beside it. OUTPUT/predictions.jsonl grows as rows are done, and a run that was cut short goes on where it
stopped; OUTPUT/results.json holds scores, counts, 95 % intervals, settings and versions. math_scores.py says what is
right, and holds the programs captive.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import sys
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from math_scores import CageError, compare, open_doors, paper_correct, run_program, strict_answer, strict_scores
from train_colm import Parser, UserError, load_tokenizer, prompt_and_completion, read_rows

# ------------------------------------------------------------------------------------------------------------- flags

FILES = {
    **{"gsm8k": "gsm8k.jsonl", "math": "math.jsonl", "numglue": "numglue.json"},
    **{"svamp": "svamp.json", "deepmind": "deepmind.json", "simuleq": "simuleq.json"},
}
FREE_ON_RESUME = ("output_dir", "overwrite", "data_dir", "max_tokens_per_batch", "program_workers", "strict")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("eval_math.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="folder or hub id of a causal LM, or folder of a PEFT adapter")
    add("--base_model", help="the adapter's base, where it has moved")
    add("--trust_remote_code", action=flag, default=False, help="run Python code that the model's repository ships")
    add("--tasks", nargs="+", default=list(FILES), help=f"of {', '.join(FILES)}, or .json/.jsonl files")
    add("--data_dir", help=f"folder of {', '.join(FILES.values())}")
    add("--max_rows", type=int, help="score the first rows of each task only")
    add("--output_dir", default="colm_output/eval_math")
    add("--overwrite", action=flag, default=False, help="delete the run that --output_dir holds")
    add("--mode", choices=["cot", "pot"], default="cot", help="chain of thought, or program of thought")
    add("--execute_programs", action=flag, default=False, help="allow programs that the model wrote to run")
    add("--cot_backup", action=flag, default=False, help="ask again without a program where it gives no answer")
    add("--program_seconds", type=float, default=10.0, help="wall time and CPU time of one program")
    add("--program_megabytes", type=int, default=1024, help="memory of one program")
    add("--program_workers", type=int, default=4, help="programs run at once by each process")
    add("--strict", action=flag, default=True, help="the strict score, which needs math-verify")
    add("--max_new_tokens", type=int, default=512)
    add("--max_tokens_per_batch", type=int, default=65536, help="prompt and new tokens in the KV cache, with padding")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU")
    args = parser.parse_args(argv)
    for name in ("max_rows", "program_seconds", "program_megabytes", "program_workers", "max_new_tokens"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)} is out of range: give a positive number")
    if args.max_tokens_per_batch < args.max_new_tokens:
        raise UserError(f"--max_tokens_per_batch is below --max_new_tokens {args.max_new_tokens}: raise it above")
    if args.mode == "pot" and not args.execute_programs:
        raise UserError("--mode pot runs programs that the model wrote: allow it with --execute_programs")
    if args.cot_backup and args.mode == "cot":
        raise UserError("--cot_backup has no effect with --mode cot: use --mode pot")
    if args.strict and importlib.util.find_spec("math_verify") is None:
        raise UserError("--strict needs a package: pip install 'math-verify[antlr4_13_2]', or give --no-strict")
    return args


# -------------------------------------------------------------------------------------------------------------- tasks


@dataclass
class Row:
    task: str
    number: int  # of the file, from 0
    question: str
    gold: str


def pick(row: dict, place: str, name: str) -> str:
    """A field as text: 51.0 is "51"."""
    if not isinstance(row, dict) or name not in row:
        raise UserError(f"{place} has no field {name!r}: give every row a question and an answer")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or str(value).strip() in ("", "nan", "inf"):
        raise UserError(f"{place}: field {name!r} is {json.dumps(value)[:80]}: it must be a text or a number")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def normalise(task: str, row: dict, place: str) -> tuple[str, str]:
    """Question and gold answer of a row, whatever its set calls them."""
    if task == "svamp":
        body = pick(row, place, "Body")
        return body + (" " if body[-1] in ".?!," else ". ") + pick(row, place, "Question"), pick(row, place, "Answer")
    name = "problem" if isinstance(row, dict) and "problem" in row and "question" not in row else "question"
    question, answer = pick(row, place, name), pick(row, place, "answer")
    return question, answer.split("####")[-1].strip() if task == "gsm8k" else answer


def read_task(name: str, args: argparse.Namespace) -> list[Row]:
    path = name
    if name in FILES:
        if not args.data_dir:
            raise UserError(f"--tasks {name} needs --data_dir: name the folder that holds {FILES[name]}")
        path = str(Path(args.data_dir) / FILES[name])
    elif not re.search(r"\.jsonl?(\.gz)?$", name):
        raise UserError(f"--tasks {name} is unknown: choose of {', '.join(FILES)}, or give a .json or .jsonl file")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: mend --data_dir or --tasks")
    rows, places = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows: give a question and an answer at least")
    task = name if name in FILES else re.sub(r"\.jsonl?(\.gz)?$", "", Path(name).name)
    pairs = [normalise(task, row, place) for row, place in zip(rows, places, strict=True)]
    return [Row(task, i, *pair) for i, pair in enumerate(pairs[: args.max_rows])]


# ---------------------------------------------------------------------------------------------------------- generation


def program_in(text: str) -> str:
    """The program of a response; empty where it has none."""
    text = text.split("### Instruction")[0]
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    program = (fenced[1] if fenced else text).strip("\n")
    return program if "print(" in program else ""


@dataclass
class Request:
    row: Row
    prompt: list[int]
    program: bool = False  # asked for a program
    before: dict = field(default_factory=dict)  # what the program gave, of a request that is asked again
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class Batch:
    """Requests that are being decoded, their KV cache, its mask [B, L] and each one's last token [B]."""

    def __init__(self, model, max_tokens: int, max_new: int, stop: set[int]):
        self.model, self.max_tokens, self.max_new, self.stop = model, max_tokens, max_new, stop
        self.requests: list[Request] = []
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
        self.options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})

    def forward(self, ids, mask, cache):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return self.model(**inputs, **{self.cache_name: cache}, **self.options).logits[:, -1].argmax(-1).cpu()  # [b]

    def admit(self, queue: deque[Request]) -> list[Request]:
        """Take waiting requests while the cache has room, padding counted; returns those that are done at once."""
        from transformers import DynamicCache

        taken, longest = [], max((len(r.prompt) for r in self.requests), default=0)
        while queue:
            longest, rows = max(longest, len(queue[0].prompt)), len(self.requests) + len(taken)
            if rows and (rows + 1) * (longest + self.max_new) > self.max_tokens:
                break
            taken.append(queue.popleft())
        if not taken:
            return []
        width = max(len(r.prompt) for r in taken)
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in taken])  # [b, P], padded on the left
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in taken])
        cache = DynamicCache()  # without a config, so of full length: sliding windows are the mask's business
        last = self.forward(ids, mask, cache)
        if self.requests:
            width = max(width, self.mask.shape[1])
            for old, new in zip(self.cache.layers, cache.layers, strict=True):
                new.keys = stack(old.keys, new.keys, width)  # [B, heads, L, d]
                new.values = stack(old.values, new.values, width)
            mask = stack(self.mask[:, None, :, None], mask[:, None, :, None], width)[:, 0, :, 0]
        self.last = torch.cat([self.last, last]) if self.requests else last
        self.requests, self.cache, self.mask = [*self.requests, *taken], cache, mask
        return self.note(taken, last)

    def step(self) -> list[Request]:
        """One more token for every row; returns the requests that are done now."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.last = self.forward(self.last[:, None], self.mask, self.cache)
        return self.note(self.requests, self.last)

    def note(self, requests: list[Request], last: torch.Tensor) -> list[Request]:
        running = [(r, token) for r, token in zip(requests, last.tolist(), strict=True) if not r.done]
        for request, token in running:
            request.tokens.append(token)
            request.done = token in self.stop or len(request.tokens) >= self.max_new
        return [request for request, _ in running if request.done]

    def compact(self) -> None:
        """Drop the rows that are done, and the columns that are padding in all the others."""
        keep = torch.tensor([i for i, r in enumerate(self.requests) if not r.done], dtype=torch.long)
        self.requests = [self.requests[i] for i in keep]
        if self.requests:
            self.last, self.mask = self.last[keep], self.mask[keep]
            padding = int((self.mask.cumsum(1) == 0).sum(1).min())
            self.mask = self.mask[:, padding:]
            self.cache.batch_select_indices(keep.to(self.model.device))
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]


def stack(old: torch.Tensor, new: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of both, padded on the left to one width: [a, h, L, d] and [b, h, P, d] give [a + b, h, width, d]."""
    return torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in (old, new)])


@torch.no_grad()
def decode(batch: Batch, queue: deque[Request]):
    """Yield requests as they are done; the caller may add to the queue meanwhile."""
    while queue or batch.requests:
        done = []
        if sum(r.done for r in batch.requests) * 8 >= len(batch.requests):  # moving the cache costs about a step
            batch.compact()
            done = batch.admit(queue)
        if batch.requests:
            done += batch.step()
        yield from done


class Evaluator:
    """One process's share of the rows: decoding in this thread, programs in others, a line on disk for each row."""

    def __init__(self, args, model, tokenizer, path: Path):
        self.args, self.tokenizer, self.file = args, tokenizer, path.open("a", encoding="utf-8")
        ids = model.generation_config.eos_token_id
        stop = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
        self.room = room_for_prompts(model, args)
        self.batch = Batch(model, args.max_tokens_per_batch, args.max_new_tokens, stop)
        self.queue, self.pool, self.programs = deque(), ThreadPoolExecutor(args.program_workers), {}

    def request(self, row: Row, **options) -> Request:
        text = row.question + (" Let's write a program." if options.get("program") else "")
        prompt, _ = prompt_and_completion({"instruction": text, "output": ""}, row.task, self.tokenizer)
        return Request(row, self.tokenizer(prompt, verbose=False)["input_ids"][-self.room :], **options)

    def run(self, rows: list[Row], bar: tqdm) -> None:
        self.bar, requests = bar, [self.request(row, program=self.args.mode == "pot") for row in rows]
        self.queue.extend(sorted(requests, key=lambda r: -len(r.prompt)))  # memory runs out at once or never
        while self.queue or self.programs:
            for request in decode(self.batch, self.queue):
                self.answered(request)
                self.collect(timeout=0)
            self.collect(timeout=None)

    def answered(self, request: Request) -> None:
        text = self.tokenizer.decode(request.tokens, skip_special_tokens=True)
        ended = request.tokens[-1] in self.batch.stop
        record = {"task": request.row.task, "row": request.row.number, "output": text, "ended": ended} | request.before
        if request.program and (program := program_in(text)):
            limits = self.args.program_seconds, self.args.program_megabytes
            self.programs[self.pool.submit(run_program, program, "", *limits)] = request, record
        else:
            self.settle(request, record | ({"program": "none"} if request.program else {}))

    def collect(self, timeout: float | None) -> None:
        """Take in what programs gave; without a timeout wait for the next one."""
        for future in wait(self.programs, timeout, FIRST_COMPLETED).done if self.programs else ():
            request, record = self.programs.pop(future)
            result = future.result()
            printed = result.output if result.status == "ok" else ""
            self.settle(request, record | {"program": result.status, "printed": printed, "error": result.error})

    def settle(self, request: Request, record: dict) -> None:
        """Write the row down; where a program gave no answer and --cot_backup is on, ask without one first."""
        if request.program and self.args.cot_backup and not re.search(r"\w", record.get("printed", "")):
            before = {"program": record["program"], "error": record.get("error", ""), "program_text": record["output"]}
            self.queue.append(self.request(request.row, before=before))
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.bar.update()


# ------------------------------------------------------------------------------------------------ models, runs, results


def load(args: argparse.Namespace, device: torch.device):
    """Model (an adapter merged into its base) and tokenizer."""
    from transformers import AutoModelForCausalLM

    config, base, wrong = Path(args.model, "adapter_config.json"), args.model, f"--model {args.model}"
    adapter, remote = config.is_file(), {"trust_remote_code": args.trust_remote_code}
    if args.base_model and not adapter:
        raise UserError(f"--base_model {args.base_model}: {wrong} is no adapter: leave --base_model out")
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    try:
        if adapter:
            base = args.base_model or json.loads(config.read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if adapter else dtype, **remote)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.model).merge_and_unload()  # in float32
    except Exception as error:  # the hub, configs, adapters and remote code each raise their own kinds
        remedy = "name its base's folder with --base_model" if adapter else "give a causal LM's folder or hub id"
        what = f"{wrong}, an adapter of {base}," if adapter else wrong
        raise UserError(f"{what} can't be loaded ({' '.join(str(error).split())[:160]}): {remedy}") from None
    room_for_prompts(model, args)  # as above: before anything is written
    own = not adapter or config.with_name("tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(argparse.Namespace(model=args.model if own else base, **remote))
    return model.to(device, dtype).eval(), tokenizer


def room_for_prompts(model, args: argparse.Namespace) -> int:
    """Tokens; longer prompts lose their beginning."""
    room = getattr(model.config, "max_position_embeddings", 2**31) - args.max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: lower it")
    return room


def settings_of(args: argparse.Namespace, rows: list[Row]) -> dict:
    """What shapes the predictions; a run that goes on must agree."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(args.model).glob("*.safetensors"))]
    weights = hashlib.sha256(repr(files).encode())
    data = hashlib.sha256(repr(rows).encode())
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    return settings | {"rows of the tasks": data.hexdigest()[:16], "model weights": weights.hexdigest()[:16]}


def read_records(folder: Path) -> dict[tuple[str, int], dict]:
    """All predictions of a folder, whichever process made them; last lines cut short by a kill are left out."""
    records = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                records[record["task"], record["row"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f"{path} line {number} is broken: delete that line, or use --overwrite") from None
    return records


def save_records(folder: Path, records: dict) -> None:
    """One predictions.jsonl in place of every process's file."""
    aside = folder / "tmp-predictions"
    aside.write_text("".join(json.dumps(records[key]) + "\n" for key in sorted(records)), encoding="utf-8")
    aside.replace(folder / "predictions.jsonl")
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


def results_of(rows: list[Row], records: dict, settings: dict, names: list[str]) -> dict:
    tasks = {}
    for task in dict.fromkeys(row.task for row in rows):
        mine = [records[row.task, row.number] for row in rows if row.task == task]
        tasks[task] = {"rows": len(mine), "unended": sum(not r["ended"] for r in mine)}
        for name in names:
            right, count = sum(r[name] for r in mine), len(mine)
            tasks[task][name] = {"score": round(100 * right / count, 2), "correct": right}
            tasks[task][name]["interval"] = wilson(right, count)
        if settings["mode"] == "pot":
            tasks[task]["programs"] = dict(sorted(Counter(r["program"] for r in mine).items()))
    average = {name: round(sum(t[name]["score"] for t in tasks.values()) / len(tasks), 2) for name in names}
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "peft", "math-verify", "sympy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"tasks": tasks, "average": average, "settings": settings, "versions": versions}


def table(results: dict) -> str:
    names = results["average"]
    lines = [f"{'task':<16} {'rows':>6}" + "".join(f" {name:>8} {'95 %':>14}" for name in names)]
    for task, result in results["tasks"].items():
        cells = [(result[name]["score"], "{:.2f}-{:.2f}".format(*result[name]["interval"])) for name in names]
        line = f"{task:<16} {result['rows']:>6}" + "".join(f" {score:>8.2f} {span:>14}" for score, span in cells)
        lines.append(f"{line}  {result.get('programs', '')}")
    return "\n".join([*lines, f"{'average':<16} {'':>6}" + "".join(f" {x:>8.2f} {'':>14}" for x in names.values())])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    rows = [row for name in args.tasks for row in read_task(name, args)]
    if len({(row.task, row.number) for row in rows}) < len(rows):
        raise UserError(f"--tasks {' '.join(args.tasks)} names a task twice: name each once")
    folder, settings = Path(args.output_dir), settings_of(args, rows)
    goes_on = (folder / "settings.json").is_file() and not args.overwrite
    saved = json.loads((folder / "settings.json").read_text()) if goes_on else settings
    for name in (name for name, value in settings.items() if saved.get(name) != value):
        flag, old = name if " " in name else f"--{name}", saved.get(name)
        remedy = "use the same, another --output_dir or --overwrite"
        raise UserError(f"{flag} is {settings[name]}, but {folder} holds a run with {old}: {remedy}")
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # ranks wait for the slowest
    accelerator = Accelerator(kwargs_handlers=[patient])
    doors = open_doors() if args.execute_programs else None
    if args.strict:
        compare([("1 + x", "x + 1")])  # an error had better come now
    if doors:
        accelerator.print(f"warning: on this system programs can reach {', '.join(doors)}")
    model, tokenizer = load(args, accelerator.device)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [] if goes_on else [*folder.glob("predictions*.jsonl"), *folder.glob("results.json")]:
            path.unlink()
        save_records(folder, read_records(folder))
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    accelerator.wait_for_everyone()
    done = read_records(folder)
    accelerator.wait_for_everyone()  # before any process adds records
    rank, ranks = accelerator.process_index, accelerator.num_processes
    waiting = sorted((row for row in rows if (row.task, row.number) not in done), key=lambda row: -len(row.question))
    with tqdm(total=len(waiting[rank::ranks]), desc="rows", disable=not accelerator.is_main_process) as bar:
        Evaluator(args, model, tokenizer, folder / f"predictions-{rank}.jsonl").run(waiting[rank::ranks], bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        records = read_records(folder)
        score(rows, records, args.strict)
        save_records(folder, records)
        results = results_of(rows, records, settings, ["paper", "strict"] if args.strict else ["paper"])
        results |= {"device": accelerator.device.type} | ({} if doors is None else {"programs can reach": doors})
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        print(table(results))
    accelerator.end_training()


def cli(argv: list[str]) -> None:
    """Run, and turn what the user can mend into one line and exit code 2."""
    try:
        main(argv)
    except (UserError, CageError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(
            f"error: {str(error).splitlines()[0][:160]}: lower --max_tokens_per_batch and start again", file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    cli(sys.argv[1:])
