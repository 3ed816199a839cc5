"""Time and memory of one training step: CoLM, random selection and plain fine-tuning, interleaved on the same examples.

    python benchmarks/step_time.py --shape phi-2 --compile                 # random weights, no download
    python benchmarks/step_time.py --shape tiny                            # a minute on two CPU cores
    python benchmarks/plot_step_time.py benchmarks/results/*.json          # the picture of the split

Any flag of train_colm.py may be added, and `accelerate launch` runs it on several ranks. Row lengths are
clip(lognormal(5.25, 0.55), 48, 512) and the second half of each row is its completion; --train_file with --tokenizer
takes real rows instead. 24 % of the rows belong to small sources, which CoLM keeps and does not probe.

`ideal` is the no-gradient forward of the probed examples plus forward and backward of the coreset, in the same
micro-batches and nothing else, measured on the same examples in the same run. `forward` is its first part.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import accelerate
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import colm_data
import train_colm
from colm_batches import collate, micro_batch_losses, pack
from colm_data import TokenizedRows

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
SMALL = set(range(7))
COLUMNS = ["step_s", "probe_s", "select_s", "train_s", "optimizer_s", "comm_s", "ideal_s", "forward_s"]
COLUMNS += ["peak_gb", "probe_gb", "train_gb", "tokens_per_s", "model_tflops"]


def synthetic_rows(vocab: int, lengths: torch.Tensor) -> TokenizedRows:
    """Random tokens of given row lengths in 13 sources; numbers 0-6 are small."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    share = torch.tensor([0.24 / 7] * 7 + [0.76 / 6] * 6)
    sources = torch.multinomial(share, len(lengths), replacement=True, generator=generator)
    supervised = torch.cat([second_half(length) for length in lengths.tolist()])
    offsets = [0, *lengths.cumsum(0).tolist()]
    names = [str(q) for q in range(13)]
    return TokenizedRows(
        ids=ids,
        supervised=supervised,
        offsets=offsets,
        sources=sources,
        numbers=torch.arange(len(lengths)),
        names=names,
        shortened=0,
        dropped=0,
    )


def second_half(length: int) -> torch.Tensor:
    """The supervised mask of a row whose first half is its prompt."""
    return torch.arange(length) >= length // 2


def lognormal_lengths(rows: int) -> torch.Tensor:
    return (torch.randn(rows, generator=torch.Generator().manual_seed(0)) * 0.55 + 5.25).exp().clamp(48, 512).long()


def make_run(shape: str, args, train_file: str | None = None, tokenizer: str | None = None) -> train_colm.Run:
    """The trainer's own run around a model of random weights, bf16 on a GPU."""
    cuda = torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if cuda else "no"
    args.max_steps = 1000
    if shape == "tiny":
        args.lora_r = 16
    accelerator = train_colm.make_accelerator(args)
    config_class, sizes = SHAPES[shape]
    config = config_class(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    with accelerator.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if args.base_precision != "compute":  # weights are quantised when they are read
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = train_colm.load_base(folder, args, dtype)
    with accelerator.device:
        model = train_colm.add_lora(model, args)
    train, keep = synthetic_rows(sizes["vocab_size"], lognormal_lengths(4096)), SMALL
    if train_file:
        rows, places = colm_data.read_rows(train_file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        train = colm_data.tokenize(rows, places, tokenizer, args, [], True)
        keep = train_colm.small_sources(dict(enumerate(torch.bincount(train.sources).tolist())))
    run = train_colm.build_run(args, accelerator, None, model, train, None, keep)
    run.all_reduce = partial(counted, run, run.all_reduce)
    run.broadcast = partial(counted, run, run.broadcast)
    return run


def counted(run: train_colm.Run, collective, tensor: torch.Tensor) -> torch.Tensor:
    """One of CoLM's own collectives, with its time, waiting for slower ranks included; 0 on one rank."""
    if run.ranks == 1:
        return collective(tensor)
    start = time.perf_counter()
    if run.device.type == "cuda":  # earlier work of this rank is not counted
        torch.cuda.synchronize()
        start = time.perf_counter()
    result = collective(tensor)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    run.comm_s += time.perf_counter() - start
    return result


def timed(function, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device) -> float:
    """Rate of a large matrix product on random data, FLOP/s; bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / statistics.median([timed(lambda: a @ b, device) for _ in range(10)][3:])


def warm_up(run: train_colm.Run) -> None:
    """Packed sizes up to the largest, forward and backward: kernels are chosen, memory pools grow."""
    if not run.args.packing:
        return
    budget = run.args.max_tokens_per_micro_batch
    for size in range(512, train_colm.probe_budget(run.args) + 1, 512):
        ids = torch.arange(size, dtype=torch.int32)
        batch = pack([(part, second_half(len(part))) for part in ids.split(256)], run.args.max_length).to(run.device)
        training = size <= budget
        run.set_training(training)
        with torch.set_grad_enabled(training), run.accelerator.autocast():
            loss = micro_batch_losses(run.inner, run.labelled_logits, batch).sum()
        if training:
            loss.backward()
    run.optimizer.zero_grad(set_to_none=True)


def one_step(run: train_colm.Run, mode: str, pool: torch.Tensor, step: int) -> dict:
    """A whole step as the training loop makes it, without its logging."""
    run.args.selection, run.args.probe, size, run.args.coreset_size = MODES[mode]
    run.comm_s, run.comm_bytes = 0.0, 0
    clock = train_colm.Clock(run.device)
    pool = pool[:size]
    choice = train_colm.choose_coreset(run, pool, step, clock)
    clock.mark("select")
    loss = train_colm.accumulate_gradients(run, pool, choice, step)
    clock.mark("train")
    train_colm.update(run, pool, choice, loss)
    clock.mark("optimizer")
    counts = {"probe_tokens": choice.probe_tokens, "comm_s": run.comm_s, "comm_bytes": run.comm_bytes}
    return clock.read() | {"rows": pool[choice.index], "loss": loss.item()} | counts


def ideal_step(run: train_colm.Run, probed: torch.Tensor, rows: torch.Tensor | None) -> None:
    run.set_training(False)
    for _, batch, _ in run.micro_batches(run.train, probed, train_colm.probe_budget(run.args)):
        with torch.no_grad(), run.accelerator.autocast():
            micro_batch_losses(run.inner, run.labelled_logits, batch)
    if rows is not None:
        everything = torch.arange(len(rows))
        choice = train_colm.Choice(everything, torch.ones(len(rows)), everything < 0, run.moments)
        train_colm.accumulate_gradients(run, rows, choice, 0)
        run.optimizer.zero_grad(set_to_none=True)


def model_flops(run: train_colm.Run, rows: list[int], backward: bool) -> float:
    """Matrix products of the model on these rows; the frozen base has no weight gradients, recomputation is no work."""
    head = run.inner.get_output_embeddings().weight
    sizes = {"base": 0, "lora": 0}
    for module in run.inner.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not head:
            kind = "lora" if module.weight.requires_grad else "base"
            sizes[kind] += module.in_features * module.out_features
    tokens = sum(map(run.train.length, rows))
    labels = int(run.train.supervised_tokens(torch.tensor(rows)).sum())
    forward = 2 * (sizes["base"] + sizes["lora"]) * tokens + 2 * head.numel() * labels
    return 2 * forward + 2 * sizes["lora"] * tokens if backward else forward


def measure(run: train_colm.Run, modes: list[str], repeats: int) -> dict[str, list[dict]]:
    records: dict[str, list] = {mode: [] for mode in modes}
    for i in range(-2, repeats):
        pool = train_colm.draw_pool(len(run.train), 256, 0, i + 2)
        small = torch.isin(run.train.sources[pool[:128]], torch.tensor(sorted(run.keep)))
        probed, rows = pool[:128][~small], None
        for mode in modes:
            record = one_step(run, mode, pool, i)
            rows = record.pop("rows")
            if run.accelerator.is_main_process:  # the first steps may compile for minutes: show that it moves
                print(f"{mode}: {record['step_s']:.3f} s, {record['peak_gb']:.2f} GB", file=sys.stderr, flush=True)
            if mode.startswith("colm"):
                record["forward_s"] = timed(partial(ideal_step, run, probed, None), run.device)
                record["ideal_s"] = timed(partial(ideal_step, run, probed, rows), run.device)
            tokens = sum(map(run.train.length, rows.tolist()))
            flops = model_flops(run, rows.tolist(), backward=True)
            flops += model_flops(run, probed.tolist(), backward=False) if record["probe_tokens"] else 0
            record |= {"tokens": tokens, "tokens_per_s": tokens / record["step_s"]}
            records[mode].append(record | {"model_tflops": flops / record["step_s"] / 1e12})
        if i == -2:
            warm_up(run)
        if i == -1:
            records = {mode: [] for mode in modes}
    return records


def report(records: dict[str, list[dict]], rate: float) -> dict:  # rate: of all cards
    """Print medians and the ratios that matter; returns both."""
    medians = {m: {c: statistics.median(r.get(c, 0) for r in rows) for c in COLUMNS} for m, rows in records.items()}
    print(f"{'':<10}" + "".join(f"{c:>13}" for c in COLUMNS))
    for mode, row in medians.items():
        print(f"{mode:<10}" + "".join(f"{row[c]:>13.4f}" for c in COLUMNS))
    ratios = {}
    for mode in filter(lambda m: m.startswith("colm"), records):
        pairs = {"step / ideal": ("step_s", "ideal_s"), "probe / forward": ("probe_s", "forward_s")}
        for name, (a, b) in pairs.items():
            ratios[f"{mode} {name}"] = statistics.median(r[a] / r[b] for r in records[mode])
        rest = [(r["select_s"] + r["optimizer_s"]) / r["step_s"] for r in records[mode]]
        ratios[f"{mode} share of selection and optimizer"] = statistics.median(rest)
        for other in ("ft-128", "ft-256"):
            if other in medians:
                ratios[f"{other} / {mode}"] = medians[other]["step_s"] / medians[mode]["step_s"]
        if "random" in medians:
            ratios[f"peak memory {mode} / random"] = medians[mode]["peak_gb"] / medians["random"]["peak_gb"]
    for mode in records:
        ratios[f"{mode} share of the matrix rate"] = medians[mode]["model_tflops"] * 1e12 / rate
    for name, value in ratios.items():
        print(f"{name:<50} {value:.3f}")
    return {"medians": medians, "ratios": ratios}


def host_time(run: train_colm.Run) -> float:
    """Seconds of a training micro-batch of 128 tokens: a GPU is done at once, the rest is the host starting kernels.

    Where a micro-batch of the run's own size takes no longer, the host sets the pace: larger ones cost it nothing.
    """
    examples = [(torch.arange(120, dtype=torch.int32), second_half(120))]
    batch = (pack(examples, run.args.max_length) if run.args.packing else collate(examples)).to(run.device)
    run.set_training(True)

    def forward_and_backward() -> None:
        with run.accelerator.autocast():
            loss = micro_batch_losses(run.inner, run.labelled_logits, batch).sum()
        loss.backward()

    seconds = [timed(forward_and_backward, run.device) for _ in range(8)]
    run.optimizer.zero_grad(set_to_none=True)
    return statistics.median(seconds[3:])


def kernel_family(kernel: str, shapes: list, run: train_colm.Run) -> str:
    """What a kernel of a step belongs to, by its name and the shapes of the operator that started it."""
    name = kernel.lower()
    if "flash" in name or "fmha" in name or "attention" in name:
        return "attention"
    if name.startswith("triton"):
        return "compiled: norms, activations, dropout, casts, sums"
    if name.startswith(("memcpy", "memset")):
        return "copies and fills"
    if "multi_tensor" in name:
        return "clipping and AdamW"
    if not any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma", "splitk")):
        return "operators as written: last layer of the probe, selection, loss"
    sizes = {size for shape in shapes for size in shape or [] if isinstance(size, int)}
    if run.inner.get_output_embeddings().weight.shape[0] in sizes:
        return "products of the output embedding"
    if run.args.lora_r in sizes:
        return "products of LoRA"
    return "products of the base"


def profile(run: train_colm.Run, mode: str) -> None:
    """Print the kernels (or CPU operators) of one step, and on a GPU their time by families."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        one_step(run, mode, train_colm.draw_pool(len(run.train), 256, 0, 0), 0)
    sort = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70))
    families: dict[str, list[float]] = {}  # milliseconds of each kernel
    for operator in profiler.events():
        for kernel in operator.kernels:
            family = kernel_family(kernel.name, operator.input_shapes or [], run)
            families.setdefault(family, []).append(kernel.duration / 1e3)
    for family, times in sorted(families.items(), key=lambda item: -sum(item[1])):
        print(f"{family:<65} {sum(times):8.1f} ms {len(times):7} kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--train_file", help="take these rows, tokenised with --tokenizer")
    parser.add_argument("--tokenizer", help="folder or hub id")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", help="a mode: print its kernels after the measurement")
    parser.add_argument("--output", default="step_time.json")
    own, flags = parser.parse_known_args()
    try:
        run = make_run(own.shape, train_colm.build_parser().parse_args(flags), own.train_file, own.tokenizer)
    except train_colm.UserError as error:  # a bad flag of the trainer, or a bad file
        parser.error(str(error))
    if not run.accelerator.is_main_process:
        sys.stdout = io.StringIO()
    rate = matrix_rate(run.device)
    card = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, peft)}
    about = {"shape": own.shape, "flags": flags, "card": card, "ranks": run.ranks, "repeats": own.repeats}
    about |= {"matrix_tflops": rate / 1e12}
    print(f"{about | versions}")
    records = measure(run, own.modes, own.repeats)
    if run.device.type == "cuda":
        about["host_s"] = host_time(run)
        print(f"a training micro-batch of 128 tokens takes {about['host_s'] * 1e3:.1f} ms: no larger one takes less")
    result = about | {"versions": versions} | report(records, rate * run.ranks) | {"records": records}
    if run.accelerator.is_main_process:
        Path(own.output).write_text(json.dumps(result, indent=1))
    if own.profile:
        profile(run, own.profile)


if __name__ == "__main__":
    main()
