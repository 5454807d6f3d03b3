"""Held-out samples put to a trained model, each once, by as many ranks as there are, and figures beside chance."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megamm import __version__
from megamm.core.env import rank_info
from megamm.core.errors import ConfigError
from megamm.core.logging import get_logger
from megamm.data.shards.index import read_shard_facts
from megamm.data.shards.sidecars import resolved_reading
from megamm.evaluation import progress
from megamm.evaluation.held_out import Place, held_out_patterns, list_places, read_samples, sample_forms
from megamm.evaluation.judge import judge
from megamm.evaluation.pictures import shown, write_pictures
from megamm.evaluation.progress import Progress
from megamm.evaluation.records import Record, Result, SkippedSample
from megamm.evaluation.report import Report, check_output, make_report
from megamm.inference.load import Loaded, load_model
from megamm.metrics.libraries import library
from megamm.tasks import TASKS

_log = get_logger("evaluation")
_LIBRARIES = ("jiwer", "pycocotools", "sacrebleu", "sklearn")


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The processes that share one evaluation; one alone needs no group."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> _Ranks:
        info = rank_info()
        if info.world_size > 1:
            from megamm.engine import distributed

            distributed.start()
        return cls(info.rank, info.world_size)

    def first(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; every rank waits here."""
        if self.size == 1:
            return value
        from megamm.engine.distributed import broadcast_json

        return broadcast_json(value)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            from megamm.engine.distributed import barrier

            barrier()

    def leave(self) -> None:
        if self.size > 1:
            from megamm.engine import distributed

            distributed.stop()


def evaluate(
    source: Path,
    *,
    datasets: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    slices: Sequence[str] = (),
    device: str | None = None,
) -> Report | None:
    """Evaluate a run's newest good checkpoint or an exported folder.

    Chats are answered greedily up to `max_new_tokens` and compared with their last stored answer; plain documents are
    scored. Every held-out sample counts in exactly one place: a row, the skipped ones (also those of tasks that nobody knows,
    unless `tasks` are given), or nowhere when `tasks` leave it out.

    Ranks that a launcher started share the samples, and meet in `output`. One that was killed goes on where it stopped, at any number
    of ranks.

    Args:
        source: Run folder or exported folder.
        datasets: Name -> path or glob of held-out shards; None for those of the run's recipe.
        tasks: Names of the tasks that count; empty for all.
        output: Folder for `report.json`, `report.md`, `predictions.jsonl` and pictures; None to write nothing.
        max_samples: At most so many of each dataset, spread evenly over it; None for all.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer, in tokens.
        slices: Metadata fields; each of their values gets rows of its own.
        device: Where the model runs; None takes the GPU where there is one.

    Returns:
        The report, on rank 0.

    Raises:
        ConfigError: No such source or task, no sample to evaluate, an output folder that holds other files, or several ranks without one.
        CheckpointError: The run has no good checkpoint.
        DataError: Shards are missing, or changed since they were indexed.
        MegaMMError: A library that judges answers is not installed.
    """
    _check(tasks, max_samples=max_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    ranks = _Ranks.join()
    if output is not None:
        check_output(output)
    elif ranks.size > 1:
        raise ConfigError(f"{ranks.size} ranks meet in the output folder; name one")
    began = time.monotonic()
    loaded = load_model(source, device=device)
    patterns = dict(datasets) if datasets else held_out_patterns(loaded.recipe)
    reading = None if loaded.recipe is None else resolved_reading(loaded.recipe.data)
    places = list_places(patterns, max_samples, reading=reading)
    read = partial(read_samples, forms=sample_forms(loaded.recipe, list(patterns)), reading=reading)
    settings = {
        "version": __version__,
        "datasets": {name: str(pattern) for name, pattern in patterns.items()},
        "tasks": sorted(set(tasks or TASKS)),
        "max_samples": max_samples,
        "max_new_tokens": max_new_tokens,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
    }
    start = 0
    if output is not None:
        start = ranks.first(progress.begin(output, _identity(loaded, places, settings)) if ranks.rank == 0 else None)
    done = progress.results_so_far(output)
    # Every rank has read what was done before any begins to add to it.
    ranks.wait()
    own = _own_places(places, done, ranks)
    judged = judge(loaded, read(own), tasks=tasks, batch_size=batch_size, max_new_tokens=max_new_tokens)
    results = _keep(judged, Progress(output, ranks.rank, start))
    ranks.wait()
    report = None
    if ranks.rank == 0:
        found = progress.results_so_far(output) if output is not None else {one.identity: one for one in results}
        settings |= {"batch_size": batch_size, "num_ranks": ranks.size, "seconds": round(time.monotonic() - began, 3)}
        report = _report(list(found.values()), len(places), tasks, slices, loaded, settings)
        if output is not None:
            report.write(output)
            write_pictures(report, output, read(shown(report, places)))
            progress.end(output)
    ranks.wait()
    ranks.leave()
    return report


def _own_places(places: Sequence[Place], done: Collection[tuple[str, str, int]], ranks: _Ranks) -> list[Place]:
    """This rank's share of what is left: neighbours go to different ranks, because they are often alike."""
    left = [place for place in places if place.identity not in done]
    if len(left) < len(places) and ranks.rank == 0:
        _log.warning("%d of %d samples were evaluated before; going on with the rest", len(places) - len(left), len(places))
    return left[ranks.rank :: ranks.size]


def _keep(judged: Iterable[Result], kept: Progress) -> list[Result]:
    """All results, each kept as it comes."""
    results = []
    try:
        for result in judged:
            if isinstance(result, SkippedSample):
                _log.warning("skipped %s/%s in %s: %s", result.dataset, result.key, result.shard, result.reason)
            kept.write(result)
            results.append(result)
    finally:
        kept.close()
    return results


def _report(
    results: Sequence[Result], num_places: int, tasks: Sequence[str], slices: Sequence[str], loaded: Loaded, settings: dict[str, Any]
) -> Report:
    records = [one for one in results if isinstance(one, Record)]
    skipped = [one for one in results if isinstance(one, SkippedSample)]
    if not records:
        raise ConfigError(
            f"none of {num_places} held-out samples could be evaluated ({len(skipped)} skipped, the rest of other tasks than "
            f"{', '.join(sorted(tasks or TASKS))}); name other tasks or shards"
        )
    return make_report(records, skipped, source=str(loaded.source), step=loaded.step, settings=settings, slices=slices)


def _identity(loaded: Loaded, places: Sequence[Place], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that results depend on. The source is told by its path and what stands in its table of contents."""
    contents = loaded.source / ("manifest.json" if loaded.step is not None else "config.json")
    shards = {str(tar): read_shard_facts(tar).digest for tar in {str(place.tar): place.tar for place in places}.values()}
    text = contents.read_text(encoding="utf-8") if contents.is_file() else ""
    return {"source": str(loaded.source.absolute()), "contents": text, "shards": shards, **settings}


def _check(tasks: Sequence[str], **counts: int | None) -> None:
    for name in tasks:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is not known; the tasks are {', '.join(TASKS)}")
    # Before the model is loaded, not after all answers.
    for module in () if set(tasks) == {"text"} else _LIBRARIES:
        library(module)
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name}={count} evaluates nothing; give 1 or more")
