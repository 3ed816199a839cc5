"""How well SPSA's central differences follow the exact directional derivative, by precision of the perturbed tail.

    python benchmarks/spsa_precision.py --shape phi-2

Over a pool of 128 rows: correlation and relative error of the derivative against <G_i, z> of the exact probe, for a
narrow tail (the model's own precision) and a wide one (the next precision; beside bf16, train_colm.py allows TF32).
"""

from __future__ import annotations

import argparse

import torch
from step_time import SHAPES, make_run, timed

import train_colm
from colm_batches import micro_batch_losses

TAILS = {"narrow": (False, False), "wide, TF32": (True, True), "wide": (True, False)}  # (wide_tail, TF32 allowed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    own, flags = parser.parse_known_args()
    try:
        run = make_run(own.shape, train_colm.build_parser().parse_args(flags))
    except train_colm.UserError as error:  # a bad flag of the trainer
        parser.error(str(error))
    run.set_training(False)
    cuda = run.device.type == "cuda"
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1e-3)  # as if some steps had been made
    z = train_colm.directions(run.args, run.probe, 0, run.device)
    batches = [
        batch for _, batch, _ in run.micro_batches(run.train, torch.arange(128), train_colm.probe_budget(run.args))
    ]

    def over_pool(probe):
        def losses(batch):
            with run.accelerator.autocast():
                return micro_batch_losses(run.inner, run.labelled_logits, batch)

        return torch.cat([probe(lambda batch=batch: losses(batch), batch.per_example) for batch in batches])

    def measured(probe) -> str:
        timed(lambda: over_pool(probe), run.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = min(timed(lambda: over_pool(probe), run.device) for _ in range(3))
        return f"{seconds:.3f} s" + (f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "")

    print(
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {own.shape} {' '.join(flags)}"
    )
    print(f"{'forward alone':<16} {measured(torch.no_grad()(lambda losses, _: losses()[0]))}")
    print(f"{'exact gradients':<16} {measured(run.probe.gradients)}")
    exact = over_pool(run.probe.gradients) @ z[0].flatten()
    for name, (wide, tf32) in TAILS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32

        def spsa(losses, _, wide=wide):
            return run.probe.spsa(losses, z, run.args.spsa_eps, wide)

        both = torch.stack([over_pool(spsa)[:, 0], exact]).double()
        error = (both[0] - both[1]).norm() / both[1].norm()
        print(f"SPSA, {name:<10} {measured(spsa)}  correlation {both.corrcoef()[0, 1]:.4f}  relative error {error:.4f}")


if __name__ == "__main__":
    main()
