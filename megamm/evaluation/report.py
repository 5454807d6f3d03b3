"""What an evaluation found: rows of figures with their intervals beside chance, classes, confusions, and what was skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError, DataError
from megamm.core.files import read_json, write_json, write_text
from megamm.core.tables import markdown
from megamm.evaluation.figures import answer_figures, finite, grouped, interval_of, score_figures, value_of
from megamm.evaluation.progress import FOLDER
from megamm.evaluation.records import Answered, Record, Scored, SkippedSample
from megamm.evaluation.robustness import ChangeRow
from megamm.metrics.classes import ClassScore, Confusion, confusion
from megamm.metrics.coco import ClassPrecision
from megamm.tasks import TASKS, Figure
from megamm.tasks.reply import Reply

REPORT_JSON, REPORT_MARKDOWN, PREDICTIONS = "report.json", "report.md", "predictions.jsonl"
PICTURE_KINDS = ("samples-", "confusion-", "precision-", "robustness-")
_NUM_UNKNOWN = 5
_NO_LABEL = "(none or several)"
_MOST_NUMBERS = 12
LABEL = "label"
"""The slice of a sample's reference, where no metadata field is called so."""
ALL = ""
"""The slice of a row that is over all samples."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        dataset: Name of the held-out dataset.
        task: Name of the task.
        slice: `field=value` of the samples' metadata; empty for all samples.
        samples: Samples that it is over.
        metric: Its name.
        value: None where it is not a finite number.
        low: Lower end of its 95 % interval by bootstrap over samples; None where there is none.
        high: Upper end.
        chance: What the best guess without looking gets on the same samples; None where that means nothing.
    """

    dataset: str
    task: str
    slice: str
    samples: int
    metric: str
    value: float | None
    low: float | None
    high: float | None
    chance: float | None


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found.

    Attributes:
        source: The checkpoint or exported folder that was evaluated.
        step: Its optimizer steps; None for an exported folder.
        settings: How it was evaluated.
        rows: By dataset, task and slice.
        unfinished: `dataset/task` -> answers that `max_new_tokens` cut off.
        malformed: `dataset/task` -> boxes and instances in answers that follow no layout.
        problems: `dataset/task` -> why there are no figures.
        unknown: `dataset/task` -> label -> predicted places with this label, which no reference has.
        unmatched: What was asked for and matches nothing, in words.
        classes: `dataset/task` -> how each class fares, where answers are classes.
        precisions: `dataset/task` -> how each class fares, where answers are places.
        confusions: `dataset/task` -> its confusion matrix, where answers are classes.
        robustness: Rows of changed pictures and sounds, where these were asked for.
        skipped: Samples that count in no row.
        records: One entry a sample that counts.
    """

    source: str
    step: int | None
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    unfinished: dict[str, int]
    malformed: dict[str, int]
    problems: dict[str, str]
    unknown: dict[str, dict[str, int]]
    unmatched: tuple[str, ...]
    classes: dict[str, tuple[ClassScore, ...]]
    precisions: dict[str, tuple[ClassPrecision, ...]]
    confusions: dict[str, Confusion]
    robustness: tuple[ChangeRow, ...]
    skipped: tuple[SkippedSample, ...]
    records: tuple[Record, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the records."""
        return {name: value for name, value in asdict(self).items() if name != "records"}

    def to_markdown(self) -> str:
        """Tables of the rows and of the classes, and the skipped samples."""
        header = ("dataset", "task", "slice", "samples", "metric", "value", "95 % interval", "chance")
        lines = [f"# Evaluation of {self.source}", "", *markdown(header, [_cells(row) for row in self.rows])]
        lines += [f"\n{count} answers of {name} were cut off." for name, count in self.unfinished.items() if count]
        lines += [f"\n{count} boxes or instances in answers of {name} follow no layout." for name, count in self.malformed.items() if count]
        lines += [f"\n{name} has no figures: {problem}." for name, problem in self.problems.items()]
        lines += [f"\n{_unknown(name, counts)}" for name, counts in self.unknown.items() if counts]
        lines += [f"\n{words}." for words in self.unmatched]
        for name, found in self.precisions.items():
            cells = [(one.label, one.num_references, *map(_figure, (one.ap50, one.ap, one.recall50, one.recall))) for one in found]
            lines += ["", f"## Classes of {name}", "", *markdown(("class", "places", "AP50", "AP", "recall at 0.5", "recall"), cells)]
        for name, scores in self.classes.items():
            rows = [(one.label, one.num_references, _figure(one.recall), _figure(one.precision), _figure(one.f1)) for one in scores]
            lines += ["", f"## Classes of {name}", "", *markdown(("class", "samples", "recall", "precision", "F1"), rows)]
        if self.robustness:
            header = (
                "dataset",
                "task",
                "change",
                "strength",
                "samples",
                "metric",
                "value",
                "95 % interval",
                "clean",
                "difference",
                "95 % interval",
            )
            units = sorted({f"`{row.change}`: {row.unit}" for row in self.robustness})
            lines += ["", "## Changed pictures and sounds", "", *markdown(header, [_change_cells(row) for row in self.robustness])]
            lines += [
                "",
                f"Strengths: {'; '.join(units)}. Intervals of differences are of pairs: both answers to a sample are drawn together.",
            ]
        if self.skipped:
            rows = [(one.dataset, one.shard, one.key, one.change, one.reason.replace("\n", " ")) for one in self.skipped]
            lines += ["", "## Skipped samples", "", *markdown(("dataset", "shard", "key", "change", "reason"), rows)]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `predictions.jsonl`, `report.md` and, last, `report.json`, each whole or not at all."""
        lines = (json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) for record in self.records)
        write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
        write_text(folder / REPORT_MARKDOWN, self.to_markdown())
        write_json(folder / REPORT_JSON, self.to_dict())


def is_picture(name: str) -> bool:
    """Whether a file of that name is a picture of an evaluation (`megamm.evaluation.pictures`), or what a killed one left of it."""
    is_temporary = name.startswith(".") and name.endswith(".tmp")
    return name.removeprefix(".").startswith(PICTURE_KINDS) and (name.endswith(".png") or is_temporary)


def check_output(folder: Path) -> None:
    """Make sure that writing a report there replaces nothing but an earlier report.

    Raises:
        ConfigError: The folder is a file, holds other files, or its `report.json` is of another kind.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; name a folder for the report")
    own = {REPORT_JSON, REPORT_MARKDOWN, PREDICTIONS}
    # A run that was killed while it wrote one of them may have left its temporary neighbour.
    left = (*(f".{name}." for name in own), FOLDER)
    names = [path.name for path in folder.iterdir()]
    if foreign := sorted(name for name in names if name not in own and not name.startswith(left) and not is_picture(name)):
        raise ConfigError(f"output {folder} holds {foreign[0]}, which is no part of a report; name an empty folder or one of an evaluation")
    path = folder / REPORT_JSON
    if path.exists() and not _is_report(path):
        raise ConfigError(f"output {folder} holds a {REPORT_JSON} that is no evaluation's; name an empty folder or one of an evaluation")


def _is_report(path: Path) -> bool:
    try:
        value = read_json(path)
    except (ValueError, OSError):
        return False
    return isinstance(value, dict) and {"source", "settings", "rows", "skipped"} <= value.keys()


def make_report(
    records: Sequence[Record],
    skipped: Sequence[SkippedSample],
    *,
    source: str,
    step: int | None,
    settings: dict[str, Any],
    slices: Sequence[str] = (),
    unmatched: Sequence[str] = (),
    robustness: Sequence[ChangeRow] = (),
) -> Report:
    """Compute the figures; the order of `records` and `skipped` does not matter.

    Args:
        records: Samples that count.
        skipped: Samples that do not.
        source: What was evaluated.
        step: Its optimizer steps.
        settings: How it was evaluated.
        slices: Metadata fields whose values get rows of their own.
        unmatched: What was asked for and matches nothing, in words.
        robustness: Rows of changed media.
    """
    rows: list[Row] = []
    unfinished, malformed, problems, unknown, classes, precisions, confusions = {}, {}, {}, {}, {}, {}, {}
    groups = grouped(records)
    for (dataset, task), group in groups.items():
        answered = [record for record in group if isinstance(record, Answered)]
        scored = [record for record in group if isinstance(record, Scored)]
        name = f"{dataset}/{task}"
        if answered:
            try:
                judged = list(_rows(dataset, task, answered, answer_figures(task, answered), slices))
                given, wanted = ([TASKS[task].parse(reply) for reply in side] for side in _sides(answered))
                if (scores_of := TASKS[task].classes) is not None:
                    classes[name] = tuple(scores_of(given, wanted))
                if (label := TASKS[task].label) is not None and None not in (labels := [label(one) for one in wanted]):
                    confusions[name] = confusion([label(one) or _NO_LABEL for one in given], labels)
                if (match := TASKS[task].match) is not None:
                    matches = match(given, wanted)
                    precisions[name], unknown[name] = matches.scores().classes, matches.num_unknown
                rows += judged
            except DataError as error:
                # Such as boxes in no reference: what was answered stays worth keeping.
                problems[name] = str(error)
            unfinished[name] = sum(not record.answer.is_finished for record in answered)
            malformed[name] = sum(record.answer.num_malformed for record in answered)
        if scored:
            rows += _rows(dataset, task, scored, score_figures(scored), slices)
    return Report(
        source=source,
        step=step,
        settings=settings,
        rows=tuple(rows),
        unfinished=unfinished,
        malformed=malformed,
        problems=problems,
        unknown=unknown,
        unmatched=tuple(unmatched),
        classes=classes,
        precisions=precisions,
        confusions=confusions,
        robustness=tuple(robustness),
        skipped=tuple(sorted(skipped, key=lambda one: one.identity)),
        records=tuple(record for group in groups.values() for record in group),
    )


def _sides(records: Sequence[Answered]) -> tuple[list[Reply], list[Reply]]:
    """Answers and references."""
    return [record.answer for record in records], [record.reference for record in records]


def _rows(dataset: str, task: str, group: Sequence[Record], figures: Sequence[Figure], slices: Sequence[str]) -> Iterator[Row]:
    """Rows over all samples of a task, then over each slice."""
    for name, chosen in _slices(group, slices):
        for figure in figures:
            value = value_of(figure, chosen)
            low, high = interval_of(figure, chosen) if value is not None else (None, None)
            # Chance was computed over all of them.
            chance = finite(figure.chance) if name == ALL else None
            yield Row(dataset, task, name, len(chosen), figure.name, value, low, high, chance)


def _slices(group: Sequence[Record], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Name of a slice and which samples are in it, int64[n]; samples without the field are in none."""
    yield ALL, np.arange(len(group))
    for name in names:
        values = _sliced([record.metadata.get(name, label_of(record) if name == LABEL else None) for record in group])
        for value in sorted({value for value in values if value is not None}):
            yield f"{name}={value}", np.array([index for index, one in enumerate(values) if one == value])


def label_of(record: Record) -> str | None:
    """The one label of a reference; None of other answers."""
    label = TASKS[record.task].label if isinstance(record, Answered) else None
    return None if label is None else label(TASKS[record.task].parse(record.reference))


def _sliced(values: Sequence[Any]) -> list[str | None]:
    """The name of each value's slice: itself, or of many different measurements the quarter of them that it is in."""
    numbers = np.array([float(value) if _is_measured(value) else math.nan for value in values])
    finite_ones = numbers[np.isfinite(numbers)]
    if not any(isinstance(value, float) for value in values) or len(set(finite_ones.tolist())) <= _MOST_NUMBERS:
        return [None if value is None else str(value) for value in values]
    edges = np.quantile(finite_ones, [0, 0.25, 0.5, 0.75, 1])
    # As many digits as tell the quarters apart.
    digits = next((digits for digits in range(4, 17) if len({f"{edge:.{digits}g}" for edge in edges}) == len(set(edges.tolist()))), 17)
    quarters = [f"{low:.{digits}g} to {high:.{digits}g}" for low, high in pairwise(edges)]
    places = np.searchsorted(edges[1:-1], numbers, side="right").tolist()
    return [
        quarters[place] if math.isfinite(number) else None if value is None else str(value)
        for value, number, place in zip(values, numbers.tolist(), places, strict=True)
    ]


def _is_measured(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = _figure(row.value), _between(row.low, row.high), _figure(row.chance)
    return row.dataset, row.task, row.slice, str(row.samples), row.metric, *numbers


def _change_cells(row: ChangeRow) -> tuple[str, ...]:
    numbers = _figure(row.value), _between(row.low, row.high), _figure(row.clean)
    difference = _figure(row.difference), _between(row.difference_low, row.difference_high)
    return row.dataset, row.task, row.change, f"{row.strength:g}", str(row.samples), row.metric, *numbers, *difference


def _unknown(name: str, counts: Mapping[str, int]) -> str:
    labels = ", ".join(
        f"{label!r} ({count})" for label, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_NUM_UNKNOWN]
    )
    return f"{sum(counts.values())} places in answers of {name} have labels that no reference has, and count nowhere: {labels}."


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_figure(low)} – {_figure(high)}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
