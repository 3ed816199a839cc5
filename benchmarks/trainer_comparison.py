"""Seconds and peak memory for 128 rows: transformers' Trainer with PEFT beside this trainer, on the same rows and card.

    python benchmarks/trainer_comparison.py --shape phi-2 --compile --max_tokens_per_micro_batch 4864
    python benchmarks/trainer_comparison.py --shape phi-2 --micro_batches 4 16 --trainer_args torch_compile=true
    python benchmarks/trainer_comparison.py --shape llama-3b --trainer_args use_liger_kernel=true   # needs liger-kernel
    python benchmarks/trainer_comparison.py --shape tiny --pools 2                                  # a minute on a CPU

Both sides train the same LoRA adapters (rank, targets, dropout) on the same --pools times 128 synthetic rows
(step_time.py) of a model with random weights, in bf16 on a GPU. Each side runs in a process of its own, one after the
other, and makes two passes over the rows. The second pass is timed, so compilation, kernel selection and the first
allocations are not counted. A result is the time of that pass for 128 rows, and the peak of the allocated memory.

trainer:16   transformers.Trainer, micro-batches of 16 rows padded to their longest, accumulated to 128 rows, rows of
             like length together (train_sampling_strategy="group_by_length"), fused AdamW, everything else at its
             default; --trainer_args NAME=VALUE changes any of transformers.TrainingArguments
ours:MODE    this trainer's step in a mode of step_time.py: ft-128 trains on all 128 rows, colm-grad on 64 of them

Flags that --help does not list go to train_colm.py. The Trainer sorts 128 or more rows by length and so does not see
the same 128 rows in each step; over a pass both sides see all rows once. `padded` is the number of tokens that the
model computes over the number of tokens that the rows have.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import step_time

import train_colm

ROWS = 128  # rows of one optimizer step, on both sides
POOL_ROWS = 4096  # rows that step_time.make_run generates: the passes take their first --pools x 128 in random order
LLAMA_3B = dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                num_attention_heads=24, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
SHAPES = step_time.SHAPES | {"llama-3b": (transformers.LlamaConfig, LLAMA_3B)}
TARGETS = {"phi-2": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]}  # the paper's; other shapes: q, k, v and o
OTHER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def pools_of(count: int) -> torch.Tensor:
    """Row numbers of the pools, [count, 128]; no row twice."""
    order = torch.randperm(POOL_ROWS, generator=torch.Generator().manual_seed(0))
    return order[: count * ROWS].view(count, ROWS)


def synchronized_time() -> float:
    """Seconds of a clock, read when the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb() -> float:
    """Peak of the memory that tensors took since the last reset, 1e9 bytes; on a CPU the process' peak so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def trained_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------ transformers' Trainer


class PaddingCollator:
    """Rows padded on the right to the longest of their micro-batch, as DataCollatorForSeq2Seq pads them."""

    def __init__(self):
        self.computed = 0  # tokens with padding, of all micro-batches so far

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        self.computed += width * len(rows)
        batch = {
            "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.full((len(rows), width), -100),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.tensor(row["labels"])
        return batch


class PassClock(transformers.TrainerCallback):
    """Seconds and peak memory of the last pass over the rows."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = synchronized_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds = synchronized_time() - self.start
        self.peak_gb = peak_gb()


def trainer_rows(vocab: int, pools: torch.Tensor) -> list[dict]:
    """The rows of the pools as the Trainer takes them; the second half of a row is its completion."""
    data = step_time.synthetic_rows(vocab, step_time.lognormal_lengths(POOL_ROWS))
    rows = []
    for number in pools.flatten().tolist():
        ids = data.ids[data.offsets[number] : data.offsets[number + 1]].tolist()
        prompt = len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def measure_trainer(own: argparse.Namespace, flags, micro_batch: int) -> dict:
    """Two passes of transformers' Trainer over the pools, as a user of PEFT would write it."""
    cuda = torch.cuda.is_available()
    config_class, sizes = SHAPES[own.shape]
    config = config_class(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.use_cache = False  # a key-value cache is for generation
    torch.manual_seed(0)
    # The model: the base in bf16, adapters in float32 (PEFT's default), autocast by the Trainer's bf16 flag.
    with torch.device("cuda" if cuda else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
        lora = peft.LoraConfig(
            r=flags.lora_r,
            lora_alpha=flags.lora_alpha,
            lora_dropout=flags.lora_dropout,
            target_modules=TARGETS.get(own.shape, OTHER_TARGETS),
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
    # Training: the Trainer shuffles, sorts by length and accumulates micro-batches to steps of 128 rows by itself.
    pools = pools_of(own.pools)
    rows = trainer_rows(sizes["vocab_size"], pools)
    collator, clock = PaddingCollator(), PassClock()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": ROWS // micro_batch,
            "num_train_epochs": 2,
            "train_sampling_strategy": "group_by_length",
            "learning_rate": flags.learning_rate,
            "bf16": cuda,
            "use_cpu": not cuda,
            "optim": "adamw_torch_fused",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        arguments = transformers.TrainingArguments(**settings | own.trainer_args)
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]
        )
        trainer.train()
    # A setting of --trainer_args that changes the number of rows in a step would compare unlike things.
    if trainer.state.global_step != 2 * own.pools:
        raise RuntimeError(f"the Trainer made {trainer.state.global_step} steps in two passes, not {2 * own.pools}")
    real_tokens = 2 * sum(len(row["input_ids"]) for row in rows)
    return {
        "seconds": clock.seconds / own.pools,
        "peak_gb": clock.peak_gb,
        "padded": collator.computed / real_tokens,
        "tokens": real_tokens / 2 / own.pools,
        "trained_parameters": trained_parameters(model),
    }


# --------------------------------------------------------------------------------------------------------- this trainer


def measure_ours(own: argparse.Namespace, flags, mode: str) -> dict:
    """Two passes of this trainer's own step over the same pools."""
    step_time.SHAPES |= SHAPES  # make_run looks shapes up there
    run = step_time.make_run(own.shape, flags)
    pools = pools_of(own.pools)

    def one_pass() -> float:
        """Peak memory of a pass."""
        peak = 0.0
        for step, pool in enumerate(pools):
            record = step_time.one_step(run, mode, pool, step)
            peak = max(peak, record["peak_gb"])
        return peak

    one_pass()  # compiles, fills memory pools and shows every shape of micro-batch that the timed pass will see
    start = synchronized_time()
    peak = one_pass()
    seconds = synchronized_time() - start
    lengths = step_time.lognormal_lengths(POOL_ROWS)
    return {
        "seconds": seconds / own.pools,
        "peak_gb": peak,
        "padded": 1.0 if run.args.packing else None,  # padded micro-batches, on a CPU: not counted
        "tokens": lengths[pools.flatten()].sum().item() / own.pools,
        "trained_parameters": trained_parameters(run.model),
    }


# ------------------------------------------------------------------------------------------------------- the comparison


def parse_value(text: str):
    """A value of TrainingArguments as it was typed: JSON where it is JSON, such as true, 4 or 0.1, else a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def name_and_value(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '=': write NAME=VALUE, as in gradient_checkpointing=true")
    if name not in transformers.TrainingArguments.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"{name!r} is not an argument of transformers.TrainingArguments")
    return name, parse_value(value)


def measure_side(own: argparse.Namespace, flags, side: str) -> dict:
    """One side in this process; running out of memory is a result."""
    kind, _, what = side.partition(":")
    try:
        if kind == "trainer":
            return measure_trainer(own, flags, micro_batch=int(what))
        return measure_ours(own, flags, mode=what)
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}


def measure_in_own_process(side: str) -> dict:
    """Run this script again for one side alone: its memory and its compiled code are nobody else's."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--output", str(result)]
        finished = subprocess.run(command, stdout=sys.stderr)
        if finished.returncode or not result.exists():
            return {"problem": f"failed with exit code {finished.returncode}"}
        return json.loads(result.read_text())


def report(results: dict[str, list[dict]]) -> None:
    """Print a row for each side: the median over rounds, and its ratio to ours on all 128 rows."""
    base = results.get("ours:ft-128", [{}])
    base_seconds = [r["seconds"] for r in base if "seconds" in r]
    print(f"{'':<16}{'s / 128 rows':>14}{'range':>16}{'peak GB':>10}{'padded':>8}{'ratio to ft-128':>17}")
    for side, rounds in results.items():
        good = [r for r in rounds if "seconds" in r]
        if not good:
            print(f"{side:<16}  {rounds[0]['problem']}")
            continue
        seconds = sorted(r["seconds"] for r in good)
        middle = statistics.median(seconds)
        padded, ratio = "-", "-"
        if good[0]["padded"]:
            padded = f"{good[0]['padded']:.2f}"
        if base_seconds:
            ratio = f"{middle / statistics.median(base_seconds):.2f}"
        spread = f"{seconds[0]:.3f}-{seconds[-1]:.3f}"
        peak = max(r["peak_gb"] for r in good)
        print(f"{side:<16}{middle:>14.3f}{spread:>16}{peak:>10.1f}{padded:>8}{ratio:>17}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--pools", type=int, default=8, help="128 rows each; a pass goes over all of them")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all sides in turn: shows how the host drifts")
    parser.add_argument("--modes", nargs="*", choices=step_time.MODES, default=["ft-128", "colm-grad"])
    parser.add_argument("--micro_batches", nargs="*", type=int, default=[16], help="rows, of the Trainer's side")
    parser.add_argument("--trainer_args", nargs="*", type=name_and_value, default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", help="JSON file of all results")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # set where the script runs itself
    own, rest = parser.parse_known_args()
    if not 0 < own.pools <= POOL_ROWS // ROWS:
        parser.error(f"--pools {own.pools} is out of range: give 1 to {POOL_ROWS // ROWS}")
    for size in own.micro_batches:
        if size < 1 or ROWS % size:
            parser.error(f"--micro_batches {size} does not divide {ROWS} rows: give a power of two up to {ROWS}")
    own.trainer_args = dict(own.trainer_args)
    try:
        flags = train_colm.build_parser().parse_args(rest)
    except train_colm.UserError as error:
        parser.error(str(error))
    if own.shape == "tiny":
        flags.lora_r = 16  # as in step_time.make_run
    # One side alone, for the process that measure_in_own_process started.
    if own.side:
        Path(own.output).write_text(json.dumps(measure_side(own, flags, own.side)))
        return

    # All sides in turn, so that a host that grows slower hits all of them.
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"command": sys.argv, "shape": own.shape, "card": card, "pools": own.pools, "rounds": own.rounds}
    about["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    print(about, flush=True)
    sides = [f"trainer:{size}" for size in own.micro_batches] + [f"ours:{mode}" for mode in own.modes]
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(own.rounds):
        for side in sides:
            results[side].append(measure_in_own_process(side))
    trained = set()
    for rounds in results.values():
        for result in rounds:
            if "trained_parameters" in result:
                trained.add(result["trained_parameters"])
    if len(trained) > 1:
        sys.exit(f"error: the sides train {sorted(trained)} parameters: give both the same --lora_r and targets")
    report(results)
    if own.output:
        Path(own.output).write_text(json.dumps(about | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
