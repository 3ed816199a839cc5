"""Time of everything between probe and training - normalise, sparsify, medoids, history - for growing pools.

    python benchmarks/selection_time.py

The pool's gradients stand ready as SPSA derivatives (one direction) or as exact rows; 13 sources, of which 7 hold 24 %
of the rows and are kept whole; half of the pool is selected. Prints seconds and, on a GPU, the memory beyond them.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from colm_core import AdamMoments, select_coreset, sparsify
from train_colm import PoolGradients

DIMS, H, KEEP = 2560 * 128, 2560, set(range(7))


def select(gradients: PoolGradients, sources: torch.Tensor, k: int, moments: AdamMoments, device) -> None:
    """Steps 4 to 6 of `train_colm.choose_coreset`."""
    probed = sources >= 7
    features = torch.zeros(len(sources), H, device=device)
    for source in sources[probed].unique().tolist():
        of_source = probed & (sources == source)
        features[of_source] = sparsify(moments.normalize(gradients.of(of_source)), H)
    coreset = select_coreset(features, sources, k, KEEP, H)
    medoids = torch.zeros_like(probed)
    medoids[coreset.index] = True
    moments.update(gradients.of(medoids & probed))


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, D = {DIMS}, h = {H}")
    share = torch.tensor([0.24 / 7] * 7 + [0.76 / 6] * 6)
    for n in (128, 1024, 4096):
        sources = torch.multinomial(share, n, replacement=True)
        for kind in ("spsa", "grad"):
            z = torch.randn(1, DIMS, generator=generator, device=device) if kind == "spsa" else None
            width = 1 if kind == "spsa" else DIMS
            values = torch.randn(n, width, generator=generator, device=device)
            gradients = PoolGradients(values, sources >= 7, z)
            moments, times = AdamMoments(), []
            base = torch.cuda.memory_allocated() if cuda else 0
            for _ in range(4 if n <= 1024 or cuda else 2):
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                begin = time.perf_counter()
                select(gradients, sources, n // 2, moments, device)
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            peak = (
                f", peak {(torch.cuda.max_memory_allocated() - base) / 1e9:.2f} GB above {base / 1e9:.2f}"
                if cuda
                else ""
            )
            print(f"N = {n:<5} {kind}  {statistics.median(times[1:]):.4f} s{peak}")


if __name__ == "__main__":
    main()
