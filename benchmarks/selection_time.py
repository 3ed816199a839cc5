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
from colm_core import AdamMoments, PoolGradients, select_coreset, sparse_features

DIMS, H, KEEP = 2560 * 128, 2560, set(range(7))


def select(gradients: PoolGradients, sources: torch.Tensor, k: int, moments: AdamMoments, device) -> None:
    probed = (sources >= 7).nonzero()[:, 0]
    present, local = sources[probed].unique(return_inverse=True)
    own = sparse_features(gradients, local, len(present), moments, H, device)
    features = own.new_zeros(len(sources), own.shape[1])
    features[probed.to(device)] = own
    coreset = select_coreset(features, sources, k, KEEP, H)
    chosen = torch.isin(probed, coreset.index)
    moments.update_from_sums(*gradients.sums(chosen, device), int(chosen.sum()))


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, D = {DIMS}, h = {H}")
    share = torch.tensor([0.24 / 7] * 7 + [0.76 / 6] * 6)
    for n in (128, 1024, 4096):
        sources = torch.multinomial(share, n, replacement=True)
        probed = int((sources >= 7).sum())
        for kind in ("spsa", "grad"):
            if kind == "spsa":
                z = torch.randn(1, DIMS, generator=generator, device=device)
                gradients = PoolGradients(DIMS, torch.randn(probed, 1, generator=generator, device=device), z)
            else:
                gradients = PoolGradients(DIMS)
                for start in range(0, probed, 32):
                    rows = min(32, probed - start)
                    gradients.add(torch.randn(rows, DIMS, generator=generator, device=device))
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
