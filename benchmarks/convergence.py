"""How well does each selection learn? Settings x seeds of train_colm.py's own step: held-out loss and diagnostics.

    python benchmarks/convergence.py --model PATH --train_file rows.jsonl --seeds 0 1 2 --steps 240 --jobs 4 \\
        --learning_rate 1e-3 --settings full-64 full-256 random random_keep colm-spsa colm-grad --output high_rate.json
    python benchmarks/convergence.py ... --prepare 600 --learning_rate 1e-4 --output low_rate.json
    python benchmarks/convergence.py --settings full-32 random colm-grad --coreset_sizes 32 --steps 20   # tiny, offline
    python benchmarks/convergence.py --show high_rate.json --sort eval_loss_source_mean eval_loss_per_token
    python benchmarks/plot_convergence.py high_rate.json

Flags that --help does not list go to train_colm.py; experiments.py holds selections that are not in it. The second
command first trains PREPARE for 600 steps at --prepare_lr, merges the adapter into the model and compares from there.

* --held_out questions are kept for evaluation, with all the rows that ask them: rows ask the same when their letters
  and digits agree once answer options and a closing request for a program are taken off.
* --jobs processes, spread over the visible GPUs, take a run at a time, and each run leaves one JSON in --work. What is
  there is not run again, so an interrupted command goes on where it stopped; a failed run is reported, others go on.
* A process keeps its model from run to run where it can, and starts each from the seed's own adapters and a new
  optimizer. The loss before training is then evaluated once.
* Seconds are those of training steps: no evaluation, diagnostics or warm-up. With --jobs above 1 runs slow each other
  down; so each setting's step is also timed alone, in 3 rounds of --time_steps over all settings, and seconds are steps
  times their lower quartile (other load on a host only adds to them). Without that (--time_steps 0), tables have no
  seconds. --time_flags go to the timing alone: what they change is the time of a step and not, but for rounding, what
  it computes, as with --compile and --gradient_checkpointing. To time on a quiet machine, run once with `--seeds` and
  no number, and give that JSON to commands with the same flags as --times. The learning-rate schedule spans --steps;
  with --seconds T, the steps that a setting makes in T.

Every --match_every steps, with dropout off and over all trained parameters:

* matching error ||g_S - g_P|| / ||g_P||: the coreset's gradient, as weighted in training, against the pool's; beside
  its mean over --random_coresets random coresets of the same size, and over as many of the same structure (small
  sources whole, the rest random). The scale of a gradient hardly matters to Adam, so the cosine is recorded too.
* signal-to-noise of the pool's gradient: the N examples in B random blocks of equal size (B = 8, or the largest smaller
  divisor of N) have mean gradients g_b with mean g_P. noise = sum_b ||g_b - g_P||^2 / (B (B - 1)) is an unbiased
  estimate of E||g_P - E g_P||^2, and signal = ||g_P||^2 - noise one of ||E g_P||^2; it can be negative. Over several
  pools the ratio of the sums is given. A random K of N lie at an expected squared distance of noise (N / K - 1).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import hashlib
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
sys.path.insert(1, str(REPO / "benchmarks"))
import experiments  # noqa: E402
from experiments import EXPERIMENTS  # noqa: E402

import train_colm  # noqa: E402
from colm_core import AdamMoments, example_losses, small_sources  # noqa: E402
from train_colm import Clock, TokenizedRows, UserError, generator_of  # noqa: E402

SETTINGS = {  # name: flags of train_colm.py, after those of the command line
    "full-32": "--selection full --pool_size 32",
    "full-64": "--selection full --pool_size 64",
    "full-128": "--selection full --pool_size 128",
    "full-256": "--selection full --pool_size 256",
    "random": "--selection random",
    "random_keep": "--selection random_keep",
    "random_half": "--selection random_keep --keep_share 0.5",
    "colm-spsa": "--selection colm --probe spsa",
    "colm-spsa-16": "--selection colm --probe spsa --num_directions 16",
    "colm-spsa-run": "--selection colm --probe spsa --direction run",
    "colm-spsa-16-run": "--selection colm --probe spsa --num_directions 16 --direction run",
    "colm-grad": "--selection colm --probe grad",
    "colm-grad-half": "--selection colm --probe grad --keep_share 0.5",
}
SETTINGS |= {name: "--selection colm --probe grad" for name in EXPERIMENTS}
for power in ("sqrt", "tokens"):  # full-64-sqrt: as full-64, with --example_weights sqrt
    SETTINGS |= {f"{k}-{power}": f"{v} --example_weights {power}" for k, v in [*SETTINGS.items()] if k[-4:] != "sqrt"}
PACKAGES = ("torch", "transformers", "accelerate", "peft")
PREPARE = "full-256"
TIME_ROUNDS = 3
MEASURES = {"mean over sources": "eval_loss_source_mean", "per token": "eval_loss_per_token"}
MEASURES |= {"per example": "eval_loss", "small sources": "small_sources"}
TAKEN = {
    "--coreset_size",
    "--seed",
    "--max_steps",
    "--num_epochs",
    "--eval_file",
    "--output_dir",
    "--resume",
    "--config",
}
TAKEN |= {"--cluster_sources"}  # the loop below does not re-cluster
COSTS = {  # of a run's records: name in a table, scale, decimals
    "tokens": ("M tokens trained", 1e6, 2),
    "completion_tokens": ("M completion tokens", 1e6, 2),
    "probe_tokens": ("M tokens probed", 1e6, 2),
    "step": ("steps", 1, 0),
    "seconds": ("seconds", 1, 1),
}
COLUMNS = [*MEASURES.values(), *COSTS]


# --------------------------------------------------------------------------------------------------------- diagnostics


def gradient(run, rows, weights=None) -> torch.Tensor:
    """Gradient of the weighted mean loss of dataset `rows` over all trained parameters, flat float32. Dropout is off;
    no .grad and no random state is touched."""
    weights = torch.ones(len(rows)) if weights is None else weights.float().cpu()
    share, total = weights / weights.sum(), 0
    run.mode(training=False)
    for items, batch, _ in run.micro_batches(run.train, rows.tolist(), run.args.max_tokens_per_micro_batch):
        with run.accelerator.autocast():
            losses = example_losses(run.inner, run.hook, batch)[0]
        loss = (losses * share[items].to(run.device)).sum()
        parts = torch.autograd.grad(loss, run.trained, allow_unused=True, materialize_grads=True)
        total = total + torch.cat([part.flatten().float() for part in parts])
    return total


def matching(run, pool, choice, weights, step, repeats) -> dict:
    """Signal-to-noise of the pool's gradient and the coreset's matching error, as the file's docstring defines them."""
    n, k, generator = len(pool), len(choice.index), generator_of(run.args.seed, "diagnostics", step)
    blocks = next((b for b in range(8, 1, -1) if n % b == 0), 1)
    parts = torch.stack([gradient(run, pool[b]) for b in torch.randperm(n, generator=generator).chunk(blocks)])
    whole = parts.mean(0)
    noise = ((parts - whole).square().sum() / (blocks * (blocks - 1))).item() if blocks > 1 else math.nan
    norm = whole.norm().item()
    record = {"step": step, "pool_norm": norm, "noise": noise, "signal": norm**2 - noise}
    if k == n:
        return record

    def compare(positions, weights=None) -> list[float]:
        g = gradient(run, pool[positions], weights)
        return [(g - whole).norm().item() / norm, torch.cosine_similarity(g, whole, dim=0).item()]

    is_small = torch.isin(run.train.sources[pool], torch.tensor(sorted(run.keep), dtype=torch.long))
    draws = [torch.randperm(n, generator=generator) for _ in range(repeats)]
    structured = [draw[is_small[draw].sort(descending=True, stable=True).indices] for draw in draws]
    record["error"], record["cosine"] = compare(choice.index, weights)
    for name, orders in {"random": draws, "structure": structured}.items():
        values = torch.tensor([compare(order[:k]) for order in orders], dtype=torch.float64)
        record[f"{name}_error"], record[f"{name}_cosine"] = values.mean(0).tolist()
    return record


# ------------------------------------------------------------------------------------------------------------- one run


def load_run(spec: dict) -> train_colm.Run:
    args = train_colm.parse_args(spec["argv"])
    tokenizer = train_colm.load_tokenizer(args)
    data = torch.load(spec["data"], weights_only=True)
    train, held_out = (TokenizedRows(**data[part]) for part in ("train", "held_out"))
    keep = small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    if args.keep_sources != ["auto"]:
        keep = {train.names.index(name) for name in args.keep_sources if name != "none"}
    accelerator = train_colm.make_accelerator(args)
    if accelerator.num_processes > 1:
        raise UserError("convergence.py runs on one device: start it with python")
    model = train_colm.load_model(args, accelerator, tokenizer)
    run = train_colm.build_run(args, accelerator, tokenizer, model, train, held_out, keep)
    optimizer, scheduler = run.optimizer.state_dict(), run.scheduler.state_dict()
    run.start = {"weights": [p.detach().cpu().clone() for p in run.trained]}
    run.start |= {"optimizer": optimizer, "scheduler": copy.deepcopy(scheduler)}
    run.memory = {}
    return run


IN_A_STEP = {"selection", "probe", "num_directions", "direction", "pool_size", "coreset_size", "output_dir"}
IN_A_STEP |= {"keep_share", "example_weights"}


def restarted(run, spec: dict):
    """The last run from its start under another selection, if only a step's own flags differ; else None."""
    args = train_colm.parse_args(spec["argv"])
    args.packing = run.args.packing if run and args.packing is None else args.packing
    if run is None or any(vars(run.args)[k] != v for k, v in vars(args).items() if k not in IN_A_STEP):
        return None
    run.args, run.memory, run.moments = args, {}, AdamMoments(run.moments.betas)
    with torch.no_grad():
        for p, value in zip(run.trained, run.start["weights"], strict=True):
            p.copy_(value)
    run.optimizer.zero_grad(set_to_none=True)
    run.optimizer.load_state_dict(run.start["optimizer"])
    run.scheduler.load_state_dict(copy.deepcopy(run.start["scheduler"]))
    return run


def held_out_loss(run) -> dict:
    record = train_colm.evaluate(run)
    small = small_sources(dict(enumerate(torch.bincount(run.train.sources).tolist())))  # whether kept or not
    small = [record["eval_loss_of"].get(run.train.names[q]) for q in sorted(small)]
    small = [loss for loss in small if loss is not None]
    return record | {"small_sources": statistics.fmean(small) if small else None}


def warm_up(run, spec: dict, choose) -> None:
    """A few steps without an update, so that compiling and choosing kernels are in no one's seconds."""
    for step in range(spec["warm_steps"]):
        pool = train_colm.draw_pool(len(run.train), run.args.pool_size, run.args.seed, step)
        choice = choose(run, pool, step, Clock(run.device))
        train_colm.train_on(run, getattr(choice, "pool", pool)[choice.index], choice.weight, step)
        run.optimizer.zero_grad(set_to_none=True)
    run.memory = {}


def measure(run, spec: dict) -> dict:
    """The trainer's loop, with records instead of logs and checkpoints."""
    args = run.args
    if args.pool_size > len(run.train):
        raise UserError(f"--pool_size {args.pool_size} exceeds the {len(run.train)} training rows: lower it")
    choose = EXPERIMENTS.get(unweighted(spec["setting"]), train_colm.choose_coreset)
    warm_up(run, spec, choose)
    totals = {"seconds": 0.0, "tokens": 0, "completion_tokens": 0, "probe_tokens": 0}
    result = {name: [] for name in ("eval", "match", "loss", "step_s", "kept", "small", "selected")} | {"peak_gb": 0.0}
    small = torch.tensor(sorted(run.keep), dtype=torch.long)
    if spec["eval_every"]:
        run.start["held_out"] = run.start.get("held_out") or held_out_loss(run)
        result["eval"].append({"step": 0} | totals | run.start["held_out"])
    for step in range(args.max_steps):
        clock, aside = Clock(run.device), 0.0
        pool = train_colm.draw_pool(len(run.train), args.pool_size, args.seed, step)
        choice = choose(run, pool, step, clock)
        pool = getattr(choice, "pool", pool)
        rows, weights = pool[choice.index], choice.weight
        clock.mark("select")
        if spec["match_every"] and step % spec["match_every"] == 0:
            diagnosis = Clock(run.device)
            result["match"].append(matching(run, pool, choice, weights, step, spec["random_coresets"]))
            diagnosis.mark("match")
            aside = diagnosis.read()["step_s"]
        loss = train_colm.train_on(run, rows, weights, step)
        if train_colm.update(run, choice, loss) is None:
            raise UserError(f"the loss {loss.item()} or its gradient at step {step + 1} is not finite")
        run.scheduler.step()
        clock.mark("train")
        record = clock.read()
        totals["seconds"] += record["step_s"] - aside
        totals["tokens"] += sum(map(run.train.length, rows.tolist()))
        totals["completion_tokens"] += int(run.train.completion_tokens(rows).sum())
        totals["probe_tokens"] += choice.probe_tokens
        result["peak_gb"] = max(result["peak_gb"], 0.0 if aside else record["peak_gb"])
        values = {"loss": loss.item(), "step_s": record["step_s"] - aside, "kept": len(choice.kept)}
        values |= {"small": int(torch.isin(run.train.sources[rows], small).sum()), "selected": len(rows)}
        for name, value in values.items():
            result[name].append(round(value, 6))
        done = step + 1
        if spec["eval_every"] and (done % spec["eval_every"] == 0 or done == args.max_steps):
            result["eval"].append({"step": done} | totals | held_out_loss(run))
    return result


def merge(run, folder: Path) -> None:
    """The trained model as an ordinary folder: the adapter merged in float32, saved in the base's own precision."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    final = train_colm.save_final(run)
    with train_colm.replacing(folder) as aside:
        if run.args.lora_r:
            base = run.accelerator.unwrap_model(run.model).peft_config["default"].base_model_name_or_path
            own = AutoConfig.from_pretrained(base).dtype or torch.float32
            base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            PeftModel.from_pretrained(base, final).merge_and_unload().to(own).save_pretrained(aside)
        else:
            run.accelerator.unwrap_model(run.model).save_pretrained(aside)
        run.tokenizer.save_pretrained(aside)


def worker() -> None:
    """Run the specs that stdin names, one after another; each leaves its JSON. The first to fail ends the process: it
    may leave a device in no state to go on."""
    run, code = None, code_digest()
    for spec in map(json.loads, sys.stdin):
        try:
            if restarted(run, spec) is None:
                run = None
                gc.unfreeze()  # build_run froze what the last run holds
                gc.collect()
                run = load_run(spec)
            result = measure(run, spec)
            digest = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in run.trained))
            if spec["merge_into"]:
                merge(run, Path(spec["merge_into"]))
            card = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
            about = {"card": card, "weights": digest.hexdigest()[:16], "code": code}
            with train_colm.replacing(Path(spec["output"])) as aside:
                aside.write_text(json.dumps(spec | about | result))
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
            sys.exit(1)
    sys.exit(0)


# ---------------------------------------------------------------------------------------------------- data and plan


def unweighted(setting: str) -> str:
    return setting.removesuffix("-sqrt").removesuffix("-tokens")


def sha(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def code_digest() -> str:
    return sha(*((REPO / name).read_bytes() for name in ("train_colm.py", "colm_core.py")))


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


def split(rows: list[dict], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and evaluation; no question is in both."""
    questions = sorted({question(row) for row in rows})
    if not 0 < held_out < len(questions):
        raise UserError(f"--held_out {held_out} of {len(questions)} questions: give a number between")
    chosen = set(random.Random(f"held out {seed}").sample(questions, held_out))
    parts: tuple[list, list] = ([], [])
    for i, row in enumerate(rows):
        parts[question(row) in chosen].append(i)
    return parts


def cached_data(own, args, work: Path) -> tuple[Path, dict]:
    """The tokenised split, made once, and a description of it."""
    source = Path(own.train_file).read_bytes() if own.train_file else b"demo"
    tokenizer = train_colm.load_tokenizer(args)
    how = (len(tokenizer), tokenizer("A 12, b?\n")["input_ids"], args.max_length, args.source_field)
    path = work / f"data-{sha(hashlib.sha256(source).hexdigest(), how, own.held_out, own.split_seed)}.pt"
    if not path.exists():
        rows = train_colm.read_rows(own.train_file)[0] if own.train_file else train_colm.demo_rows("train", 10)
        data, names = {}, []
        for name, part in zip(("train", "held_out"), split(rows, own.held_out, own.split_seed), strict=True):
            places = [f"row {i + 1}" for i in part]
            mine, show = [rows[i] for i in part], sys.stderr.isatty()
            data[name] = train_colm.tokenize(mine, places, tokenizer, args, names, show)
            names = data[name].names
        with train_colm.replacing(path) as aside:
            torch.save({name: vars(part) for name, part in data.items()}, aside)
    data = torch.load(path, weights_only=True)
    about = {"held_out_questions": own.held_out, "split_seed": own.split_seed, "digest": path.stem}
    return path, about | {f"{name}_rows": len(part["prompts"]) for name, part in data.items()}


def make_spec(own, model, flags, setting, k, seed, steps, data: Path, work: Path, **more) -> dict:
    """Everything that decides a run's result, and where it goes; the same run always gets the same file."""
    mine = SETTINGS[setting].split()
    size = k or int(mine[mine.index("--pool_size") + 1])
    argv = [*flags, *mine, *f"--coreset_size {size} --seed {seed} --max_steps {steps} --save_every 0".split()]
    spec = {"kind": "run", "setting": setting, "label": f"{setting}@{k}" if k else setting, "seed": seed}
    spec |= {"coreset_size": size, "eval_every": own.eval_every, "match_every": own.match_every}
    spec |= {"random_coresets": own.random_coresets, "warm_steps": own.warm_steps, "merge_into": None} | more
    source = Path(experiments.__file__).read_text() if unweighted(setting) in EXPERIMENTS else ""
    spec["digest"] = sha(spec, argv, model_digest(model), data.stem, source)
    name = f"{spec['kind']}-{spec['label']}-s{seed}-{spec['digest']}"
    argv += ["--output_dir", str(work / "scratch" / name), *(["--model", model] if model else [])]
    train_colm.parse_args(argv)  # a bad flag is told now
    return spec | {"argv": argv, "data": str(data), "output": str(work / f"{name}.json")}


# --------------------------------------------------------------------------------------------------------- many runs


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


def run_all(specs: list[dict], jobs: int, deadline: float) -> list[str]:
    """Run the specs whose results are missing, in `jobs` processes over all devices; returns what failed."""
    waiting = [spec for spec in specs if not Path(spec["output"]).exists()]
    workers, devices, problems = {}, visible_devices(), []  # process: its device, log, spec and when that began
    print(f"{len(waiting)} runs to do", flush=True)

    def hand(process, device, log, spec) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that has ended is noticed below
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
        workers[process] = (device, log, spec, time.time())

    try:
        while workers or (waiting and time.time() < deadline):
            while waiting and len(workers) < jobs and time.time() < deadline:
                used = [device for device, *_ in workers.values()]
                device, spec = min(devices, key=used.count), waiting.pop(0)
                log = Path(spec["output"]).with_suffix(".log")
                hand(start_worker(device, jobs, log), device, log, spec)
            time.sleep(0.1)
            for process, (device, log, spec, start) in [*workers.items()]:
                ended, good = process.poll() is not None, Path(spec["output"]).exists()
                if not (ended or good):
                    continue
                name = f"{spec['label']} seed {spec['seed']}"
                print(f"{name}: {'done' if good else 'FAILED'}, {time.time() - start:.0f} s", flush=True)
                if not good:
                    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                    problems.append(f"{name}: exit code {process.returncode}, {last} (see {log})")
                if good and not ended and waiting and time.time() < deadline:
                    hand(process, device, log, waiting.pop(0))
                else:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()  # it has nothing more to do
                    process.wait()
                    del workers[process]
    finally:
        for process in workers:
            process.terminate()
            process.wait()
    return problems + [f"{s['label']} seed {s['seed']}: not started before --stop_after" for s in waiting]


def read_runs(specs: list[dict]) -> list[dict]:
    return [json.loads(Path(s["output"]).read_text()) for s in specs if Path(s["output"]).exists()]


# -------------------------------------------------------------------------------------------------------------- tables


def at(run: dict, key: str, axis: str, where: float) -> float | None:
    """The curve `key` at `where` on `axis` (step or seconds), linear between evaluations."""
    points = [(r[axis], r[key]) for r in run["eval"] if r.get(key) is not None]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= where <= x1:
            return y0 + (y1 - y0) * (where - x0) / (x1 - x0 or 1)
    return points[-1][1] if points and where >= points[-1][0] else None


def spread(values: list[float | None], digits=3) -> str:
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def markdown(title: str, header: list[str], rows: list[list]) -> str:
    lines = [f"**{title}**\n", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def mean(values: list[float | None], digits: int) -> str:
    values = [v for v in values if v is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "-"


def loss_table(groups: dict[str, list[dict]], axis: str, where: float, sort: list[str], timed: bool) -> str:
    """Loss of every setting at one step or second, and which share it closes of the gap between full batches; by the
    sum of the measures `sort`, best first. The costs stand in the table at equal steps."""
    shown = COSTS if axis == "step" else ["step"]
    costs = {key: COSTS[key] for key in shown if timed or key != "seconds"}
    values = {label: {k: [at(r, k, axis, where) for r in runs] for k in COLUMNS} for label, runs in groups.items()}
    full = sorted((label for label in groups if re.fullmatch(r"full-\d+", label)), key=lambda label: int(label[5:]))
    gaps = {}
    for key in MEASURES.values() if len(full) > 1 else ():
        low, high = values[full[0]][key], values[full[-1]][key]
        if None not in low + high:
            noise = math.hypot(*(statistics.stdev(x) for x in (low, high))) if min(len(low), len(high)) > 1 else 0
            gaps[key] = (statistics.fmean(low), statistics.fmean(low) - statistics.fmean(high), noise)
    first = [run["eval"][0] for runs in groups.values() for run in runs]
    before = [spread([r[key] for r in first]) for key in MEASURES.values()]
    extra = ["small rows", "peak GB"] if axis == "step" else []
    empty = [""] * (len(costs) + len(extra))
    rows = [["before training", "", *before, *empty]]

    def rank(item):
        return sum(math.inf if None in item[1][key] else statistics.fmean(item[1][key]) for key in sort)

    for label, of in sorted(values.items(), key=rank):
        cells = [spread(of[key]) for key in MEASURES.values()]
        for i, key in enumerate(MEASURES.values()):
            start, gap, noise = gaps.get(key, (0, 0, 0))
            if gap > 2 * noise and cells[i] != "-":
                cells[i] += f" ({(start - statistics.fmean(of[key])) / gap:.0%})"
        cost = [mean([v and v / scale for v in of[key]], digits) for key, (_, scale, digits) in costs.items()]
        small = [statistics.fmean(run["small"]) for run in groups[label] if run.get("small")]
        more = [mean(small, 1), f"{max(run['peak_gb'] for run in groups[label]):.1f}"]
        rows.append([label, len(groups[label]), *cells, *cost, *more[: len(extra)]])
    if gaps:
        cells = [gaps.get(key) for key in MEASURES.values()]
        cells = [f"{c[1]:.3f}" + (f" ± {c[2]:.3f}" if c[2] else "") if c else "-" for c in cells]
        rows.append([f"gap {full[0]} to {full[-1]}", "", *cells, *empty])
    header = ["setting", "seeds", *MEASURES, *(name for name, *_ in costs.values()), *extra]
    title = f"Held-out loss after {where:.1f} seconds" if axis == "seconds" else f"Held-out loss after {where} steps"
    return markdown(f"{title} (share of the gap closed, where it exceeds twice the spread)", header, rows)


def match_table(groups: dict[str, list[dict]]) -> str:
    rows = []
    for label, runs in groups.items():
        records = [record for run in runs for record in run["match"]]
        if not records:
            continue
        names = ("error", "random_error", "structure_error", "cosine", "random_cosine", "structure_cosine")
        means = [[r[name] for r in records if name in r] for name in names]
        noise = sum(r["noise"] for r in records)
        cells = [f"{statistics.fmean(values):.3f}" if values else "-" for values in means]
        rows.append([label, len(records), *cells, f"{sum(r['signal'] for r in records) / noise:.2f}" if noise else "-"])
    header = ["setting", "pools", "matching error", "random", "same structure", "cosine", "random", "same structure"]
    return markdown("Gradients of coreset and pool", [*header, "signal-to-noise"], rows) if rows else ""


def compact(run: dict) -> dict:
    """What tables and figures need of a run; --work keeps all of it."""
    shown = ("label", "seed", "coreset_size", "card", "code", "weights", "peak_gb", "eval", "match")
    small = [statistics.fmean(run["small"])] if run["small"] else []
    text = json.dumps({key: run[key] for key in shown} | {"small": small})
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))


def tables(runs: list[dict], axes=("step", "seconds"), sort=()) -> str:
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    end = min if "step" in axes else max  # after --seconds T every run ends less than a step before T
    ends = {axis: end(run["eval"][-1][axis] for run in runs) for axis in axes}
    parts = [loss_table(groups, axis, end, sort, "seconds" in axes) for axis, end in ends.items()]
    return "\n".join(filter(None, [*parts, match_table(groups)]))


# ---------------------------------------------------------------------------------------------------------------- main


def cells_of(own) -> dict[str, tuple]:
    """Label: (setting, coreset size, or None where the setting has it)."""
    sizes = {name: [None] if name.startswith("full-") else own.coreset_sizes for name in own.settings}
    return {f"{name}@{k}" if k else name: (name, k) for name in own.settings for k in sizes[name]}


def read_times(own) -> dict:
    """The JSON that --times names, if it has a step time of every setting."""
    try:
        whole = json.loads(Path(own.times).read_text())
        times = {key: whole[key] for key in ("step_s_alone", "timed_on", "code")}
        missing = [label for label in cells_of(own) if label not in times["step_s_alone"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--times {own.times} ({problem}): give a JSON of this script that has step times") from None
    if missing:
        raise UserError(f"--times {own.times} lacks {', '.join(missing)}: time them, or leave them out")
    return times


def build_parser() -> argparse.ArgumentParser:
    parser = train_colm.Parser("convergence.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder or hub id; without it the trainer's tiny random model")
    add("--train_file", help="rows to train and evaluate on; without it the trainer's generated mixture")
    basic = ", ".join(name for name in SETTINGS if unweighted(name) == name not in EXPERIMENTS)
    add("--settings", nargs="+", metavar="NAME", default=["full-64", "full-128", "random", "random_keep"])
    parser.epilog = (
        f"settings: {basic}, those of experiments.py, such as norms, keep+sumnorms, and all with -sqrt or -tokens"
    )
    add("--coreset_sizes", nargs="+", type=int, default=[64])
    add("--seeds", nargs="*", type=int, default=[0], help="none: time steps alone")
    add("--steps", type=int, default=240)
    add("--seconds", type=float, help="instead of --steps: as many steps as each setting makes in this time, alone")
    add("--held_out", type=int, default=200, help="questions kept for evaluation")
    add("--split_seed", type=int, default=0)
    add("--eval_every", type=int, default=40)
    add("--match_every", type=int, default=0, help="steps between matching errors, 0: none")
    add("--random_coresets", type=int, default=4, help="R, random coresets that a matching error is compared with")
    add("--prepare", type=int, default=0, help=f"first fine-tune the model for so many steps of {PREPARE}")
    add("--prepare_lr", type=float, default=1e-3)
    add("--jobs", type=int, default=1, help="runs at once; each holds a model of its own in memory")
    add("--time_steps", type=int, default=12, help="steps in each of the 3 rounds that time settings alone")
    add("--time_flags", default="", help='flags of train_colm.py for that timing alone, such as "--compile"')
    add("--times", help="JSON of an earlier command, whose step times to take: weights do not change them")
    add("--warm_steps", type=int, default=3, help="steps before a run that only warm it up")
    add("--stop_after", type=float, default=math.inf, help="start no run after so many seconds")
    add("--work", default="colm_output/convergence", help="folder of finished runs and tokenised rows")
    add("--output", default="convergence.json")
    add("--sort", nargs="+", choices=MEASURES.values(), default=[], help="sort tables by the sum of these measures")
    add("--show", nargs="+", metavar="JSON", help="only print the tables of finished commands, in one")
    return parser


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        worker()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs do not outlive this process
    own, flags = build_parser().parse_known_args(argv)
    for name in ("steps", "eval_every", "jobs", "random_coresets"):
        if getattr(own, name) < 1:
            raise UserError(f"--{name} {getattr(own, name)} is out of range: give 1 or more")
    if own.show:
        results = [json.loads(Path(path).read_text()) for path in own.show]
        axes = set.intersection(*(set(result["axes"]) for result in results))
        runs = [run for result in results for run in result["runs"]]
        print(tables(runs, sorted(axes, reverse=True), own.sort) if runs else "no runs")
        return 0
    for name in own.settings:
        if name not in SETTINGS:
            raise UserError(f"--settings {name} is unknown: --help tells which there are")
    for name in TAKEN.intersection(flags):
        raise UserError(f"{name} is not for train_colm.py here: see --help for the flags that settle it")
    if not own.seeds and (own.times or not own.time_steps):
        raise UserError("--seeds without a number times the settings: leave out --times, and --time_steps 0")
    times = read_times(own) if own.times else None
    work, deadline = Path(own.work), time.time() + own.stop_after
    work.mkdir(parents=True, exist_ok=True)
    model = own.model
    args = train_colm.parse_args([*flags, "--coreset_size", "1", *(["--model", model] if model else [])])
    data, about_data = cached_data(own, args, work)
    print(f"{about_data['train_rows']} rows to train on, {about_data['held_out_rows']} held out", flush=True)
    build = functools.partial(make_spec, own, data=data, work=work)

    preparation = None
    if own.prepare:
        more = {"kind": "prepare", "match_every": 0, "random_coresets": 0, "eval_every": max(1, own.prepare // 4)}
        faster = [*flags, "--learning_rate", str(own.prepare_lr)]
        spec = build(model, faster, PREPARE, None, 1000, own.prepare, **more)
        model = spec["merge_into"] = str(work / f"prepared-{spec['digest']}")
        if not Path(model).exists():
            Path(spec["output"]).unlink(missing_ok=True)
        if problems := run_all([spec], 1, deadline):
            raise UserError(f"preparation failed: {problems[0]}")
        preparation = compact(read_runs([spec])[0])
        print(f"prepared {model}: held-out loss {preparation['eval'][-1]['eval_loss']:.3f}", flush=True)

    cells, step_s, timed_on, code, problems = cells_of(own), {}, [], set(), []
    if times:
        step_s, timed_on, code = times["step_s_alone"], times["timed_on"], {*times["code"]}
    elif own.time_steps and (own.jobs > 1 or own.seconds or not own.seeds):
        more = {"kind": "time", "eval_every": 0, "match_every": 0}
        fast = functools.partial(build, model, [*flags, *own.time_flags.split()], seed=0, steps=own.time_steps, **more)
        rounds = range(TIME_ROUNDS)  # of all settings in turn, for a host's own speed drifts
        timed = [fast(setting=name, k=k, round=i) for i in rounds for name, k in cells.values()]
        problems += run_all(timed, 1, deadline)
        for run in read_runs(timed):
            step_s.setdefault(run["label"], []).extend(run["step_s"])
        step_s = {label: sorted(seconds)[len(seconds) // 4] for label, seconds in step_s.items()}
        timed_on = sorted({run["card"] for run in read_runs(timed)})
        code = {run["code"] for run in read_runs(timed)}
    specs = []
    for seed in own.seeds:
        for label, (name, k) in cells.items():
            steps = own.steps
            if own.seconds and label not in step_s:
                continue
            steps = max(1, int(own.seconds / step_s[label])) if own.seconds else own.steps
            specs.append(build(model, flags, name, k, seed, steps))
    problems += run_all(specs, own.jobs, deadline)
    runs = read_runs(specs)
    for run in runs:
        for record in run["eval"] if run["label"] in step_s else ():
            record |= {"seconds_in_run": record["seconds"], "seconds": record["step"] * step_s[run["label"]]}
    result = {"command": ["convergence.py", *argv], "versions": {name: version(name) for name in PACKAGES}}
    result |= {"data": about_data, "card": sorted({run["card"] for run in runs}), "jobs": own.jobs}
    result |= {"settings": {name: SETTINGS[name] for name in own.settings}, "preparation": preparation}
    result |= {"code": sorted(code | {run["code"] for run in runs}), "step_s_alone": step_s, "timed_on": timed_on}
    result["problems"] = problems
    result["axes"] = ["step"] * (not own.seconds) + ["seconds"] * (own.jobs == 1 or bool(step_s))
    result["tables"] = tables(runs, result["axes"], own.sort) if runs else ""
    with train_colm.replacing(Path(own.output)) as aside:
        aside.write_text(json.dumps(result | {"runs": [compact(run) for run in runs]}))
    for label, seconds in step_s.items():
        print(f"{label:<28} {seconds * 1e3:>8.1f} ms a step, alone on {', '.join(timed_on)}")
    print(f"\n{result['tables']}\n{', '.join(result['card'])}, {result['versions']}: {own.output}")
    if len(result["code"]) > 1:
        problems.append("these runs were made by different versions of train_colm.py or colm_core.py")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
