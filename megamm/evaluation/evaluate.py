"""Held-out samples put to a trained model, each once, and figures beside chance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megamm import __version__
from megamm.core.errors import ConfigError
from megamm.core.logging import get_logger
from megamm.data.shards.sidecars import resolved_reading
from megamm.evaluation.held_out import SkippedSample, held_out_patterns, list_places, read_samples, sample_forms
from megamm.evaluation.judge import Record, judge
from megamm.evaluation.report import Report, check_output, make_report
from megamm.inference.load import load_model
from megamm.tasks import TASKS

_log = get_logger("evaluation")


def evaluate(
    source: Path,
    *,
    datasets: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    device: str | None = None,
) -> Report:
    """Evaluate a run's newest good checkpoint or an exported folder.

    Chats are answered greedily up to `max_new_tokens` and compared with their last stored answer; plain documents are
    scored. Every held-out sample counts in exactly one place: a row, the skipped ones (also those of tasks that nobody knows,
    unless `tasks` are given), or nowhere when `tasks` leave it out.

    Args:
        source: Run folder or exported folder.
        datasets: Name -> path or glob of held-out shards; None for those of the run's recipe.
        tasks: Names of the tasks that count; empty for all.
        output: Folder for `report.json`, `report.md` and `predictions.jsonl`; None to write nothing.
        max_samples: At most so many of each dataset, spread evenly over it; None for all.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer, in tokens.
        device: Where the model runs; None takes the GPU where there is one.

    Raises:
        ConfigError: No such source or task, no sample to evaluate, or an output folder that holds other files.
        CheckpointError: The run has no good checkpoint.
        DataError: Shards are missing, or changed since they were indexed.
    """
    _check(tasks, max_samples=max_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if output is not None:
        check_output(output)
    start = time.monotonic()
    loaded = load_model(source, device=device)
    patterns = dict(datasets) if datasets else held_out_patterns(loaded.recipe)
    reading = None if loaded.recipe is None else resolved_reading(loaded.recipe.data)
    places = list_places(patterns, max_samples, reading=reading)
    forms = sample_forms(loaded.recipe, list(patterns))
    records: list[Record] = []
    skipped: list[SkippedSample] = []
    for result in judge(
        loaded, read_samples(places, forms, reading=reading), tasks=tasks, batch_size=batch_size, max_new_tokens=max_new_tokens
    ):
        if isinstance(result, SkippedSample):
            skipped.append(result)
            _log.warning("skipped %s/%s in %s: %s", result.dataset, result.key, result.shard, result.reason)
        else:
            records.append(result)
    if not records:
        raise ConfigError(
            f"none of {len(places)} held-out samples could be evaluated ({len(skipped)} skipped, the rest of other tasks than "
            f"{', '.join(sorted(tasks or TASKS))}); name other tasks or shards"
        )
    settings = {
        "version": __version__,
        "datasets": {name: str(pattern) for name, pattern in patterns.items()},
        "tasks": sorted(set(tasks or TASKS)),
        "max_samples": max_samples,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "seconds": round(time.monotonic() - start, 3),
    }
    report = make_report(records, skipped, source=str(loaded.source), step=loaded.step, settings=settings)
    if output is not None:
        report.write(output)
    return report


def _check(tasks: Sequence[str], **counts: int | None) -> None:
    for name in tasks:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is not known; the tasks are {', '.join(TASKS)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name}={count} evaluates nothing; give 1 or more")
