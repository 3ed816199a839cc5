"""Figures from the JSON of benchmarks/convergence.py: loss against cost in each regime, and which rows were taken.

    python benchmarks/plot_convergence.py regime_map.json --budget cost --settings full-64-sqrt colm-grad-sqrt

writes regime_map-cost.png, a row of panels for each regime, and regime_map-cost-taken.png, a panel for each mark,
beside the JSON. Lines are means over the seeds of the best rate, bars one standard deviation to either side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from convergence import MEASURES, chosen_runs  # noqa: E402

AXES = {"cost": ("M tokens trained + price x M tokens probed", 1e6), "steps": ("steps", 1)}


def summary(columns: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each column, over the runs."""
    means = [statistics.fmean(column) for column in columns]
    deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return means, deviations


def draw_losses(plt, groups: list[list[dict]], budget: str, path: Path) -> None:
    regimes = list(dict.fromkeys(group[0]["regime"] for group in groups))
    settings = list(dict.fromkeys(group[0]["setting"] for group in groups))
    label, scale = AXES[budget]
    size = (3.3 * len(MEASURES) + 0.5, 2.5 * len(regimes) + 0.6)
    figure, axes = plt.subplots(len(regimes), len(MEASURES), figsize=size, squeeze=False, layout="constrained")
    for group in groups:
        setting, row = group[0]["setting"], regimes.index(group[0]["regime"])
        evals = list(zip(*(run["eval"] for run in group), strict=False))  # [evaluations][seeds]
        xs = [statistics.fmean(record["spent"] for record in seeds) / scale for seeds in evals]
        for column, measure in enumerate(MEASURES):
            ys, deviations = summary([[record["report"][column] for record in seeds] for seeds in evals])
            number = settings.index(setting)
            look = {"color": f"C{number % 10}", "marker": "os^Dv"[number % 5], "ms": 3.5, "lw": 1.2, "capsize": 2}
            axes[row][column].errorbar(xs, ys, deviations, label=setting, **look)
            axes[row][column].set(title=f"{regimes[row]}: {measure}", xlabel=label if row + 1 == len(regimes) else "")
            axes[row][column].title.set_size(9)
            axes[row][column].xaxis.label.set_size(8)
            axes[row][column].grid(alpha=0.3)
    legend_below(figure, axes, 4)
    save(plt, figure, path)


def draw_taken(plt, groups: list[list[dict]], path: Path) -> None:
    panels = list(dict.fromkeys((group[0]["regime"], mark) for group in groups for mark in group[0]["taken"]))
    if not panels:
        return
    settings = list(dict.fromkeys(group[0]["setting"] for group in groups))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5), squeeze=False, layout="constrained")
    for (regime, mark), axis in zip(panels, axes[0], strict=True):
        for group in groups:
            if group[0]["regime"] != regime:
                continue
            shares = list(zip(*(run["taken"][mark] for run in group), strict=True))  # [8][seeds]
            if not any(None in seeds for seeds in shares):
                setting = group[0]["setting"]
                color = f"C{settings.index(setting) % 10}"
                axis.plot(range(1, 9), summary(shares)[0], color=color, marker="o", ms=3, label=setting)
        axis.set(title=f"{regime}: share of {mark} among rows not kept", xlabel="eighth of the run")
        axis.title.set_size(9)
        axis.grid(alpha=0.3)
    legend_below(figure, axes, 3 * len(panels))
    save(plt, figure, path)


def legend_below(figure, axes, columns: int) -> None:
    """One legend for all panels: each setting has one colour in all of them."""
    handles = {}
    for axis in axes.flat:
        handles |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=7)


def save(plt, figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--budget", choices=AXES, default="cost")
    parser.add_argument("--settings", nargs="+", help="draw these alone, in this order")
    parser.add_argument("--regimes", nargs="+", help="draw these alone, in this order")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [*chosen_runs(json.loads(args.results.read_text())["runs"]).values()]
    groups = [group for group in groups if group[0]["budget"] == args.budget]
    for key, wanted in {"setting": args.settings, "regime": args.regimes}.items():
        if not wanted:
            continue
        known = {group[0][key] for group in groups}
        if unknown := [name for name in wanted if name not in known]:
            sys.exit(f"error: --{key}s {' '.join(unknown)} is not in the file, which has {', '.join(sorted(known))}")
        groups = [group for name in wanted for group in groups if group[0][key] == name]
    stem = args.results.with_suffix("")
    if groups:
        draw_losses(plt, groups, args.budget, Path(f"{stem}-{args.budget}.png"))
        draw_taken(plt, groups, Path(f"{stem}-{args.budget}-taken.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
