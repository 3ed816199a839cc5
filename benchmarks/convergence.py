"""Where does which selection learn most? Selections x regimes x rates x seeds of train_colm.py's own step.

    python benchmarks/convergence.py --model PATH --train_file rows.jsonl --jobs 8 --output map.json \\
        --cells clean,copies,near_copies:full-64-sqrt,random_keep-sqrt,colm-grad-sqrt:cost:5 copies:colm-grad:steps:2
    python benchmarks/convergence.py --cells clean:random,colm-grad:steps:1 --steps 20    # tiny, offline
    python benchmarks/convergence.py --show map.json more.json
    python benchmarks/plot_convergence.py map.json

A cell is REGIMES:SETTINGS:BUDGETS:SEEDS. Cells come first that are named first. Flags that --help does not list go to
train_colm.py.

* REGIMES are what is wrong with the training rows: clean; copies (60 % of the rows are copies of 500); near_copies and
  far_copies (and 15 % or 50 % of each copy's question is changed); noise (30 % of the answers of each source are
  swapped); few (3,000 rows, several epochs); joined as in copies+noise. Held-out rows are always clean.
* SETTINGS are selections of train_colm.py and of experiments.py. With -sqrt or -tokens a row's loss weighs the root or
  the number of its completion's tokens; with dedup+ copies and near copies are removed before training.
* BUDGETS. `steps`: as many optimizer steps as --steps says. `cost`: as many tokens as that many steps of --coreset_size
  average rows have; a token that is trained on costs 1, a token that is only probed --price. The learning-rate schedule
  spans the budget. 0.42 is the price on Phi-2's shape, 0.25 with gradient checkpointing: a forward pass against
  forward, backward and, there, another forward.
* SEEDS is a number. The first seed makes a run at each of --learning_rates; the rate with the smallest sum of the three
  losses on one half of the held-out questions serves all seeds, and the losses on the other half are reported. Regimes
  spoil the same rows in every seed; pools, adapters and dropout differ.
* --held_out questions are kept for evaluation, with all the rows that ask them: rows ask the same when their letters
  and digits agree once answer options and a closing request for a program are taken off.
* --jobs processes, spread over the visible GPUs, take a run at a time, and each run leaves one JSON in --work. What is
  there, or in a JSON that --known names, is not run again. A failed run is reported, others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
sys.path.insert(1, str(REPO / "benchmarks"))
import experiments  # noqa: E402
from experiments import GRAD, REGIMES, SELECTIONS  # noqa: E402

import colm_data  # noqa: E402
import train_colm  # noqa: E402
from colm_core import small_sources  # noqa: E402
from colm_data import Parser, TokenizedRows, UserError, load_tokenizer, replacing  # noqa: E402
from train_colm import Clock  # noqa: E402

SETTINGS = {  # name: flags of train_colm.py, after those of the command line
    "full-64": "--selection full --pool_size 64 --coreset_size 64",
    "full-128": "--selection full --pool_size 128 --coreset_size 128",
    "random": "--selection random",
    "random_keep": "--selection random_keep",
    "colm-spsa": "--selection colm --probe spsa",
    "colm-spsa-16": "--selection colm --probe spsa --num_directions 16",
    "colm-spsa-64": "--selection colm --probe spsa --num_directions 64",
    "colm-grad": GRAD,
    "colm-grad-96": GRAD + " --pool_size 96",
    "colm-cosine": GRAD + " --similarity cosine",
}
SETTINGS |= {name: flags for name, (_, flags) in SELECTIONS.items()}
BUDGETS = ("steps", "cost")
MEASURES = {
    "mean over sources": "eval_loss_source_mean",
    "per token": "eval_loss_per_token",
    "per example": "eval_loss",
}
TAKEN = {"--seed", "--max_steps", "--num_epochs", "--eval_file", "--output_dir", "--resume", "--config"}
TAKEN |= {"--learning_rate", "--cluster_sources"}  # rates are --learning_rates; the loop below does not re-cluster
PACKAGES = ("torch", "transformers", "accelerate", "peft")


class Cell(NamedTuple):
    """One line of a table."""

    regime: str
    setting: str
    budget: str
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.regime} {self.setting} {self.budget}"


# ------------------------------------------------------------------------------------------------------------- one run


@functools.lru_cache(maxsize=2)
def load_data(path: str) -> dict:
    """Training rows, their marks and both halves of the held-out rows."""
    data = torch.load(path, weights_only=True)
    return data | {part: TokenizedRows(**data[part]) for part in ("train", "tune", "report")}


def load_run(spec: dict) -> train_colm.Run:
    args = train_colm.parse_args(spec["argv"])
    tokenizer, data = load_tokenizer(args), load_data(spec["data"])
    train = replace(data["train"])
    keep = small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    if args.keep_sources != ["auto"]:
        keep = {train.names.index(name) for name in args.keep_sources if name != "none"}
    accelerator = train_colm.make_accelerator(args)
    if accelerator.num_processes > 1:
        raise UserError("convergence.py runs on one device: start it with python")
    model = train_colm.load_model(args, accelerator, tokenizer)
    run = train_colm.build_run(args, accelerator, tokenizer, model, train, data["report"], keep)
    run.memory = {}
    return run


def held_out_losses(run, data: dict) -> dict:
    """The three losses on each half of the held-out rows."""
    losses = {}
    for part in ("tune", "report"):
        run.held_out = data[part]
        record = train_colm.evaluate(run)
        losses[part] = [record[key] for key in MEASURES.values()]
    return losses


def measure(run, spec: dict) -> dict:
    """The trainer's loop until the budget is spent, with records instead of logs and checkpoints."""
    args, data, choose = run.args, load_data(spec["data"]), train_colm.choose_coreset
    if args.pool_size > len(run.train):
        raise UserError(f"--pool_size {args.pool_size} exceeds the {len(run.train)} training rows: lower it")
    if spec["base"] in SELECTIONS:
        choose = SELECTIONS[spec["base"]][0]
    factor_at = run.scheduler.lr_lambdas[0]  # of the learning rate, by the steps done of --max_steps
    step, spent, tokens, probe_tokens, start = 0, 0.0, 0, 0, time.time()
    evals = [{"spent": 0.0, "step": 0} | held_out_losses(run, data)] if spec["eval_start"] else []
    taken: dict[str, list] = {mark: [] for mark in data["marks"]}  # share of marked rows, step by step
    diverged = False
    while spent < spec["amount"] and not diverged:
        for group in run.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor_at(spent / spec["amount"] * args.max_steps)
        pool = train_colm.draw_pool(len(run.train), args.pool_size, args.seed, step)
        choice = choose(run, pool, step, Clock(run.device))
        rows = pool[choice.index]
        loss = train_colm.accumulate_gradients(run, pool, choice, step)
        diverged = train_colm.update(run, choice, loss) is None
        step += 1
        trained = sum(map(run.train.length, rows.tolist()))
        tokens, probe_tokens = tokens + trained, probe_tokens + choice.probe_tokens
        before = spent
        spent += 1 if spec["budget"] == "steps" else trained + spec["price"] * choice.probe_tokens
        open_to_choice = ~experiments.is_small(run, rows)
        for mark, shares in taken.items():
            marked = data["marks"][mark][rows][open_to_choice].float()
            shares.append(marked.mean().item() if len(marked) else None)
        part = spec["amount"] / spec["evaluations"]
        if spent // part > before // part or spent >= spec["amount"]:
            evals.append({"spent": round(spent, 1), "step": step} | held_out_losses(run, data))
    result = {"steps": step, "tokens": tokens, "probe_tokens": probe_tokens, "diverged": diverged, "eval": evals}
    return result | {"taken": taken, "seconds": round(time.time() - start, 1)}


def accuracy(run, spec: dict) -> dict:
    """Scores of the trained adapter by eval_math.py with the flags of --accuracy: {task: [paper, strict]}."""
    import eval_math

    Path(run.args.output_dir).mkdir(parents=True, exist_ok=True)
    model, folder = str(train_colm.save_final(run)), Path(run.args.output_dir) / "scores"
    vars(run).pop("model", None)
    eval_math.main(["--model", model, "--output_dir", str(folder), "--overwrite", *spec["accuracy"].split()])
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    return {task: [found[name]["score"] for name in ("paper", "strict") if name in found] for task, found in tasks.items()}


def worker() -> None:
    """Run the specs that stdin names, one after another; each leaves its JSON. The first to fail ends the process: it
    may leave a device in no state to go on."""
    run = None
    for spec in map(json.loads, sys.stdin):
        try:
            run = None
            gc.unfreeze()  # build_run froze what the last run holds
            gc.collect()
            run = load_run(spec)
            result = measure(run, spec)
            if spec["accuracy"]:
                result["accuracy"] = accuracy(run, spec)
            digest = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in run.trained))
            card = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
            about = {"card": card, "weights": digest.hexdigest()[:16], "code": code_digest()}
            with replacing(Path(spec["output"])) as aside:
                aside.write_text(json.dumps(spec | about | result))
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
            sys.exit(1)
    sys.exit(0)


# ---------------------------------------------------------------------------------------------------------------- data


def sha(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@functools.cache
def code_digest() -> str:
    return sha(*(path.read_bytes() for path in sorted(REPO.glob("*.py"))), Path(experiments.__file__).read_bytes())


@functools.cache
def model_digest(model: str | None) -> str:
    """By content: a folder may be made anew or carried elsewhere."""
    folder = Path(model or "")
    if not model or not folder.is_dir():
        return sha(model)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".json")]
    return sha(*((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files))


def question(row: dict) -> str:
    """What a row asks, in letters and digits: equal for worked and programmed answers to one question."""
    whole = row.get("instruction") or row.get("prompt") or json.dumps(row.get("messages", [])[:-1])
    whole = f"{whole} {row.get('input') or ''}".lower()
    text = re.sub(r"(?:let's|please)[^.?!]*program[^.?!]*[.!]?\s*$", "", whole)
    text = re.split(r"(?:options|answer choices)\s*:", text)[0]
    return re.sub(r"\W+", "", text) or whole


def split(rows: list[dict], held_out: int, seed: int) -> dict[str, list[int]]:
    """Row numbers for training and for both halves of the held-out rows; no question is in two of the parts."""
    questions = sorted({question(row) for row in rows})
    if not 1 < held_out < len(questions):
        raise UserError(f"--held_out {held_out} of {len(questions)} questions: give 2 or more and leave some")
    chosen = random.Random(f"held out {seed}").sample(questions, held_out)
    part_of = dict.fromkeys(chosen[::2], "tune") | dict.fromkeys(chosen[1::2], "report")
    parts: dict[str, list[int]] = {"train": [], "tune": [], "report": []}
    for i, row in enumerate(rows):
        parts[part_of.get(question(row), "train")].append(i)
    return parts


def tokenised(own, args, work: Path) -> Path:
    """The tokenised parts, made once."""
    source = Path(own.train_file).read_bytes() if own.train_file else b"demo"
    tokenizer = load_tokenizer(args)
    how = (len(tokenizer), tokenizer("A 12, b?\n")["input_ids"], args.max_length, args.source_field)
    how += ((REPO / "colm_data.py").read_bytes(),)
    path = work / f"data-{sha(hashlib.sha256(source).hexdigest(), how, own.held_out, own.split_seed)}.pt"
    if path.exists():
        return path
    rows = colm_data.read_rows(own.train_file)[0] if own.train_file else colm_data.demo_rows("train", 10)
    data, names = {}, []
    for name, part in split(rows, own.held_out, own.split_seed).items():
        places, mine = [f"row {i + 1}" for i in part], [rows[i] for i in part]
        data[name] = colm_data.tokenize(mine, places, tokenizer, args, names, sys.stderr.isatty())
        names = data[name].names
    with replacing(path) as aside:
        torch.save({name: vars(part) for name, part in data.items()}, aside)
    return path


@functools.lru_cache(maxsize=1)
def clean_data(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def spoilt(clean: Path, regime: str, dedup: str, max_length: int) -> Path:
    """The tokenised parts with training rows under `regime`, and without their near copies if `dedup`; made once."""
    recipe = sha(clean.stem, regime, dedup, max_length, Path(experiments.__file__).read_bytes())
    path = clean.with_name(f"data-{regime}-{dedup}-{recipe}.pt")
    if path.exists():
        return path
    data = clean_data(clean)
    train, marks = experiments.spoil(TokenizedRows(**data["train"]), regime, 0, max_length)
    if dedup:
        cache = clean.with_name(f"rows-{dedup}-{sha(train.fingerprint())}.json")  # small enough to carry to another machine
        if not cache.exists():
            remove = experiments.without_copies if dedup == "exact" else experiments.without_near_copies
            cache.write_text(json.dumps(remove(train)))
        stays = json.loads(cache.read_text())
        print(f"{regime}: {len(stays)} of {len(train)} rows are left without near copies", flush=True)
        train = experiments.joined(train, [train.example(i) for i in stays], train.sources[stays])
        marks = {name: mark[stays] for name, mark in marks.items()}
    with replacing(path) as aside:
        torch.save(data | {"train": vars(train), "marks": marks}, aside)
    return path


# --------------------------------------------------------------------------------------------------------- many runs


def parse_setting(setting: str) -> tuple[str, str, str]:
    """(name in SETTINGS, are near copies removed?, flags of train_colm.py)."""
    dedup, _, base = setting.rpartition("+")
    if dedup not in ("", "dedup", "exact"):
        raise UserError(f"--cells: {dedup}+ is unknown: choose dedup+ or exact+")
    flags = ""
    for power in ("sqrt", "tokens"):
        if base.endswith(f"-{power}"):
            base, flags = base.removesuffix(f"-{power}"), f" --example_weights {power}"
    if base not in SETTINGS:
        raise UserError(f"--cells: the setting {setting} is unknown: choose from {', '.join(SETTINGS)}")
    return base, dedup, SETTINGS[base] + flags


def parse_cells(texts: list[str]) -> list[Cell]:
    cells = []
    for text in texts:
        fields = text.split(":")
        if len(fields) != 4 or not fields[3].isdecimal() or fields[3] == "0":
            raise UserError(f"--cells {text} is not REGIMES:SETTINGS:BUDGETS:SEEDS, such as clean:random:cost:3")
        regimes, settings, budgets = (field.split(",") for field in fields[:3])
        for regime in regimes:
            if unknown := set(regime.split("+")) - set(REGIMES):
                raise UserError(f"--cells: the regime {unknown.pop()} is unknown: choose from {', '.join(REGIMES)}")
        for budget in budgets:
            if not re.fullmatch(r"steps|cost(@0?\.\d+)?", budget):
                raise UserError(f"--cells: the budget {budget} is unknown: choose from {', '.join(BUDGETS)}")
        for setting in settings:
            parse_setting(setting)
        cells += [Cell(r, s, b, int(fields[3])) for r in regimes for s in settings for b in budgets]
    return list({cell.name: cell for cell in cells}.values())


def make_spec(own, flags: list[str], cell: Cell, rate: float, seed: int, clean: Path) -> dict:
    """Everything that decides a run's result, and where it goes; the same run always gets the same file."""
    base, dedup, more = parse_setting(cell.setting)
    argv = [*flags, *more.split(), *f"--learning_rate {rate} --seed {seed} --max_steps {own.steps}".split()]
    model = ["--model", own.model] if own.model else []
    argv += ["--save_every", "0", *model]
    args = train_colm.parse_args(argv)  # a bad flag is told now
    data = spoilt(clean, cell.regime, dedup, args.max_length)
    spec = {"cell": cell.name, "regime": cell.regime, "setting": cell.setting, "budget": cell.budget}
    spec |= {"rate": rate, "seed": seed, "base": base, "price": float(cell.budget.partition("@")[2] or own.price), "evaluations": own.evaluations}
    spec |= {"eval_start": own.eval_start, "amount": own.steps, "accuracy": own.accuracy}
    if cell.budget != "steps":  # the same for all regimes and settings: tokens of so many clean rows
        sizes = clean_data(clean)["train"]
        coreset = train_colm.parse_args([*flags, *model]).coreset_size
        spec["amount"] = own.steps * coreset * sizes["offsets"][-1] / (len(sizes["offsets"]) - 1)
    name = f"{cell.name.replace(' ', '-')}-{rate}-s{seed}-{sha(spec, argv, model_digest(own.model), data.stem)}"
    work = clean.parent
    argv += ["--output_dir", str(work / "scratch" / name)]
    return spec | {"argv": argv, "data": str(data), "output": str(work / f"{name}.json")}


def final(run: dict, part: str) -> list[float]:
    """The three losses at the end of a run."""
    return [float("inf")] * 3 if run["diverged"] else run["eval"][-1][part]


def best_rate(runs: list[dict], cell: str) -> float:
    """The rate of the cell's first seed with the smallest sum of losses on the half that is not reported."""
    mine = [run for run in runs if run["cell"] == cell and run["seed"] == 1]
    return min(mine, key=lambda run: sum(final(run, "tune")))["rate"]


def next_of(cells: list[Cell], rates: list[float], done: list[dict], begun: set):
    """(cell, rate, seed) of the next run; None if all have begun that can. Further seeds wait for the best rate."""
    for cell in cells:
        tried = [run for run in done if run["cell"] == cell.name and run["seed"] == 1]
        choices = [(rate, 1) for rate in rates]
        if {run["rate"] for run in tried} >= set(rates):
            best = best_rate(tried, cell.name)
            choices += [(best, seed) for seed in range(2, cell.seeds + 1)]
        for rate, seed in choices:
            if (cell.name, rate, seed) not in begun:
                begun.add((cell.name, rate, seed))
                return cell, rate, seed
    return None


def visible_devices() -> list[str]:
    """A CUDA_VISIBLE_DEVICES for each visible GPU; as it is where there is none."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return [name.strip() for name in listed.split(",") if name.strip()] or [listed]


def start_worker(device: str, jobs: int, log: Path) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), "TOKENIZERS_PARALLELISM": "false"}
    env |= {"ACCELERATE_MIXED_PRECISION": "bf16" if torch.cuda.is_available() else "no"} | dict(os.environ)
    env["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, __file__, "--worker"]
    with open(log, "w") as file:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, text=True)


def run_all(cells: list[Cell], own, spec_of, done: list[dict], save, deadline: float) -> list[str]:
    """Run what the cells lack, in --jobs processes over all devices, adding to `done`; returns what failed."""
    begun = {(run["cell"], run["rate"], run["seed"]) for run in done}
    workers, idle, devices, problems = {}, [], visible_devices(), []  # process: its device, log, spec and start

    def next_spec() -> dict | None:
        while time.time() < deadline and (item := next_of(cells, own.learning_rates, done, begun)):
            spec = spec_of(*item)
            if not Path(spec["output"]).exists():
                return spec
            done.append(compact(json.loads(Path(spec["output"]).read_text())))
        return None

    def hand(process, device, log, spec) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that has ended is noticed below
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
        workers[process] = (device, log, spec, time.time())

    def close(process) -> None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # it has nothing more to do
        process.wait()

    try:
        while True:
            while len(workers) < own.jobs and (spec := next_spec()):
                if idle:
                    hand(*idle.pop(), spec)
                    continue
                used = [device for device, *_ in workers.values()]
                device = min(devices, key=used.count)
                log = Path(spec["output"]).with_suffix(".log")
                hand(start_worker(device, own.jobs, log), device, log, spec)
            if not workers:
                break
            time.sleep(0.1)
            for process, (device, log, spec, start) in [*workers.items()]:
                ended, good = process.poll() is not None, Path(spec["output"]).exists()
                if not (ended or good):
                    continue
                del workers[process]
                name = f"{spec['cell']} {spec['rate']} seed {spec['seed']}"
                print(f"{name}: {'done' if good else 'FAILED'}, {time.time() - start:.0f} s", flush=True)
                if good:
                    done.append(compact(json.loads(Path(spec["output"]).read_text())))
                    save()
                else:
                    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                    problems.append(f"{name}: exit code {process.returncode}, {last} (see {log})")
                if ended:
                    close(process)
                else:
                    idle.append((process, device, log))
    finally:
        for process, *_ in idle:
            close(process)
        for process in workers:
            process.terminate()
            process.wait()
    late = sum(1 for _ in iter(lambda: next_of(cells, own.learning_rates, done, begun), None))
    return problems + ([f"{late} or more runs were not started before --stop_after"] if late else [])


# -------------------------------------------------------------------------------------------------------------- tables


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def chosen_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs at the best rate, by cell."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["cell"], []).append(run)
    return {cell: [r for r in group if r["rate"] == best_rate(group, cell)] for cell, group in groups.items()}


def loss_table(title: str, groups: list[list[dict]]) -> str:
    """All three losses of each setting, least sum first."""
    header = ["setting", "rate", "seeds", "steps", "M tokens trained", "probed", *MEASURES]
    lines = [f"**{title}**\n", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    rows = []
    for runs in groups:
        losses = list(zip(*(final(run, "report") for run in runs), strict=True))  # [3][seeds]
        means = [statistics.fmean(run[key] for run in runs) for key in ("steps", "tokens", "probe_tokens")]
        cells = [runs[0]["setting"], f"{runs[0]['rate']:g}", str(len(runs)), f"{means[0]:.0f}"]
        cells += [f"{means[1] / 1e6:.2f}", f"{means[2] / 1e6:.2f}", *map(spread, losses)]
        rows.append((sum(map(statistics.fmean, losses)), cells))
    lines += ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)]
    return "\n".join(lines) + "\n"


def eighths(shares: list[float | None]) -> list[float | None]:
    """Means over eight parts of a run."""
    parts = [shares[len(shares) * i // 8 : len(shares) * (i + 1) // 8] for i in range(8)]
    parts = [[share for share in part if share is not None] for part in parts]
    return [round(statistics.fmean(part), 4) if part else None for part in parts]


def mark_table(title: str, mark: str, groups: list[list[dict]]) -> str:
    """How many marked rows each setting takes of those that are not kept, by eighths of the run."""
    header = ["setting", *(f"{i}/8" for i in range(1, 9))]
    lines = [f"**{title}**\n", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for runs in groups:
        columns = zip(*(run["taken"][mark] for run in runs), strict=True)
        means = ["-" if None in column else f"{statistics.fmean(column):.2f}" for column in columns]
        lines.append(f"| {runs[0]['setting']} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def tables(runs: list[dict]) -> str:
    parts, groups = [], [*chosen_runs(runs).values()]
    for regime, budget in dict.fromkeys((g[0]["regime"], g[0]["budget"]) for g in groups):
        mine = [g for g in groups if (g[0]["regime"], g[0]["budget"]) == (regime, budget)]
        parts.append(loss_table(f"{regime}, equal {budget}", mine))
        for mark in mine[0][0]["taken"]:
            parts.append(mark_table(f"{regime}, equal {budget}: share of {mark} among rows not kept", mark, mine))
    return "\n".join(parts)


def compact(run: dict) -> dict:
    """What tables and figures need of a run; --work keeps all of it."""
    shown = (
        "cell",
        "regime",
        "setting",
        "budget",
        "rate",
        "seed",
        "amount",
        "price",
        "steps",
        "tokens",
        "probe_tokens",
    )
    small = {key: run[key] for key in (*shown, "diverged", "seconds", "card", "code", "weights", "eval")}
    small["accuracy"] = run.get("accuracy", {})
    small["taken"] = {mark: eighths(shares) for mark, shares in run["taken"].items()}
    return json.loads(json.dumps(small), parse_float=lambda number: float(f"{float(number):.6g}"))


# ---------------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("convergence.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder or hub id; without it the trainer's tiny random model")
    add("--train_file", help="rows to train and evaluate on; without it the trainer's generated mixture")
    add("--cells", nargs="+", metavar="REGIMES:SETTINGS:BUDGETS:SEEDS", default=["clean:full-64,random_keep:cost:1"])
    parser.epilog = (
        f"regimes: {', '.join(REGIMES)}, joined by +. settings: {', '.join(SETTINGS)}; all with -sqrt or -tokens "
        f"behind, with dedup+ before. budgets: {', '.join(BUDGETS)}"
    )
    add("--learning_rates", nargs="+", type=float, default=[1e-3, 2e-3, 3e-3])
    add("--steps", type=int, default=240, help="the budget in steps, or in the tokens of so many random coresets")
    add("--price", type=float, default=0.42, help="cost of a probed token, of a trained one's")
    add("--held_out", type=int, default=200, help="questions kept for evaluation")
    add("--split_seed", type=int, default=0)
    add("--evaluations", type=int, default=3, help="per run, evenly over the budget")
    add("--eval_start", action="store_true", help="evaluate before training, too")
    add("--accuracy", default="", help="flags of eval_math.py: score each trained adapter, too")
    add("--jobs", type=int, default=1, help="runs at once; each holds a model of its own in memory")
    add("--stop_after", type=float, default=float("inf"), help="start no run after so many seconds")
    add("--work", default="colm_output/convergence", help="folder of finished runs and tokenised rows")
    add(
        "--known",
        nargs="*",
        default=[],
        metavar="JSON",
        help="outputs of earlier commands, whose runs are not repeated",
    )
    add("--output", default="convergence.json")
    add("--show", nargs="+", metavar="JSON", help="only print the tables of finished commands, in one")
    return parser


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        worker()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs do not outlive this process
    own, flags = build_parser().parse_known_args(argv)
    if own.show:
        runs = [run for path in own.show for run in json.loads(Path(path).read_text())["runs"]]
        print(tables(runs) if runs else "no runs")
        return 0
    for name in ("steps", "jobs", "evaluations", "price"):
        if getattr(own, name) <= 0:
            raise UserError(f"--{name} {getattr(own, name)} is out of range: give a positive number")
    for name in TAKEN.intersection(flags):
        raise UserError(f"{name} is not for train_colm.py here: see --help for the flags that settle it")
    cells, work, deadline = parse_cells(own.cells), Path(own.work), time.time() + own.stop_after
    args = train_colm.parse_args([*flags, *(["--model", own.model] if own.model else [])])
    work.mkdir(parents=True, exist_ok=True)
    clean = tokenised(own, args, work)

    def spec_of(cell: Cell, rate: float, seed: int) -> dict:
        return make_spec(own, flags, cell, rate, seed, clean)

    known = [run for path in own.known for run in json.loads(Path(path).read_text())["runs"]]
    done = [run for run in known if run["cell"] in {cell.name for cell in cells}]
    problems: list[str] = []

    def save() -> dict:
        result = {"command": ["convergence.py", *argv], "versions": {name: version(name) for name in PACKAGES}}
        result |= {"data": clean.stem, "card": sorted({run["card"] for run in done}), "jobs": own.jobs}
        result |= {"settings": {cell.setting: parse_setting(cell.setting)[2] for cell in cells}, "problems": problems}
        with replacing(Path(own.output)) as aside:
            aside.write_text(json.dumps(result | {"runs": done}))
        return result

    problems += run_all(cells, own, spec_of, done, save, deadline)
    result = save()
    print(f"\n{tables(done) if done else 'no runs'}\n{', '.join(result['card'])}, {result['versions']}")
    if len({run["code"] for run in done}) > 1:
        problems.append("these runs were made by different versions of the code")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
