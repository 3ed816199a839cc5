"""Draw the split of a training step from the JSON of step_time.py, one PNG beside each file.

python benchmarks/plot_step_time.py benchmarks/results/step_time_phi2_h200.json
"""

import json
import sys
from pathlib import Path

PARTS = {"probe_s": "probe", "select_s": "selection", "train_s": "training", "optimizer_s": "clipping and optimizer"}


def draw(path: Path) -> Path:
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("error: the picture needs a package: pip install matplotlib")
    result = json.loads(path.read_text())
    names, left = list(result["medians"])[::-1], [0.0] * len(result["medians"])
    seen: set[str] = set()
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(names) + 1.6), layout="constrained")
    for part, label in PARTS.items():
        seconds = [result["medians"][name][part] for name in names]
        axes.barh(names, seconds, left=left, label=label)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for y, name in enumerate(names):
        row = result["medians"][name]
        axes.text(left[y], y, f" {row['step_s']:.2f} s, {row['peak_gb']:.1f} GB", va="center")
        if row["ideal_s"]:
            axes.plot([row["ideal_s"]] * 2, [y - 0.4, y + 0.4], "k--", label=None if "ideal" in seen else "ideal")
            seen.add("ideal")
    axes.set(xlim=(0, 1.25 * max(left)), xlabel="seconds a step (median)")
    axes.set_title(f"{result['shape']} on {result['card']} {' '.join(result['flags'])}", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(PARTS) + 1)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return path.with_suffix(".png")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(draw(Path(argument)))
