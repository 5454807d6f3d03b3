"""What an evaluation found: rows of figures beside chance, confusions, and what was skipped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.core.files import read_json, write_json, write_text
from megamm.evaluation.held_out import SkippedSample
from megamm.evaluation.judge import Answered, Record, Scored
from megamm.tasks import TASKS

REPORT_JSON, REPORT_MARKDOWN, PREDICTIONS = "report.json", "report.md", "predictions.jsonl"
_OTHER = "(other)"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        dataset: Name of the held-out dataset.
        task: Name of the task.
        samples: Samples that it is over.
        metric: Its name.
        value: None where it is not a finite number.
        chance: What the best guess without looking gets on the same samples; None where that means nothing.
    """

    dataset: str
    task: str
    samples: int
    metric: str
    value: float | None
    chance: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often each label (row) got each answer (column); the last column counts answers that are no label."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found.

    Attributes:
        source: The checkpoint or exported folder that was evaluated.
        step: Its optimizer steps; None for an exported folder.
        settings: How it was evaluated.
        rows: By dataset and task.
        unfinished: `dataset/task` -> answers that `max_new_tokens` cut off.
        confusions: `dataset/task` of classification -> its confusion matrix.
        skipped: Samples that count in no row.
        records: One entry a sample that counts.
    """

    source: str
    step: int | None
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    unfinished: dict[str, int]
    confusions: dict[str, Confusion]
    skipped: tuple[SkippedSample, ...]
    records: tuple[Record, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the records."""
        return {name: value for name, value in asdict(self).items() if name != "records"}

    def to_markdown(self) -> str:
        """A table of the rows, and the skipped samples."""
        lines = [
            f"# Evaluation of {self.source}",
            "",
            "| dataset | task | samples | metric | value | chance |",
            "|---|---|---:|---|---:|---:|",
        ]
        lines += [f"| {r.dataset} | {r.task} | {r.samples} | {r.metric} | {_figure(r.value)} | {_figure(r.chance)} |" for r in self.rows]
        lines += [f"\n{count} answers of {name} were cut off." for name, count in self.unfinished.items() if count]
        if self.skipped:
            lines += ["", "## Skipped samples", "", "| dataset | shard | key | reason |", "|---|---|---|---|"]
            lines += [f"| {_cell(s.dataset)} | {_cell(s.shard)} | {_cell(s.key)} | {_cell(s.reason)} |" for s in self.skipped]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `predictions.jsonl`, `report.md` and, last, `report.json`, each whole or not at all."""
        lines = (json.dumps(record.to_dict(), ensure_ascii=False) for record in self.records)
        write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
        write_text(folder / REPORT_MARKDOWN, self.to_markdown())
        write_json(folder / REPORT_JSON, self.to_dict())


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
    left = tuple(f".{name}." for name in own)
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(left)):
        raise ConfigError(f"output {folder} holds {foreign[0]}, which is no part of a report; name an empty folder or one of an evaluation")
    path = folder / REPORT_JSON
    if path.exists() and not _is_report(path):
        raise ConfigError(f"output {folder} holds a {REPORT_JSON} that is no evaluation's; name an empty folder or one of an evaluation")


def _is_report(path: Path) -> bool:
    try:
        value = read_json(path)
    except (ValueError, OSError):
        return False
    return isinstance(value, dict) and {field.name for field in fields(Report)} - {"records"} <= value.keys()


def make_report(
    records: Sequence[Record], skipped: Sequence[SkippedSample], *, source: str, step: int | None, settings: dict[str, Any]
) -> Report:
    """Compute the figures; the order of `records` and `skipped` does not matter."""
    records = tuple(sorted(records, key=lambda record: (record.dataset, record.task, record.shard, record.number)))
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.dataset, record.task), []).append(record)
    rows: list[Row] = []
    unfinished, confusions = {}, {}
    for (dataset, task), group in groups.items():
        answered = [record for record in group if isinstance(record, Answered)]
        scored = [record for record in group if isinstance(record, Scored)]
        if answered:
            rows += _answer_rows(dataset, task, answered)
            unfinished[f"{dataset}/{task}"] = sum(not record.answer.is_finished for record in answered)
        if scored:
            rows += _score_rows(dataset, task, scored)
        if task == "classification":
            confusions[f"{dataset}/{task}"] = _confusion(task, answered)
    ordered = tuple(sorted(skipped, key=lambda one: (one.dataset, one.shard, one.key)))
    return Report(source, step, settings, tuple(rows), unfinished, confusions, ordered, records)


def _answer_rows(dataset: str, task: str, group: Sequence[Answered]) -> list[Row]:
    predictions = [TASKS[task].parse(record.answer) for record in group]
    references = [TASKS[task].parse(record.reference) for record in group]
    # Chance is that of a task's first metric.
    chances = [TASKS[task].chance(references)]
    metrics = TASKS[task].metrics(predictions, references)
    return [
        Row(dataset, task, len(group), name, _finite(value), _finite(chances.pop()) if chances else None) for name, value in metrics.items()
    ]


def _score_rows(dataset: str, task: str, group: Sequence[Scored]) -> list[Row]:
    num_tokens = sum(record.num_tokens for record in group)
    num_bytes = sum(record.num_bytes for record in group)
    nats = sum(record.nats for record in group)
    counts: Counter[int] = sum((Counter(record.token_counts) for record in group), Counter())
    # The best guess without looking: these tokens' own frequencies.
    guess = -sum(count * math.log(count / num_tokens) for count in counts.values())
    return [
        Row(dataset, task, len(group), "perplexity", _exp(nats / num_tokens), _exp(guess / num_tokens)),
        Row(dataset, task, len(group), "bits_per_byte", _finite(nats / math.log(2) / num_bytes), _finite(guess / math.log(2) / num_bytes)),
    ]


def _confusion(task: str, group: Sequence[Answered]) -> Confusion:
    pairs = Counter((TASKS[task].parse(record.reference), TASKS[task].parse(record.answer)) for record in group)
    labels = tuple(sorted({reference for reference, _ in pairs}))
    counts = []
    for reference in labels:
        known = [pairs[reference, answer] for answer in labels]
        counts.append((*known, sum(count for (label, _), count in pairs.items() if label == reference) - sum(known)))
    return Confusion((*labels, _OTHER), tuple(counts))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exp(nats: float) -> float | None:
    return _finite(math.exp(nats)) if nats < 700 else None


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
