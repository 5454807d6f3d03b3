"""Held-out samples put to a trained model, each once, by as many ranks as there are, and figures beside chance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megamm import __version__
from megamm.core.errors import ConfigError
from megamm.core.logging import get_logger
from megamm.core.names import did_you_mean
from megamm.core.types import Sample
from megamm.data.shards.index import read_shard_facts
from megamm.data.shards.sidecars import resolved_reading
from megamm.evaluation import progress
from megamm.evaluation.changes import Change, changed, places_of, select_changes
from megamm.evaluation.held_out import Place, held_out_patterns, list_places, read_samples, sample_forms
from megamm.evaluation.judge import check_head, judge
from megamm.evaluation.pictures import shown, write_pictures
from megamm.evaluation.progress import Progress
from megamm.evaluation.ranks import Ranks
from megamm.evaluation.records import Identity, Record, Result, SkippedSample
from megamm.evaluation.report import LABEL, Report, check_output, label_of, make_report
from megamm.evaluation.robustness import change_rows, shown_media
from megamm.inference.drawing import least_drawn
from megamm.inference.load import Loaded, load_model
from megamm.inference.replies import check_beams
from megamm.metrics.libraries import library
from megamm.tasks import TASKS, recommendation

_log = get_logger("evaluation")
_LONGEST_ANSWER = 512
_LIBRARIES = ("jiwer", "pycocotools", "sacrebleu", "sklearn")

Read = Callable[[Sequence[Place]], Iterator[tuple[Place, Sample | SkippedSample]]]


def evaluate(
    source: Path,
    *,
    datasets: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    slices: Sequence[str] = (),
    changes: Sequence[str] = (),
    device: str | None = None,
) -> Report | None:
    """Evaluate a run's newest good checkpoint, one that is named, or an exported folder.

    Chats are answered greedily up to `max_new_tokens`, or by the model's head where it has one, and compared with their last stored
    answer; plain documents are scored. Every held-out sample counts in exactly one place: a row, the skipped ones (also those of tasks that
    nobody knows, unless `tasks` are given), or nowhere when `tasks` leave it out.

    Ranks that a launcher started share the samples, and meet in `output`. One that was killed goes on where it stopped, at any number
    of ranks.

    Args:
        source: Run folder, one of its checkpoints, or exported folder.
        datasets: Name -> path or glob of held-out shards; None for those of the run's recipe.
        tasks: Names of the tasks that count; empty for all.
        output: Folder for `report.json`, `report.md`, `predictions.jsonl` and pictures; None to write nothing.
        max_samples: At most so many of each dataset, spread evenly over it; None for all.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer, in tokens; None for 512, or half of the decoder's positions where these are fewer. A sample
            whose question leaves no room for so many is skipped.
        num_beams: Finds recommended items by a search with so many beams; None ranks all items exactly.
        slices: Metadata fields; each of their values gets rows of its own.
        changes: Names of `megamm.evaluation.changes`: samples with such media are put to the model again at each of its strengths.
        device: Where the model runs; None takes the GPU where there is one.

    Returns:
        The report, on rank 0.

    Raises:
        ConfigError: No such source, task or change, fewer beams than items are looked at, a head that answers nothing, no sample to
            evaluate, an output folder that holds other files, or several ranks without one.
        CheckpointError: The run has no good checkpoint.
        DataError: Shards are missing, or changed since they were indexed; or another evaluation writes into `output`.
        MegaMMError: A library that judges answers is not installed.
    """
    _check(tasks, max_samples=max_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_beams(num_beams, max(recommendation.CUTOFFS))
    chosen = select_changes(changes)
    ranks = Ranks.join()
    _check_meeting(output, ranks)
    began = time.monotonic()
    loaded = load_model(ranks.one_checkpoint(source), device=device)
    max_new_tokens = max_new_tokens or min(_LONGEST_ANSWER, loaded.config.text_config.max_position_embeddings // 2)
    check_head(None if loaded.model.head is None else loaded.model.head.settings)
    if num_beams is not None and loaded.model.head is not None:
        raise ConfigError(f"num_beams={num_beams} searches items, and this model's head ranks none; drop it (--num-beams)")
    patterns = dict(datasets) if datasets else held_out_patterns(loaded.recipe)
    places, read = _held_out(loaded, patterns, max_samples)
    settings = {
        "version": __version__,
        "datasets": {name: str(pattern) for name, pattern in patterns.items()},
        "tasks": sorted(set(tasks or TASKS)),
        "max_samples": max_samples,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "changes": {change.name: list(change.strengths) for change in chosen},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
    }
    with ExitStack() as held:
        start = 0
        if output is not None:
            with ranks.fail_together():
                if ranks.is_main:
                    held.enter_context(progress.alone(output))
            start = ranks.first(progress.begin(output, _identity(loaded, places, settings)) if ranks.is_main else None)
        judged = partial(judge, loaded, tasks=tasks, batch_size=batch_size, max_new_tokens=max_new_tokens, num_beams=num_beams)
        found = _Evaluation(read, judged, ranks, output, start).results(places, chosen)
        # What rank 0 does alone may take longer than ranks wait for each other; it clears away what all have read by now.
        ranks.wait()
        ranks.leave()
        if not ranks.is_main:
            return None
        settings |= {"batch_size": batch_size, "num_ranks": ranks.size, "seconds": round(time.monotonic() - began, 3)}
        report = _report(found, len(places), tasks, slices, chosen, loaded, settings)
        if output is not None:
            report.write(output)
            least_score = least_drawn(loaded.model.head and loaded.model.head.settings)
            write_pictures(report, output, read(shown(report, places)), limits=loaded.media.limits, least_score=least_score)
            progress.end(output)
        return report


@dataclass(frozen=True)
class _Evaluation:
    """The samples of one evaluation on their way through the model, shared by the ranks.

    Attributes:
        read: Samples of places, with media as their places say.
        judge: What the model does with samples.
        ranks: Who shares them.
        output: Where results are kept as they come; None keeps them in memory.
        start: Which start of the evaluation this is.
    """

    read: Read
    judge: Callable[[Iterator[tuple[Place, Sample | SkippedSample]]], Iterator[Result]]
    ranks: Ranks
    output: Path | None
    start: int

    def results(self, places: Sequence[Place], changes: Sequence[Change]) -> dict[Identity, Result]:
        """All results, also those of earlier starts: of the samples as they are, then of those with media that can be changed."""
        kept = Progress(self.output, self.ranks.rank, self.start)
        try:
            found = self._round(places, {}, kept)
            if changes:
                again = [
                    place
                    for change in changes
                    for place in places_of(change, _with(places, set(shown_media(found.values(), change.medium))))
                ]
                found = self._round(again, found, kept)
        finally:
            kept.close()
        return found

    def _round(self, places: Sequence[Place], found: dict[Identity, Result], kept: Progress) -> dict[Identity, Result]:
        """What is found so far, with the results of some places; every rank waits for the others before and after."""
        done = found if self.output is None else progress.results_so_far(self.output)
        # Every rank has read what was done before any begins to add to it.
        self.ranks.wait()
        left = [place for place in places if place.identity not in done]
        if len(left) < len(places) and self.ranks.is_main:
            _log.warning("%d of %d samples were evaluated before; going on with the rest", len(places) - len(left), len(places))
        new = []
        # Neighbours go to different ranks, because they are often alike.
        for result in self.judge(self.read(left[self.ranks.rank :: self.ranks.size])):
            if isinstance(result, SkippedSample):
                _log.warning("skipped %s/%s in %s: %s", result.dataset, result.key, result.shard, result.reason)
            kept.write(result)
            new.append(result)
        self.ranks.wait()
        return done | {one.identity: one for one in new} if self.output is None else progress.results_so_far(self.output)


def _with(places: Sequence[Place], wanted: set[Identity]) -> list[Place]:
    return [place for place in places if place.identity in wanted]


def _held_out(loaded: Loaded, patterns: Mapping[str, str], max_samples: int | None) -> tuple[list[Place], Read]:
    """The places of all samples, and how they are read."""
    reading = None if loaded.recipe is None else resolved_reading(loaded.recipe.data)
    forms = sample_forms(loaded.recipe, list(patterns))

    def read(places: Sequence[Place]) -> Iterator[tuple[Place, Sample | SkippedSample]]:
        return changed(read_samples(places, forms, reading=reading), loaded.media)

    return list_places(patterns, max_samples, reading=reading), read


def _report(
    results: Mapping[Identity, Result],
    num_places: int,
    tasks: Sequence[str],
    slices: Sequence[str],
    changes: Sequence[Change],
    loaded: Loaded,
    settings: dict[str, Any],
) -> Report:
    skipped = [result for result in results.values() if isinstance(result, SkippedSample)]
    records = [result for result in results.values() if isinstance(result, Record) and not result.change]
    if not records:
        raise ConfigError(
            f"none of {num_places} held-out samples could be evaluated ({len(skipped)} skipped, the rest of other tasks than "
            f"{', '.join(sorted(tasks or TASKS))}); name other tasks or shards"
        )
    robustness = change_rows(results, changes)
    unmatched = [
        *_unmatched(tasks, slices, records),
        *(
            f"change {change.name!r} found no {change.medium} in a sample that has figures"
            for change in changes
            if all(row.change != change.name for row in robustness)
        ),
    ]
    for words in unmatched:
        _log.warning("%s", words)
    return make_report(
        records,
        skipped,
        source=str(loaded.source),
        step=loaded.step,
        settings=settings,
        slices=slices,
        unmatched=unmatched,
        robustness=robustness,
    )


def _unmatched(tasks: Sequence[str], slices: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Tasks that no sample is of, and slices of a field that no sample has."""
    found = {record.task for record in records}
    fields = sorted({name for record in records for name in record.metadata})
    return [
        *(
            f"no sample of task {name!r} could be evaluated; the tasks of the samples are {', '.join(sorted(found))}"
            for name in tasks
            if name not in found
        ),
        *(
            f"no sample has the metadata field {name!r} of slices; the fields are {', '.join(fields) or 'none'}{did_you_mean(name, fields)}"
            for name in slices
            if name not in fields and not (name == LABEL and any(label_of(record) is not None for record in records))
        ),
    ]


def _identity(loaded: Loaded, places: Sequence[Place], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that results depend on. The source is told by its path and what stands in its table of contents."""
    shards = {str(tar): read_shard_facts(tar).digest for tar in {str(place.tar): place.tar for place in places}.values()}
    return {"source": str(loaded.source.absolute()), "contents": progress.contents_of(loaded), "shards": shards, **settings}


def check_libraries(tasks: Sequence[str]) -> None:
    """Make sure, before anything costs time, that what judges the answers of some tasks is installed; all tasks where none is named.

    Raises:
        MegaMMError: It is not.
    """
    for module in () if set(tasks) == {"text"} else _LIBRARIES:
        library(module)


def _check(tasks: Sequence[str], **counts: int | None) -> None:
    for name in tasks:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is not known; the tasks are {', '.join(TASKS)}")
    check_libraries(tasks)
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name}={count} evaluates nothing; give 1 or more")


def _check_meeting(output: Path | None, ranks: Ranks) -> None:
    if output is not None:
        check_output(output)
    elif ranks.size > 1:
        raise ConfigError(f"{ranks.size} ranks meet in the output folder; name one")
