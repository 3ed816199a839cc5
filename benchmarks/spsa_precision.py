"""How well SPSA's central differences follow the exact directional derivative, by precision of the perturbed tail.

    python benchmarks/spsa_precision.py --shape phi-2

Prints, for bf16, TF32 and float32 tails, the correlation over a pool with <G_i, z> from the exact probe, and the time.
"""

from __future__ import annotations

import argparse
import os

import torch
import transformers
from step_time import SHAPES, synthetic_rows, timed

import train_colm
from colm_core import example_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    own, flags = parser.parse_known_args()
    args = train_colm.build_parser().parse_args(flags)
    args.max_steps = 1000
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    accelerator = train_colm.make_accelerator(args)
    device = accelerator.device
    config_class, sizes = SHAPES[own.shape]
    config = config_class(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = train_colm.add_lora(model, args)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=1e-3)  # as if some steps had been made
    lengths = (torch.randn(128) * 0.55 + 5.25).exp().clamp(48, 512).long()
    run = train_colm.build_run(
        args, accelerator, None, model, synthetic_rows(sizes["vocab_size"], lengths), None, set()
    )
    run.model.eval()
    z = train_colm.directions(args, run.probe, 0, device)
    batches = list(run.micro_batches(run.train, list(range(128)), 2 * args.max_tokens_per_micro_batch))

    def losses(batch):
        with accelerator.autocast():
            return example_losses(run.inner, run.hook, batch)

    def probe(function):
        return torch.cat([function(lambda batch=batch: losses(batch), batch) for _, batch, _ in batches])

    exact = probe(run.probe.gradients) @ z[0].flatten()

    @torch.no_grad()
    def forward():
        for _, batch, _ in batches:
            losses(batch)

    for _ in range(2):
        seconds = timed(forward, device)
    print(f"forward alone {seconds:.3f} s")
    for _ in range(2):
        seconds = timed(lambda: probe(run.probe.gradients), device)
    print(f"exact gradients {seconds:.3f} s")
    for name, float32, tf32 in (("bf16", False, False), ("tf32", True, True), ("float32", True, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        spsa = lambda f, _: run.probe.spsa(f, z, args.spsa_eps, float32)  # noqa: E731, B023
        values = probe(spsa)[:, 0]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: probe(spsa), device)  # noqa: B023
        both = torch.stack([values.double(), exact.double()])
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0
        error = ((both[0] - both[1]).norm() / both[1].norm()).item()
        print(
            f"{name:<8} correlation {both.corrcoef()[0, 1]:.4f}  relative error {error:.4f}  {seconds:.3f} s  {peak:.1f} GB"
        )


if __name__ == "__main__":
    main()
