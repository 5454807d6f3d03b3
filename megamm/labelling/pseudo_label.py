"""`megamm pseudo-label`: a model labels samples, and what it is sure of becomes shards like any others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megamm import __version__
from megamm.core.errors import ConfigError
from megamm.core.files import digest_text, write_text
from megamm.core.json_lines import JsonLines, read_json_lines
from megamm.core.logging import get_logger
from megamm.data.shards.index import read_shard_facts
from megamm.evaluation import progress
from megamm.evaluation.held_out import Place, list_places, read_samples
from megamm.evaluation.ranks import Ranks
from megamm.inference.load import Loaded, load_model
from megamm.labelling.answers import Labelled, ask, check_asked
from megamm.labelling.report import LabellingReport
from megamm.labelling.source import Labeller, Originals, labelled_source
from megamm.prepare.plan import Splitting
from megamm.prepare.run import Job, check_output, prepare

ANSWERS = "answers.jsonl"
_log = get_logger("labelling")


def pseudo_label(
    source: Path,
    patterns: Sequence[str],
    output: Path,
    *,
    threshold: float = 0.9,
    tasks: Sequence[str] = (),
    split: str = "train",
    batch_size: int = 64,
    max_new_tokens: int = 32,
    device: str | None = None,
) -> LabellingReport | None:
    """Label samples with a run's newest good checkpoint or an exported folder, and write those that it is sure of.

    Answers that samples have are not shown to the model; they only say in the report how often it was right. A command that was killed
    goes on where it stopped, at any number of ranks: answers are kept in `OUTPUT/.progress`, finished shards in `prepare`'s journal.
    Ranks that a launcher started share the samples; the first one writes.

    Args:
        source: Run folder or exported folder.
        patterns: Paths, globs or URLs of shards in our own form.
        output: Folder of the new shards; gets `answers.jsonl` (every answer with its confidence) and `pseudo-labels.{json,md}` as well.
        threshold: Least probability of an answer that is kept.
        tasks: Names of the tasks that count; empty for all.
        split: What the names of the shards begin with.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer in tokens.
        device: Where the model runs; None takes the GPU where there is one.

    Returns:
        The report, on rank 0.

    Raises:
        ConfigError: Settings that label nothing, a model that cannot label, or no answer that is sure enough.
        CheckpointError: The run has no good checkpoint.
        DataError: Shards are missing, changed or named twice, or the output holds something else; all of it before anything is asked.
    """
    _check(threshold, batch_size=batch_size, max_new_tokens=max_new_tokens)
    ranks = Ranks.join()
    loaded = load_model(ranks.one_checkpoint(source), device=device)
    check_asked(loaded)
    places = list_places({pattern: pattern for pattern in patterns})
    originals, job = Originals.of(places), Job(output, Splitting(default=split))
    labeller = Labeller(loaded.step, digest_text(progress.contents_of(loaded)))
    check_output(labelled_source([], threshold, originals, labeller=labeller), job)
    start = ranks.first(progress.begin(output, _identity(loaded, places, tasks, max_new_tokens)) if ranks.is_main else None)
    done = {one.identity for one in _answers_so_far(output)}
    # Every rank has read what was done before any begins to add to it.
    ranks.wait()
    left = [place for place in places if (place.dataset, place.tar.name, place.number) not in done]
    if left and len(left) < len(places) and ranks.is_main:
        _log.warning("%d of %d samples were asked about before; going on with the rest", len(places) - len(left), len(places))
    answers = ask(loaded, read_samples(left[ranks.rank :: ranks.size]), tasks=tasks, batch_size=batch_size, max_new_tokens=max_new_tokens)
    _keep(answers, output / progress.FOLDER / f"start_{start:05}.rank_{ranks.rank:05}.jsonl")
    ranks.wait()
    # Writing may take longer than ranks wait for each other.
    ranks.leave()
    if not ranks.is_main:
        return None
    order = {(place.dataset, place.tar.name, place.number): number for number, place in enumerate(places)}
    said = sorted(_answers_so_far(output), key=lambda one: order[one.identity])
    write_text(output / ANSWERS, "".join(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in said))
    report = LabellingReport.of(said, threshold, source=str(source), step=loaded.step)
    if not report.num_kept:
        raise ConfigError(_nothing_kept(said, threshold, output))
    # Refuses shards of another threshold, whose report then stays.
    prepare(labelled_source(said, threshold, originals, labeller=labeller), job)
    report.write(output)
    return report


def _nothing_kept(answers: Sequence[Labelled], threshold: float, output: Path) -> str:
    surest = max((one.confidence for one in answers if one.label), default=None)
    if surest is None:
        why = next((one.reason for one in answers), "none is of the tasks that were named")
        return f"none of {len(answers)} samples was given a label ({why}); see {output / ANSWERS}"
    return (
        f"no answer of {len(answers)} reaches --threshold {threshold:g}, the surest has {surest:.3f}; lower it, or train the model longer"
    )


def _keep(answers: Iterable[Labelled], path: Path) -> None:
    """Append each answer as it comes."""
    file = JsonLines(path)
    try:
        for answer in answers:
            file.write(answer.to_json())
    finally:
        file.close()


def _answers_so_far(output: Path) -> list[Labelled]:
    """What earlier starts, and this one's ranks, have found: each sample once."""
    paths = sorted((output / progress.FOLDER).glob("start_*.jsonl"))
    found = [Labelled.from_json(value) for path in paths for value in read_json_lines(path)]
    return list({one.identity: one for one in found}.values())


def _identity(loaded: Loaded, places: Sequence[Place], tasks: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    """All that answers depend on; how sure they must be is no part of it."""
    shards = sorted({(place.dataset, place.tar.name, read_shard_facts(place.tar).digest) for place in _one_a_shard(places)})
    return {
        "command": "pseudo-label",
        "version": __version__,
        "source": str(loaded.source.absolute()),
        "step": loaded.step,
        "contents": progress.contents_of(loaded),
        "shards": shards,
        "tasks": sorted(tasks),
        "max_new_tokens": max_new_tokens,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def _one_a_shard(places: Iterable[Place]) -> Iterable[Place]:
    return {str(place.tar): place for place in places}.values()


def _check(threshold: float, **counts: int) -> None:
    if not 0 < threshold <= 1:
        raise ConfigError(f"--threshold {threshold:g} is no probability; give a number above 0 and at most 1, such as 0.9")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}={count} asks nothing; give 1 or more")
