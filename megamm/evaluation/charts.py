"""Charts of an evaluation: confusion matrices, precision-recall curves, figures under changed media. All need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamm.evaluation.robustness import ChangeRow
from megamm.metrics.classes import Confusion

MAX_CLASSES = 40
"""More of them are not legible."""
_PANELS_A_ROW = 3
_LEGENDS_A_COLUMN = 20
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Curve:
    """Precision over recall of one class, both float[n], from the highest recall down, and what the legend says of it."""

    legend: str
    recalls: Sequence[float]
    precisions: Sequence[float]


def precision_chart(curves: Sequence[Curve], name: str, *, what: str) -> bytes:
    """Precision-recall curves as PNG; `what` says what counts as found."""
    from matplotlib import pyplot

    shown = curves[:MAX_CLASSES]
    num_columns = -(-len(shown) // _LEGENDS_A_COLUMN)
    figure, axes = pyplot.subplots(figsize=(5.5 + 3.0 * num_columns, 4.5), dpi=120, layout="constrained")
    for number, one in enumerate(shown):
        # Ten colours in a round: what would share one differs in its dashes.
        dashes = _DASHES[number // 10 % len(_DASHES)]
        # Steps, whose area is the average precision: a line to the next point would promise what no threshold gives.
        axes.plot(one.recalls, one.precisions, label=one.legend, linewidth=1.6, linestyle=dashes, drawstyle="steps-post")
    axes.set(xlabel=f"recall{what}", ylabel="precision", title=name, xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=num_columns)
    axes.grid(alpha=0.3)
    return _png(figure)


def confusion_chart(confusion: Confusion, name: str) -> bytes:
    """A confusion matrix as PNG: shares by colour, counts as numbers."""
    from matplotlib import pyplot

    counts, known = np.array(confusion.counts, dtype=float), len(confusion.classes)
    # All answers that are no class share one column.
    counts = np.concatenate([counts[:, :known], counts[:, known:].sum(axis=1, keepdims=True)], axis=1)
    columns = [*confusion.classes, "(other)"]
    shares = counts / counts.sum(axis=1, keepdims=True)
    side = 2.5 + 0.42 * known
    figure, axes = pyplot.subplots(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(known + 1), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(known), confusion.classes, fontsize=8)
    axes.set(xlabel="answer", ylabel="reference", title=name)
    figure.colorbar(drawn, ax=axes, label="share of the class", shrink=0.8)
    return _png(figure)


def robustness_chart(rows: Sequence[ChangeRow], name: str) -> bytes:
    """A task's own figure as PNG, a panel a change: with its interval at each strength, beside the clean one."""
    from matplotlib import pyplot

    changes = list(dict.fromkeys(row.change for row in rows))
    num_columns = min(_PANELS_A_ROW, len(changes))
    num_rows = -(-len(changes) // num_columns)
    size = 3.2 * num_columns, 2.6 * num_rows
    figure, panels = pyplot.subplots(num_rows, num_columns, figsize=size, dpi=120, layout="constrained", sharey=True, squeeze=False)
    for axes, change in zip(panels.flat, changes, strict=False):
        own = [row for row in rows if row.change == change and row.value is not None]
        places = range(len(own))
        values = [row.value for row in own]
        below = [0.0 if row.low is None else max(0.0, row.value - row.low) for row in own]
        above = [0.0 if row.high is None else max(0.0, row.high - row.value) for row in own]
        axes.errorbar(places, values, yerr=[below, above], marker="o", capsize=3, linewidth=1.4, color="#0072b2", label="changed")
        axes.plot(places, [np.nan if row.clean is None else row.clean for row in own], "--", color="#555555", label="clean")
        axes.set_xticks(places, [f"{row.strength:g}" for row in own], fontsize=8)
        axes.set_title(change, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(changes) :]:
        axes.set_axis_off()
    panels[0, 0].set_ylabel(rows[0].metric)
    panels[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(name, fontsize=10)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png")
    pyplot.close(figure)
    return file.getvalue()
