"""Histograms of a data set as pictures: one question each, with units, readable without the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError
from megamm.prepare.stats import SECONDS_UNIT, SIDE_EDGES, Counts, DatasetStats, DataStats, PackingStats

# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_NUM_BINS = 48
_MAX_NAMES = len(_COLOURS)
_STYLE = {
    "figure.figsize": (8.0, 4.5),
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 10,
    "legend.frameon": False,
}


def write_plots(stats: DataStats, folder: Path) -> list[Path]:
    """Draw what there is to draw into `folder`.

    Returns:
        The files, those only that have something to show.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib; pip install 'megamm[plots]', or leave --output out for the table alone") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context({**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=_COLOURS)}):
        for name, figure in _figures(stats):
            path = folder / f"{name}.png"
            figure.savefig(path)
            pyplot.close(figure)
            written.append(path)
    return written


def _figures(stats: DataStats):
    datasets = stats.datasets
    if any(one.tokens and one.tokens.num for one in datasets):
        limit = (stats.packing.row_tokens, "a row") if stats.packing else None
        yield "tokens", _lengths(datasets, "tokens", "Length of samples", "tokens", limit)
    if any(one.num_pictures for one in datasets):
        yield "pictures", _pictures(datasets)
    if any(one.seconds.num for one in datasets):
        limit = (stats.max_seconds, "max_seconds") if stats.max_seconds else None
        yield "seconds", _lengths(datasets, "seconds", "Length of sounds", "seconds", limit)
    if any(one.task_tokens for one in datasets):
        yield "tasks", _tasks(datasets)
    if stats.packing is not None:
        yield "packing", _packing(stats.packing)
        yield "row_costs", _row_costs(stats.packing)


def _lengths(datasets: Sequence[DatasetStats], name: str, title: str, unit: str, limit: tuple[float, str] | None):
    """Share of each dataset's samples by length, on logarithmic bins; a line a dataset."""
    figure, axes = _new()
    counted: list[tuple[DatasetStats, Counts]] = [(one, getattr(one, name)) for one in datasets if getattr(one, name).num]
    low = min(_smallest(counts) for _, counts in counted)
    high = max((len(counts.counts) - 1) * counts.unit for _, counts in counted)
    edges = _log_edges(low, max(high, low * 1.1), SECONDS_UNIT if name == "seconds" else 1.0)
    names = sorted({one.name for one, _ in counted}, key=lambda name: -max(counts.num for one, counts in counted if one.name == name))
    for one, counts in counted:
        if one.name in names[:_MAX_NAMES]:
            values = np.arange(len(counts.counts)) * counts.unit
            shares = np.histogram(values, bins=edges, weights=counts.counts)[0] / counts.num
            label = f"{_label(one)}  (n = {counts.num:,}, median {counts.quantile(0.5):g})"
            line = {"color": _COLOURS[names.index(one.name)], "linestyle": ":" if one.part == "held_out" else "-"}
            axes.stairs(100 * shares, edges, label=label, linewidth=1.6, **line)
    if limit is not None:
        axes.axvline(limit[0], color="#444444", linestyle="--", linewidth=1)
        axes.annotate(
            f"{limit[1]}: {limit[0]:g} ", (limit[0], 1), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90, fontsize=9
        )
    axes.set(xscale="log", xlabel=f"{unit} a {'sound' if name == 'seconds' else 'sample'}", ylabel="% of the dataset", title=title)
    _plain_ticks(axes.xaxis)
    axes.set_ylim(bottom=0)
    _legend(axes, f"the {_MAX_NAMES} largest of {len(names)} datasets" if len(names) > _MAX_NAMES else None)
    return figure


def _pictures(datasets: Sequence[DatasetStats]):
    """Width against height, all datasets together."""
    figure, axes = _new((6.4, 5.4))
    sides = sum(one.sides for one in datasets)
    assert isinstance(sides, np.ndarray)
    from matplotlib.colors import LogNorm

    mesh = axes.pcolormesh(SIDE_EDGES, SIDE_EDGES, np.ma.masked_equal(sides.T, 0), norm=LogNorm(1, max(2, sides.max())), cmap="viridis")
    used = np.flatnonzero(sides.sum(0) + sides.sum(1))
    low, high = SIDE_EDGES[max(0, used[0] - 2)], SIDE_EDGES[min(len(SIDE_EDGES) - 1, used[-1] + 3)]
    axes.plot([low, high], [low, high], color="#444444", linestyle="--", linewidth=1)
    axes.annotate("square", (low, low), textcoords="offset points", xytext=(14, 4), fontsize=9, color="#444444")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="width in pixels", ylabel="height in pixels", title=f"Size of {int(sides.sum()):,} pictures")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    figure.colorbar(mesh, ax=axes, label="pictures a bin", shrink=0.9)
    return figure


def _tasks(datasets: Sequence[DatasetStats]):
    """Tokens a task, parts side by side."""
    parts = sorted({one.part for one in datasets if one.task_tokens}, reverse=True)
    tokens = {part: {} for part in parts}
    for one in datasets:
        for task, num in one.task_tokens.items():
            tokens[one.part][task] = tokens[one.part].get(task, 0) + num
    totals = {part: sum(own.values()) or 1 for part, own in tokens.items()}
    tasks = sorted({task for own in tokens.values() for task in own}, key=lambda task: tokens[parts[0]].get(task, 0))
    figure, axes = _new((8.0, 1.4 + 0.5 * len(tasks) * max(1, len(parts) * 0.7)))
    height = 0.8 / len(parts)
    for number, part in enumerate(parts):
        own = [tokens[part].get(task, 0) for task in tasks]
        places = np.arange(len(tasks)) + (len(parts) - 1 - 2 * number) / 2 * height
        bars = axes.barh(places, [100 * num / totals[part] for num in own], height, label=part.replace("_", " ") or "shards")
        axes.bar_label(bars, [f"{_short(num)} tokens" if num else "" for num in own], padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(tasks)), [task.replace("_", " ") for task in tasks])
    axes.set(xlabel="% of the part's tokens", title="Tokens by task, one pass over every dataset")
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    if len(parts) > 1:
        axes.legend(loc="lower right")
    return figure


def _packing(packing: PackingStats):
    """How full the rows of each window are."""
    figure, axes = _new()
    for name, fill in packing.fills.items():
        if max(fill) > 0:
            label = f"{name}, mean {100 * np.mean(fill):.1f} %"
            axes.plot(np.arange(len(fill)), 100 * np.array(fill), marker=".", linewidth=1.2, label=label)
    axes.set(xlabel="window of positions", ylabel="% of the rows' capacity", title="How full packed rows are", ylim=(0, 103))
    _legend(axes)
    return figure


def _row_costs(packing: PackingStats):
    """Estimated cost of rows relative to their mean."""
    figure, axes = _new()
    costs = np.array(packing.row_costs)
    relative = costs / (costs.mean() or 1.0)
    axes.hist(relative, bins=_NUM_BINS, color=_COLOURS[0])
    axes.axvline(1, color="#444444", linestyle="--", linewidth=1)
    ranks = [f"{size} ranks: costliest / mean {ratio:.3f}" for size, ratio in packing.balance.items()]
    text = "\n".join([f"{len(costs):,} rows, most {relative.max():.2f} × mean", *ranks])
    axes.annotate(text, (0.02, 0.95), xycoords="axes fraction", ha="left", va="top", fontsize=9)
    axes.set(xlabel="estimated cost of a row, mean = 1", ylabel="rows", title="Cost of rows before they are dealt to ranks")
    return figure


def _new(size: tuple[float, float] | None = None) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size)


def _log_edges(low: float, high: float, unit: float) -> np.ndarray:
    """Bins that grow with the value and are no finer than what is counted, half a unit beside the values."""
    edges = np.geomspace(low, high + unit, _NUM_BINS + 1) / unit
    return (np.unique(np.rint(edges)) - 0.5) * unit


def _smallest(counts: Counts) -> float:
    return max(1, int(np.flatnonzero(counts.counts)[0])) * counts.unit


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10 … in plain digits instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, title: str | None = None) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), title=title, fontsize=9, ncols=2)


def _label(one: DatasetStats) -> str:
    return f"{one.name} (held out)" if one.part == "held_out" else one.name


def _short(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
