"""Where does which selection learn most? Selections x regimes x rates x seeds of train_colm.py's own step.

    python benchmarks/convergence.py --model PATH --train_file rows.jsonl --jobs 8 --output map.json \\
        --regimes clean copies near_copies --settings full-64-sqrt random_keep-sqrt colm-grad-sqrt --seeds 5
    python benchmarks/convergence.py --steps 20 --settings random colm-grad    # tiny, offline
    python benchmarks/plot_convergence.py map.json

Flags that --help does not list go to train_colm.py.

* --regimes are what is wrong with the training rows: clean; copies (60 % of the rows are copies of 500); near_copies
  and far_copies (and 15 % or 50 % of each copy's question is changed); noise (30 % of the answers of each source are
  swapped); few (3,000 rows, several epochs); joined as in copies+noise. Held-out rows are always clean.
* --settings are selections of train_colm.py. With -sqrt or -tokens a row's loss weighs the root or the number of its
  completion's tokens; with dedup+ copies and near copies are removed before training (--drop_near_copies 0.5),
  with exact+ copies alone (--drop_copies).
* --budget steps: as many optimizer steps as --steps says. cost: as many tokens as that many steps of --coreset_size
  average rows have; a token that is trained on costs 1, a token that is only probed --price. The learning-rate schedule
  spans the budget. 0.42 is the price on Phi-2's shape, 0.25 with gradient checkpointing: a forward pass against
  forward, backward and, there, another forward.
* --seeds is a number. The first seed makes a run at each of --learning_rates; the rate with the smallest sum of the
  three losses on one half of the held-out questions serves all seeds, and the losses on the other half are reported.
  Regimes spoil the same rows in every seed; pools, adapters and dropout differ.
* --held_out questions are kept for evaluation, with all the rows that ask them: rows ask the same when their letters
  and digits agree once answer options and a closing request for a program are taken off.
* --jobs processes are spread over the visible GPUs. --output is written after every run, and runs that it holds are not
  made again: a command that was cut short goes on, and commands add to a file. A run that fails is reported, and the
  others go on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
sys.path.insert(1, str(REPO / "benchmarks"))
import experiments  # noqa: E402
from experiments import REGIMES, REMOVALS  # noqa: E402

import colm_data  # noqa: E402
import eval_math  # noqa: E402
import train_colm  # noqa: E402
from colm_core import small_sources  # noqa: E402
from colm_data import TokenizedRows, UserError  # noqa: E402

SETTINGS = {  # name: flags of train_colm.py, after those of the command line
    "full-64": "--selection full --pool_size 64 --coreset_size 64",
    "full-128": "--selection full --pool_size 128 --coreset_size 128",
    "random": "--selection random",
    "random_keep": "--selection random_keep",
    "colm-spsa": "--selection colm --probe spsa",
    "colm-spsa-16": "--selection colm --probe spsa --num_directions 16",
    "colm-grad": "--selection colm --probe grad",
    "colm-cosine": "--selection colm --probe grad --similarity cosine",
    "fresh_source": "--selection fresh",
    # half of the small sources' rows, 1/3 + 2/3 x 64/256: as many as pools of 128 have
    "fresh_wide": "--selection fresh --pool_size 256 --keep_share 0.3333",
}
PRICE = 0.42  # of a probed token, of a trained one's
EVALUATIONS = 3  # per run, evenly over the budget
MEASURES = {
    "mean over sources": "eval_loss_source_mean",
    "per token": "eval_loss_per_token",
    "per example": "eval_loss",
}
COUNTS = ("steps", "tokens", "probe_tokens")
# What is settled here: rates by --learning_rates, and the loop below does not re-cluster.
TAKEN = {"--seed", "--max_steps", "--num_epochs", "--eval_file", "--output_dir", "--resume", "--config"}
TAKEN |= {"--learning_rate", "--cluster_sources"}


class Cell(NamedTuple):
    """One line of a table."""

    regime: str
    setting: str
    budget: str  # steps, cost, or cost@PRICE where it is not the usual price

    @property
    def name(self) -> str:
        return " ".join(self)


def parse_setting(setting: str) -> tuple[str, str]:
    """(name in REMOVALS or "", flags of train_colm.py)."""
    removal, _, base = setting.rpartition("+")
    flags = ""
    for power in ("sqrt", "tokens"):
        if base.endswith(f"-{power}"):
            base, flags = base.removesuffix(f"-{power}"), f" --example_weights {power}"
    if base not in SETTINGS or removal not in ("", *REMOVALS):
        raise UserError(f"--settings {setting} is unknown: choose from {', '.join(SETTINGS)}")
    return removal, SETTINGS[base] + flags


def cells_of(own) -> list[Cell]:
    """The lines that the flags ask for; those that are named first are run first."""
    for regime in own.regimes:
        if unknown := set(regime.split("+")) - set(REGIMES):
            raise UserError(f"--regimes {unknown.pop()} is unknown: choose from {', '.join(REGIMES)}")
    for setting in own.settings:
        parse_setting(setting)
    budget = own.budget
    if budget == "cost" and own.price != PRICE:
        budget = f"cost@{own.price}"
    return [Cell(regime, setting, budget) for regime in own.regimes for setting in own.settings]


# ---------------------------------------------------------------------------------------------------------------- data


def sha(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def question(row: dict) -> str:
    """What a row asks, in letters and digits: equal for worked and programmed answers to one question."""
    whole = row.get("instruction") or row.get("prompt") or json.dumps(row.get("messages", [])[:-1])
    whole = f"{whole} {row.get('input') or ''}".lower()
    text = re.sub(r"(?:let's|please)[^.?!]*program[^.?!]*[.!]?\s*$", "", whole)
    text = re.split(r"(?:options|answer choices)\s*:", text)[0]
    return re.sub(r"\W+", "", text) or whole


def split(rows: list[dict], held_out: int) -> dict[str, list[int]]:
    """Row numbers for training and for both halves of the held-out rows; no question is in two of the parts."""
    questions = sorted({question(row) for row in rows})
    if not 1 < held_out < len(questions):
        raise UserError(f"--held_out {held_out} of {len(questions)} questions: give 2 or more and leave some")
    chosen = random.Random("held out 0").sample(questions, held_out)
    part_of = dict.fromkeys(chosen[::2], "tune") | dict.fromkeys(chosen[1::2], "report")
    parts: dict[str, list[int]] = {"train": [], "tune": [], "report": []}
    for i, row in enumerate(rows):
        parts[part_of.get(question(row), "train")].append(i)
    return parts


def tokenised(own, args, work: Path) -> Path:
    """The tokenised parts, made once."""
    source = Path(own.train_file).read_bytes() if own.train_file else b"demo"
    tokenizer = colm_data.load_tokenizer(args)
    how = (len(tokenizer), tokenizer("A 12, b?\n")["input_ids"], args.max_length, args.source_field)
    how += ((REPO / "colm_data.py").read_bytes(),)
    path = work / f"data-{sha(hashlib.sha256(source).hexdigest(), how, own.held_out)}.pt"
    if path.exists():
        return path
    rows = colm_data.read_rows(own.train_file)[0] if own.train_file else colm_data.demo_rows("train", 10)
    data, names = {}, []
    for name, part in split(rows, own.held_out).items():
        places, mine = [f"row {i + 1}" for i in part], [rows[i] for i in part]
        data[name] = colm_data.tokenize(mine, places, tokenizer, args, names, sys.stderr.isatty())
        names = data[name].names
    with colm_data.replacing(path) as aside:
        torch.save({name: vars(part) for name, part in data.items()}, aside)
    return path


def spoilt(clean: Path, regime: str, removal: str, max_length: int) -> Path:
    """The tokenised parts with training rows under `regime`, less their copies by `removal`; made once."""
    recipe = sha(clean.stem, max_length, Path(experiments.__file__).read_bytes())
    path = clean.with_name(f"data-{regime}-{removal or 'all'}-{recipe}.pt")
    if path.exists():
        return path
    data = torch.load(clean, weights_only=True)
    train, marks = experiments.spoil(TokenizedRows(**data["train"]), regime, 0, max_length)
    if removal:
        stays = REMOVALS[removal](train)
        print(f"{regime}: {removal} leaves {len(stays)} of {len(train)} rows", flush=True)
        train = experiments.joined(train, [train.example(i) for i in stays], train.sources[stays])
        marks = {name: mark[stays] for name, mark in marks.items()}
    with colm_data.replacing(path) as aside:
        torch.save(data | {"train": vars(train), "marks": marks}, aside)
    return path


@functools.lru_cache(maxsize=2)
def load_data(path: str) -> dict:
    """Training rows, their marks and both halves of the held-out rows."""
    data = torch.load(path, weights_only=True)
    return data | {part: TokenizedRows(**data[part]) for part in ("train", "tune", "report")}


# ------------------------------------------------------------------------------------------------------------- one run


def make_spec(own, flags: list[str], cell: Cell, rate: float, seed: int, clean: Path) -> dict:
    """Everything that decides a run's result."""
    removal, more = parse_setting(cell.setting)
    model = ["--model", own.model] if own.model else []
    argv = [*flags, *more.split(), *model]  # a setting's flags override those of the command line
    argv += ["--learning_rate", str(rate), "--seed", str(seed), "--max_steps", str(own.steps), "--save_every", "0"]
    argv += ["--output_dir", str(clean.parent / f"{cell.name} {rate} {seed}".replace(" ", "-"))]
    args = train_colm.parse_args(argv)  # a bad flag is told now
    spec = {"cell": cell.name, "regime": cell.regime, "setting": cell.setting, "budget": cell.budget}
    spec |= {"rate": rate, "seed": seed, "price": None, "amount": own.steps}
    if own.budget == "cost":  # the same for all regimes and settings: tokens of so many clean rows
        rows = load_data(str(spoilt(clean, "clean", "", args.max_length)))["train"]
        coreset = train_colm.parse_args([*flags, *model]).coreset_size
        spec |= {"price": own.price, "amount": own.steps * coreset * len(rows.ids) / len(rows)}
    data = spoilt(clean, cell.regime, removal, args.max_length)
    return spec | {"argv": argv, "data": str(data), "accuracy_flags": own.accuracy}


def load_run(spec: dict) -> train_colm.Run:
    args = train_colm.parse_args(spec["argv"])
    tokenizer, data = colm_data.load_tokenizer(args), load_data(spec["data"])
    train = replace(data["train"])
    if args.pool_size > len(train):
        raise UserError(f"--pool_size {args.pool_size} exceeds the {len(train)} training rows: lower it")
    keep = small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    if args.keep_sources != ["auto"]:
        keep = {train.names.index(name) for name in args.keep_sources if name != "none"}
    accelerator = train_colm.make_accelerator(args)
    if accelerator.num_processes > 1:
        raise UserError("convergence.py runs on one device: start it with python")
    model = train_colm.load_model(args, accelerator, tokenizer)
    return train_colm.build_run(args, accelerator, tokenizer, model, train, data["report"], keep)


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
    args, data = run.args, load_data(spec["data"])
    # The scheduler counts steps, and nobody knows how many a budget in tokens has: it is asked for the share spent.
    factor_at = run.scheduler.lr_lambdas[0]  # of the learning rate, by the steps done of --max_steps
    step, spent, tokens, probe_tokens, start = 0, 0.0, 0, 0, time.time()
    evals = []
    taken: dict[str, list] = {mark: [] for mark in data["marks"]}  # share of marked rows, step by step
    diverged = False
    while spent < spec["amount"] and not diverged:
        for group in run.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor_at(spent / spec["amount"] * args.max_steps)
        pool = train_colm.draw_pool(len(run.train), args.pool_size, args.seed, step)
        choice = train_colm.choose_coreset(run, pool, step, train_colm.Clock(run.device))
        rows = pool[choice.index]
        loss = train_colm.accumulate_gradients(run, pool, choice, step)
        diverged = train_colm.update(run, pool, choice, loss) is None
        step += 1
        trained = sum(map(run.train.length, rows.tolist()))
        tokens, probe_tokens = tokens + trained, probe_tokens + choice.probe_tokens
        before = spent
        spent += 1 if spec["price"] is None else trained + spec["price"] * choice.probe_tokens
        # Rows of small sources are kept whatever a selection thinks of them: they would only dilute its shares.
        open_to_choice = ~torch.isin(run.train.sources[rows], torch.tensor(sorted(run.keep), dtype=torch.long))
        for mark, shares in taken.items():
            marked = data["marks"][mark][rows][open_to_choice].float()
            shares.append(marked.mean().item() if len(marked) else None)
        part = spec["amount"] / EVALUATIONS  # steps cost different amounts: evaluate at the first one beyond each part
        if spent // part > before // part or spent >= spec["amount"]:
            evals.append({"spent": round(spent, 1), "step": step} | held_out_losses(run, data))
    result = {"steps": step, "tokens": tokens, "probe_tokens": probe_tokens, "diverged": diverged, "eval": evals}
    result |= {"taken": {mark: eighths(shares) for mark, shares in taken.items()}}
    return result | {"seconds": round(time.time() - start, 1)}


def eighths(shares: list[float | None]) -> list[float | None]:
    """Means over eight parts of a run."""
    means = []
    for i in range(8):
        begin, end = len(shares) * i // 8, len(shares) * (i + 1) // 8
        part = [share for share in shares[begin:end] if share is not None]
        means.append(round(statistics.fmean(part), 4) if part else None)
    return means


def accuracy(run, flags: str) -> dict:
    """Scores of the trained adapter by eval_math.py, per cent of each task: strict ones, where they can be had."""
    folder = Path(run.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if run.args.model is None and run.args.lora_r:  # the adapter names OUTPUT/base, which the trainer's own loop writes
        train_colm.demo_model(run.args, run.tokenizer).save_pretrained(folder / "base")
    final = train_colm.save_final(run)
    eval_math.main(["--model", str(final), "--output_dir", str(folder / "scores"), "--overwrite", *flags.split()])
    tasks = json.loads((folder / "scores" / "results.json").read_text())["tasks"]
    return {task: found.get("strict", found["paper"])["score"] for task, found in tasks.items()}


def attempt(spec: dict) -> dict:
    """One run's record, or what went wrong: {"problem": text}."""
    gc.unfreeze()  # build_run froze what the last run of this process held
    gc.collect()
    try:
        run = load_run(spec)
        record = {key: spec[key] for key in ("cell", "regime", "setting", "budget", "rate", "seed", "amount", "price")}
        record |= measure(run, spec)
        record["card"] = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
        if spec["accuracy_flags"]:
            record["accuracy"] = accuracy(run, spec["accuracy_flags"])
    except Exception as error:
        traceback.print_exc()
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    # Six digits are more than seeds agree in, and half the size of the file.
    return json.loads(json.dumps(record), parse_float=lambda number: float(f"{float(number):.6g}"))


# ----------------------------------------------------------------------------------------------------------- many runs


def visible_devices() -> list[str]:
    """A CUDA_VISIBLE_DEVICES for each visible GPU; as it is where there is none."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [str(i) for i in range(torch.cuda.device_count())] or [""]
    listed = os.environ["CUDA_VISIBLE_DEVICES"]
    return [name.strip() for name in listed.split(",") if name.strip()] or [listed]


def start_process(devices, threads: int) -> None:
    """Give a new process its GPU, and end it with its parent: else it would hold the GPU for ever."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    torch.set_num_threads(threads)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def outcomes(specs: list[dict], jobs: int):
    """(spec, record) of each run as it ends, in `jobs` processes over the visible GPUs; one job runs in this one."""
    if jobs == 1:
        for spec in specs:
            yield spec, attempt(spec)
        return
    context, names = multiprocessing.get_context("spawn"), visible_devices()
    devices = context.Queue()
    for i in range(jobs):  # each process takes one name when it starts
        devices.put(names[i % len(names)])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, start_process, (devices, threads))
    try:
        futures = {pool.submit(attempt, spec): spec for spec in specs}
        for future in as_completed(futures):
            error = future.exception()  # a process that was killed takes the pool with it
            yield futures[future], {"problem": repr(error)} if error else future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def final(run: dict, part: str) -> list[float]:
    """The three losses at the end of a run."""
    if run["diverged"]:
        return [float("inf")] * 3
    return run["eval"][-1][part]


def best_rate(runs: list[dict], cell: str) -> float | None:
    """The rate of the cell's first seed with the smallest sum of losses on the half that is not reported."""
    mine = [run for run in runs if run["cell"] == cell and run["seed"] == 1]
    return min(mine, key=lambda run: sum(final(run, "tune")))["rate"] if mine else None


def missing(cells: list[Cell], own, runs: list[dict], first_seeds: bool) -> list[tuple]:
    """(cell, rate, seed) of the runs that are yet to be made: first seeds, or further ones at the best rate."""
    made = {(run["cell"], run["rate"], run["seed"]) for run in runs}
    wanted = []
    for cell in cells:
        if first_seeds:
            wanted += [(cell, rate, 1) for rate in own.learning_rates]
        elif (best := best_rate(runs, cell.name)) is not None:
            wanted += [(cell, best, seed) for seed in range(2, own.seeds + 1)]
    return [(cell, rate, seed) for cell, rate, seed in wanted if (cell.name, rate, seed) not in made]


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


def tables(runs: list[dict]) -> str:
    """All three losses of each setting, least sum first, and scores where there are; a table for each regime."""
    lines, groups = [], list(chosen_runs(runs).values())
    tasks = sorted({task for run in runs for task in run.get("accuracy", {})})
    header = ["setting", "rate", "seeds", "steps", "M tokens trained", "probed", *MEASURES, *tasks]
    for regime, budget in dict.fromkeys((group[0]["regime"], group[0]["budget"]) for group in groups):
        rows = []
        for group in groups:
            first = group[0]
            if (first["regime"], first["budget"]) != (regime, budget):
                continue
            losses = list(zip(*(final(run, "report") for run in group), strict=True))  # [3][seeds]
            steps, tokens, probed = (statistics.fmean(r[key] for r in group) for key in COUNTS)
            cells = [first["setting"], f"{first['rate']:g}", str(len(group)), f"{steps:.0f}"]
            cells += [f"{tokens / 1e6:.2f}", f"{probed / 1e6:.2f}", *map(spread, losses)]
            for task in tasks:
                scores = [run["accuracy"][task] for run in group if task in run.get("accuracy", {})]
                cells.append(spread(scores) if scores else "")
            rows.append((sum(map(statistics.fmean, losses)), cells))
        lines += [f"**{regime}, equal {budget}**", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)]
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = colm_data.Parser("convergence.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder or hub id; without it the trainer's tiny random model")
    add("--train_file", help="rows to train and evaluate on; without it the trainer's generated mixture")
    add("--regimes", nargs="+", default=["clean"], help=f"{', '.join(REGIMES)}; joined by +")
    settings = f"{', '.join(SETTINGS)}; all with -sqrt or -tokens behind, with {'+ or '.join(REMOVALS)}+ before"
    add("--settings", nargs="+", default=["full-64", "random_keep"], help=settings)
    add("--budget", choices=("cost", "steps"), default="cost")
    add("--price", type=float, default=PRICE, help="of a probed token, of a trained one's")
    add("--seeds", type=int, default=1)
    add("--learning_rates", nargs="+", type=float, default=[1e-3, 2e-3, 3e-3])
    add("--steps", type=int, default=240, help="the budget in steps, or in the tokens of so many random coresets")
    add("--held_out", type=int, default=200, help="questions kept for evaluation")
    add("--accuracy", default="", help="flags of eval_math.py in one argument: score each trained adapter, too")
    add("--jobs", type=int, default=1, help="runs at once; each holds a model of its own in memory")
    add("--work", default="colm_output/convergence", help="folder of tokenised rows and of adapters that were scored")
    add("--output", type=Path, default=Path("convergence.json"), help="all runs; those in it are not made again")
    return parser


def open_output(path: Path, settings: dict) -> list[dict]:
    """The runs that `path` holds, which must have been made with the same settings; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is not writable")
        before = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
    except (OSError, ValueError) as error:  # before the first run, which may take an hour
        raise UserError(f"--output {path} can't be used ({error}): name another file") from None
    if before.get("settings") != settings:
        raise UserError(f"--output {path} holds runs with other settings, {before.get('settings')}: name another file")
    return before["runs"]


def main(argv: list[str]) -> int:
    own, flags = build_parser().parse_known_args(argv)
    for name in ("steps", "jobs", "seeds", "price"):
        if getattr(own, name) <= 0:
            raise UserError(f"--{name} {getattr(own, name)} is out of range: give a positive number")
    for name in TAKEN.intersection(flags):
        raise UserError(f"{name} is not for train_colm.py here: see --help for the flags that settle it")
    if own.accuracy:  # a bad flag is told before the first run, not after it
        try:
            eval_math.parse_args(["--model", own.work, *own.accuracy.split()])
        except UserError as error:
            raise UserError(f"--accuracy: {error}") from None
    cells, work = cells_of(own), Path(own.work)
    args = train_colm.parse_args([*flags, *(["--model", own.model] if own.model else [])])
    settings = {"model": own.model, "train_file": own.train_file, "held_out": own.held_out, "steps": own.steps}
    settings |= {"accuracy": own.accuracy, "flags": flags}
    runs, problems = open_output(own.output, settings), []
    work.mkdir(parents=True, exist_ok=True)
    clean = tokenised(own, args, work)
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16" if torch.cuda.is_available() else "no")
    about = {"settings": settings}
    about["versions"] = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    for first_seeds in (True, False):  # the first seed chooses the rate of the others
        todo = missing(cells, own, runs, first_seeds)
        specs = [make_spec(own, flags, cell, rate, seed, clean) for cell, rate, seed in todo]
        for spec, record in outcomes(specs, own.jobs):
            name = f"{spec['cell']} {spec['rate']} seed {spec['seed']}"
            if "problem" in record:
                problems.append(f"{name}: {record['problem']}")
                print(f"{name}: FAILED", flush=True)
                continue
            runs.append(record)
            print(f"{name}: done in {record['seconds']:.0f} s", flush=True)
            with colm_data.replacing(own.output) as aside:
                aside.write_text(json.dumps(about | {"runs": runs}))
    wanted = {cell.name for cell in cells}
    print(f"\n{tables([run for run in runs if run['cell'] in wanted]) or 'no runs'}\n{about['versions']}")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
