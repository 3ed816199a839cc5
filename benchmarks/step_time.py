"""Time and memory of one training step: CoLM, random selection and plain fine-tuning, interleaved on the same examples.

    python benchmarks/step_time.py --shape phi-2 --compile                 # random weights, no download
    python benchmarks/step_time.py --shape tiny                            # a minute on two CPU cores

Lengths are clip(lognormal(5.25, 0.55), 48, 512), the second half of each row is its completion (--train_file takes the
lengths of real rows instead); a quarter of the rows belongs to sources that CoLM keeps whole. `ideal` is the
no-gradient forward of the probed examples plus forward and backward of the coreset, in the same micro-batches and
nothing else; its ratio says what selection and bookkeeping cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_colm
from colm_core import example_losses

SHAPES = {
    "phi-2": (transformers.PhiConfig, dict(vocab_size=51200, hidden_size=2560, intermediate_size=10240,
              num_hidden_layers=32, num_attention_heads=32, partial_rotary_factor=0.4)),
    "llama-3-8b": (transformers.LlamaConfig, dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                   num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)),
    "qwen2.5-0.5b": (transformers.Qwen2Config, dict(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                     num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)),
    "tiny": (transformers.LlamaConfig, dict(vocab_size=2048, hidden_size=128, intermediate_size=384,
             num_hidden_layers=4, num_attention_heads=4)),
}  # fmt: skip
MODES = {  # name: (selection, probe, pool, coreset)
    "colm-grad": ("colm", "grad", 128, 64),
    "colm-spsa": ("colm", "spsa", 128, 64),
    "random": ("random", "grad", 128, 64),
    "ft-64": ("full", "grad", 64, 64),
    "ft-128": ("full", "grad", 128, 128),
    "ft-256": ("full", "grad", 256, 256),
}


def synthetic_rows(vocab: int, lengths: torch.Tensor) -> train_colm.TokenizedRows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    share = torch.tensor([0.24 / 7] * 7 + [0.76 / 6] * 6)  # 7 small sources hold 24 % of the rows
    sources = torch.multinomial(share, len(lengths), replacement=True, generator=generator)
    offsets = [0, *lengths.cumsum(0).tolist()]
    names = [str(q) for q in range(13)]
    return train_colm.TokenizedRows(
        ids, offsets, (lengths // 2).tolist(), sources, torch.arange(len(lengths)), names, 0, 0
    )


def matrix_rate(device) -> float:
    """Rate of a large bf16 matrix product on random data, FLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if n > 1024 else torch.float32) for _ in range(2))
    times = [timed(lambda: a @ b, device) for _ in range(10)]
    return 2 * n**3 / statistics.median(times[3:])


def timed(function, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_step(run, mode: str, pool: torch.Tensor, step: int) -> dict:
    """A whole step as the training loop makes it, without its logging."""
    run.args.selection, run.args.probe, size, run.args.coreset_size = MODES[mode]
    clock = train_colm.Clock(run.accelerator.device)
    choice = train_colm.choose_coreset(run, pool[:size], step, clock)
    clock.mark("select")
    rows = pool[:size][choice.index]
    loss = train_colm.train_on(run, rows, torch.ones(len(rows)), step)
    clock.mark("train")
    (loss + run.clip()).item()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if choice.history:
        run.moments.update_from_sums(*choice.history)
    clock.mark("optimizer")
    return clock.read() | {"rows": rows, "tokens": sum(map(run.train.length, rows.tolist()))}


def ideal_step(run, probed: torch.Tensor, rows: torch.Tensor, backward: bool = True) -> None:
    run.mode(training=False)
    with torch.no_grad():
        for _, batch, _ in run.micro_batches(run.train, probed.tolist(), 2 * run.args.max_tokens_per_micro_batch):
            with run.accelerator.autocast():
                example_losses(run.inner, run.hook, batch)
    if backward:
        train_colm.train_on(run, rows, torch.ones(len(rows)), 0)
        run.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--train_file", help="take the lengths of these rows, tokenised with --tokenizer")
    parser.add_argument("--tokenizer", help="folder or hub id")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", help="a mode: print its kernels")
    parser.add_argument("--trace", action="store_true", help="with --profile, write a Chrome trace beside --output")
    parser.add_argument("--output", default="step_time.json")
    own, flags = parser.parse_known_args()
    args = train_colm.build_parser().parse_args(flags)
    args.max_steps = 1000

    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if cuda else "no"
    accelerator = train_colm.make_accelerator(args)
    device = accelerator.device
    config_class, sizes = SHAPES[own.shape]
    config = config_class(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if own.shape == "tiny":
        args.lora_r = 16
    with device:
        dtype = torch.bfloat16 if cuda else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = train_colm.add_lora(model, args)
    if own.train_file:
        tokenizer = transformers.AutoTokenizer.from_pretrained(own.tokenizer)
        rows, places = train_colm.read_rows(own.train_file)
        train = train_colm.tokenize(rows, places, tokenizer, args, [], True)
        keep = train_colm.small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    else:
        generator = torch.Generator().manual_seed(0)
        lengths = (torch.randn(4096, generator=generator) * 0.55 + 5.25).exp().clamp(48, 512).long()
        train, keep = synthetic_rows(sizes["vocab_size"], lengths), set(range(7))
    run = train_colm.build_run(args, accelerator, None, model, train, None, keep)
    pools = [train_colm.draw_pool(len(train), 256, 0, i) for i in range(own.repeats + 2)]

    rate = matrix_rate(device)
    matrices = sum(p.numel() for n, p in run.inner.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
    records: dict[str, list] = {name: [] for name in own.modes}
    for i, pool in enumerate(pools):
        probed = pool[:128][~torch.isin(train.sources[pool[:128]], torch.tensor(sorted(keep)))]
        for mode in own.modes:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            record = one_step(run, mode, pool, i)
            coreset = record.pop("rows")
            if mode.startswith("colm"):  # its own ideal: the same examples again
                record["forward_s"] = timed(partial(ideal_step, run, probed, None, False), device)
                record["ideal_s"] = timed(partial(ideal_step, run, probed, coreset), device)
            records[mode].append(record)
        if i == 1:  # two rounds of warm-up (and compilation)
            records = {name: [] for name in records}

    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; matrix rate {rate / 1e12:.0f} TFLOP/s")  # fmt: skip
    print(f"{own.shape}, {' '.join(flags)}, median of {own.repeats}")
    columns = [
        "step_s",
        "probe_s",
        "select_s",
        "train_s",
        "optimizer_s",
        "peak_gb",
        "probe_gb",
        "train_gb",
        "forward_s",
        "ideal_s",
    ]
    print(f"{'':<12}" + "".join(f"{c:>12}" for c in columns) + f"{'tokens/s':>12}{'min step':>12}")
    medians = {}
    for name, rows in records.items():
        if not rows:
            continue
        medians[name] = {c: statistics.median(r.get(c, 0) for r in rows) for c in columns}
        tokens = statistics.median(r.get("tokens", 0) for r in rows)
        medians[name]["tokens_per_s"] = tokens / medians[name]["step_s"]
        medians[name]["min_step_s"] = min(r["step_s"] for r in rows)
        print(f"{name:<12}" + "".join(f"{medians[name][c]:>12.4f}" for c in columns)
              + f"{medians[name]['tokens_per_s']:>12.0f}{medians[name]['min_step_s']:>12.4f}")  # fmt: skip
    for mode in own.modes:
        if mode.startswith("colm"):
            ratio = statistics.median(r["step_s"] / r["ideal_s"] for r in records[mode])
            probe = statistics.median(r["probe_s"] / r["forward_s"] for r in records[mode])
            print(
                f"{mode}: ideal {medians[mode]['ideal_s']:.4f} s, step / ideal {ratio:.3f}, probe / forward {probe:.3f}"
            )
    if "ft-128" in medians:
        tokens = statistics.median(r["tokens"] for r in records["ft-128"])
        flops = 4 * matrices * tokens / medians["ft-128"]["train_s"]
        print(f"ft-128: {flops / 1e12:.0f} model TFLOP/s, {flops / rate:.0%} of the matrix rate")
    Path(own.output).write_text(json.dumps({"medians": medians, "records": records}, indent=1, default=str))
    if own.profile:
        profile(run, own.profile, pools[-1], own.output + ".trace.json" if own.trace else None)


def profile(run, mode: str, pool, trace: str | None) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.accelerator.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        one_step(run, mode, pool, 0)
    if trace:
        profiler.export_chrome_trace(trace)
    sort = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70))


if __name__ == "__main__":
    main()
