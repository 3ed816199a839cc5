"""Rows per second of eval_math.py and eval_superglue.py against the plain way, on the same model and rows, interleaved.

    python benchmarks/eval_speed.py --shape phi-2                          # random weights, no download
    python benchmarks/eval_speed.py --shape tiny --rows 16 --options 20    # a minute on two CPU cores
    python benchmarks/eval_speed.py --model microsoft/phi-2 --questions data/gsm8k.jsonl

maths    eval_math.generate against model.generate on batches of 8 in file order, padded on the left; both greedy
options  eval_superglue.score_options against one forward pass of batch 1 for each prompt with each of its options

Prompts are random tokens, of clip(lognormal(4.9, 0.3), 48, 400) tokens for maths and clip(lognormal(5.2, 0.5), 32, 480)
before 2 to 4 options of 1 to 6 tokens; --questions FILE (with --tokenizer, beside --shape) takes real questions. Random
weights hardly ever write EOS, so with --shape each row has a length of its own, clip(lognormal(log 110, 0.5), 16,
--max_new_tokens): the token there becomes EOS, on both sides alike. A real model ends its answers itself.

The plain half runs on half of the rows, ours on all, plain on the other half, ours again: ours is the mean of the two.
A step is one forward pass of the model. cuDNN's attention is off on both sides, as the evaluation scripts have it;
--plain_cudnn leaves it on, which is torch's default, for the plain side. In bf16 the two sides' batches round
differently, and an answer that has once differed goes on differently: read `same` in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from step_time import SHAPES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_math
import eval_superglue
from colm_data import UserError, prompt_and_completion


class Numbers:
    """Stands in for a tokenizer: a text is its numbers; one without any is a 1."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict:
        return {"input_ids": [int(x) for x in re.findall(r"\d+", text) or ["1"]]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


class Watched(eval_math.Batch):
    """The project's decoding, with the lengths that rows shall have and a note of what they wrote."""

    ends: dict[int, int] = {}  # row -> length
    eos, written = 0, {}

    def forward(self, requests, cache):
        done = super().forward(requests, cache)
        for r in requests:
            if len(r.tokens) == self.ends.get(r.row.number):
                r.tokens[-1] = self.eos
                done += [r] * (not r.done)
                r.done = True
        self.written.update({r.row.number: r.tokens for r in done})
        return done


class EndAt(transformers.LogitsProcessor):
    """The same lengths for model.generate."""

    def __init__(self, ends: torch.Tensor, eos: int, width: int):
        self.ends, self.eos, self.width = ends, eos, width

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.eos].masked_fill_(self.ends == ids.shape[1] - self.width + 1, math.inf)
        return scores


def lengths(count: int, mean: float, deviation: float, low: int, high: int, seed: int) -> list[int]:
    draw = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (draw * deviation + mean).exp().clamp(low, high).long().tolist()


def make_model(args, device):
    """Model, tokenizer and room for a prompt, as eval_math.load returns them."""
    if args.model:
        names = dict(base_model=None, trust_remote_code=False, dtype="auto")
        return eval_math.load(argparse.Namespace(**vars(args), **names), device)
    config_class, sizes = SHAPES[args.shape]
    config = config_class(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else Numbers()
    return model, tokenizer, 2048 - args.max_new_tokens


def maths_rows(args, vocab: int) -> list[eval_math.Row]:
    if args.questions:
        return eval_math.read_task(args.questions, argparse.Namespace(max_rows=args.rows, data_dir="."))
    draw, counts = random.Random(0), lengths(args.rows, 4.9, 0.3, 48, 400, 0)
    texts = [" ".join(str(draw.randrange(1, vocab)) for _ in range(n)) for n in counts]
    return [eval_math.Row("random", i, text, "0") for i, text in enumerate(texts)]


def our_maths(rows, model, tokenizer, room, ends: dict[int, int], args) -> dict[int, list[int]]:
    Watched.ends, Watched.eos, Watched.written = ends, tokenizer.eos_token_id, {}
    flags = argparse.Namespace(mode="cot", cot_backup=False, execute_programs=False, **vars(args))
    with tempfile.TemporaryDirectory() as folder:
        rows = sorted(rows, key=lambda row: -len(row.question))  # as eval_math.main has them
        eval_math.generate(rows, model, tokenizer, room, flags, Path(folder, "predictions.jsonl"), show=False)
    return Watched.written


def plain_maths(rows, model, tokenizer, room, ends: dict[int, int], args) -> dict[int, list[int]]:
    ids = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": sorted(stop - {None}), "pad_token_id": 0}
    written = {}
    for part in (rows[i : i + 8] for i in range(0, len(rows), 8)):
        texts = [prompt_and_completion({"instruction": r.question, "output": ""}, "", tokenizer)[0] for r in part]
        prompts = [eval_math.prompt_ids(tokenizer, text)[-room:] for text in texts]
        tokens, mask = eval_superglue.pad(prompts, "left", model.device)
        width = tokens.shape[1]
        targets = torch.tensor([ends.get(r.number, -1) for r in part], device=model.device)
        force = [EndAt(targets, tokenizer.eos_token_id, width)] if ends else []
        new = model.generate(tokens, attention_mask=mask, do_sample=False, logits_processor=force, **options)
        for row, answer in zip(part, new[:, width:].tolist(), strict=True):
            last = next((i for i, token in enumerate(answer) if token in stop), len(answer))
            written[row.number] = answer[: last + 1]
            tokenizer.decode(written[row.number], skip_special_tokens=True)
    return written


def option_rows(args, vocab: int) -> list[eval_superglue.Example]:
    draw, counts, examples = random.Random(1), lengths(args.options, 5.2, 0.5, 32, 480, 1), []
    for i, count in enumerate(counts):
        ids = [[draw.randrange(1, vocab) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(2, 4))]
        prompt, labels = [draw.randrange(1, vocab) for _ in range(count)], dict.fromkeys(range(len(ids)), "")
        examples.append(eval_superglue.Example(f"CB {i}", "CB", "", labels, [0], None, prompt, ids))
    return examples


def our_options(examples, model) -> dict[str, list[float]]:
    args = eval_superglue.build_parser().parse_args(["score", "CB=", "--model", "", "--output_dir", ""])
    batches = eval_superglue.batches_of(examples, args)
    return {x["id"]: x["scores"] for batch in batches for x in eval_superglue.score_options(model, batch, args)}


@torch.no_grad()
def plain_options(examples, model) -> dict[str, list[float]]:
    scores = {}
    for e in examples:
        for option in e.option_ids:
            ids = torch.tensor([e.prompt_ids + option], device=model.device)
            log_p = model(ids).logits[0, -len(option) - 1 : -1].float().log_softmax(-1)
            score = log_p.gather(1, ids[0, -len(option) :, None]).mean().item()
            scores.setdefault(e.id, []).append(score)
    return scores


def timed(function, model, cudnn: bool) -> tuple[dict, dict]:
    """What a side found, and its seconds, steps and peak memory."""
    cuda, steps = model.device.type == "cuda", []
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = function()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    hook.remove()
    return found, {"s": seconds, "steps": len(steps), "gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0}


def compare(rows: list, plain, ours, model, args) -> tuple[dict, dict, dict]:
    """Both sides' findings, and the speed of each."""
    sides, half = {"plain": [], "ours": []}, (len(rows) // 2 + 7) // 8 * 8
    for part in (rows[:half], rows[half:]):
        sides["plain"].append(timed(partial(plain, part), model, args.plain_cudnn))
        sides["ours"].append(timed(partial(ours, rows), model, False))
    speed = {}
    for side, runs in sides.items():
        add = sum if side == "plain" else statistics.mean
        seconds, steps = (add([run[name] for _, run in runs]) for name in ("s", "steps"))
        speed[side] = {
            "rows_per_s": len(rows) / seconds,
            "s": seconds,
            "steps": steps,
            "ms_per_step": 1e3 * seconds / steps,
        }
        speed[side] |= {"peak_gb": max(run["gb"] for _, run in runs), "s_of_each": [run["s"] for _, run in runs]}
    speed["ratio"] = speed["ours"]["rows_per_s"] / speed["plain"]["rows_per_s"]
    return sides["plain"][0][0] | sides["plain"][1][0], sides["ours"][1][0], speed


def measure_maths(model, tokenizer, room, args) -> dict:
    rows, ends = maths_rows(args, model.config.vocab_size), {}
    if not args.model:
        ends = dict(enumerate(lengths(len(rows), math.log(110), 0.5, 16, args.max_new_tokens, 2)))
    eval_math.Batch = Watched  # generate makes one
    sides = [partial(f, model=model, tokenizer=tokenizer, room=room, args=args) for f in (plain_maths, our_maths)]
    for side, some in zip(sides, (rows[:8], rows), strict=True):  # kernels are chosen, memory pools grow
        side(some, ends={row.number: 3 for row in rows})
    plain, ours, speed = compare(rows, *(partial(side, ends=ends) for side in sides), model, args)
    same = [next((i for i, (a, b) in enumerate(zip(plain[n], ours[n], strict=False)) if a != b), None) for n in plain]
    tokens = [len(x) for x in plain.values()]
    return speed | {
        "rows": len(rows),
        "same": sum(i is None for i in same) / len(rows),
        "same_tokens": sum(n if i is None else i for i, n in zip(same, tokens, strict=True)) / sum(tokens),
        "mean_new_tokens": sum(tokens) / len(rows),
        "longest": max(tokens),
    }


def measure_options(model, args) -> dict:
    examples = option_rows(args, model.config.vocab_size)
    sides = [partial(f, model=model) for f in (plain_options, our_options)]
    for side, some in zip(sides, (examples[:8], examples), strict=True):
        side(some)
    plain, ours, speed = compare(examples, *sides, model, args)
    pairs = [(a, b) for id in plain for a, b in zip(plain[id], ours[id], strict=True)]
    best = [plain[id].index(max(plain[id])) == ours[id].index(max(ours[id])) for id in plain]
    largest = max(abs(a - b) for a, b in pairs)
    return speed | {"rows": len(examples), "same": sum(best) / len(best), "score_difference": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--model", help="folder or hub id of a causal LM, or folder of an adapter, in place of --shape")
    add("--questions", help="a set or a file of eval_math.py; then beside --shape also --tokenizer")
    add("--tokenizer", help="folder or hub id")
    add("--rows", type=int, default=96, help="maths questions")
    add("--options", type=int, default=200, help="prompts with options")
    add("--max_new_tokens", type=int, default=512)
    add("--max_tokens_per_batch", type=int, default=65536, help="of eval_math.py")
    add("--plain_cudnn", action="store_true", help="cuDNN's attention for the plain side")
    add("--output", default="eval_speed.json")
    args = parser.parse_args()
    if args.questions and not (args.model or args.tokenizer):
        parser.error("--questions needs --model or --tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.questions:  # a bad file is told before anything is measured
            maths_rows(args, vocab=0)
        model, tokenizer, room = make_model(args, device)
    except UserError as error:  # no model, or a bad file of questions
        parser.error(str(error))
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    result = {"card": card, "versions": versions, "flags": vars(args)}
    print(f"{result}\n{'':<8} {'side':<6} {'rows/s':>8} {'seconds':>8} {'steps':>6} {'ms/step':>8} {'peak GB':>8}")
    measures = {"options": partial(measure_options, model, args)}
    measures["maths"] = partial(measure_maths, model, tokenizer, room, args)
    for name, measure in measures.items():
        result[name] = found = measure()
        for side in ("plain", "ours"):
            x = found[side]
            line = f"{name:<8} {side:<6} {x['rows_per_s']:>8.2f} {x['s']:>8.2f} {x['steps']:>6.0f}"
            print(f"{line} {x['ms_per_step']:>8.1f} {x['peak_gb']:>8.1f}")
        print(f"{name}: {', '.join(f'{k} {v:.4g}' for k, v in found.items() if not isinstance(v, dict))}", flush=True)
        Path(args.output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
