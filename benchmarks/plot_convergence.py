"""Figures from the JSON of benchmarks/convergence.py: loss against steps and seconds, matching error against steps.

    python benchmarks/plot_convergence.py convergence.json --measure eval_loss_source_mean

writes convergence-steps.png, convergence-seconds.png and convergence-matching.png beside the JSON, as far as it has
what they show. Lines are means over seeds, bands one standard deviation to either side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

MEASURES = {
    "eval_loss_source_mean": "held-out loss, mean over sources",
    "eval_loss_per_token": "held-out loss per token",
    "eval_loss": "held-out loss per example",
    "small_sources": "held-out loss of small sources",
}


def curve(records: list[list[dict]], x: str, y: str) -> tuple[list[float], list[float], list[float]]:
    """Mean x, mean y and standard deviation of y over the seeds, at each point that all of them have."""
    points = [[(r[x], r[y]) for r in one if r.get(y) is not None] for one in records]
    columns = list(zip(*points, strict=False))
    xs = [statistics.fmean(p[0] for p in column) for column in columns]
    ys = [statistics.fmean(p[1] for p in column) for column in columns]
    return xs, ys, [statistics.stdev([p[1] for p in c]) if len(c) > 1 else 0.0 for c in columns]


def draw(plt, runs: dict[str, list[dict]], part: str, x: str, lines: list[tuple], labels: tuple[str, str], path: Path):
    """One figure, if there is anything to draw. `lines` are (key, style, a legend entry of its own or None)."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, group) in enumerate(runs.items()):
        for key, style, what in lines:
            xs, ys, sd = curve([run[part] for run in group], x, key)
            if xs:
                look = {"color": f"C{i % 10}", "lw": 1.5 if i < 10 else 3}
                axes.plot(xs, ys, style, label=None if what else label, **look)
                low, high = [y - s for y, s in zip(ys, sd, strict=True)], [y + s for y, s in zip(ys, sd, strict=True)]
                axes.fill_between(xs, low, high, color=look["color"], alpha=0 if what else 0.12, lw=0)
    if axes.lines:
        for _, style, what in lines:
            axes.plot([], [], style, color="grey", label=what)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside right upper")
        figure.savefig(path, dpi=150)
        print(path)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--measure", choices=MEASURES, default="eval_loss_source_mean")
    parser.add_argument("--labels", nargs="+", help="draw these alone, such as full-64 random@64")
    parser.add_argument("--from_start", action="store_true", help="draw the loss before training, too")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(args.results.read_text())
    known = list(dict.fromkeys(run["label"] for run in result["runs"]))
    if unknown := [label for label in args.labels or () if label not in known]:
        sys.exit(f"error: --labels {' '.join(unknown)} is not in the file, which has {', '.join(known)}")
    for run in result["runs"]:
        run["eval"] = run["eval"][int(not args.from_start) :]
    runs = {label: [run for run in result["runs"] if run["label"] == label] for label in args.labels or known}
    stem = args.results.with_suffix("")
    axes = {"step": "steps", "seconds": f"seconds of training ({', '.join(result['timed_on'] or result['card'])})"}
    for x in result["axes"]:
        path = Path(f"{stem}-{'steps' if x == 'step' else x}.png")
        draw(plt, runs, "eval", x, [(args.measure, "-", None)], (axes[x], MEASURES[args.measure]), path)
    lines = [("error", "-", None), ("structure_error", ":", "random coresets of\nthe same structure")]
    draw(plt, runs, "match", "step", lines, ("steps", "matching error"), Path(f"{stem}-matching.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
