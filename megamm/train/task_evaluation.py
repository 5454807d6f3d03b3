"""Tasks during training: a few held-out samples of each dataset answered by the model as it is, with the code of `megamm evaluate`.

The weights stay where training has them, split over the ranks. What training goes on with is left alone: no random state moves, the data
stay where they are, and no weight changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megamm.config import Recipe
from megamm.core.errors import DataError
from megamm.core.files import write_text
from megamm.core.logging import get_logger
from megamm.core.types import Sample
from megamm.data.media.features import MediaRules
from megamm.data.shards.sidecars import resolved_reading
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.engine.runtime import Engine
from megamm.evaluation.evaluate import check_libraries
from megamm.evaluation.figures import answer_figures, grouped, score_figures, value_of
from megamm.evaluation.held_out import Place, held_out_patterns, list_places, read_samples, sample_forms
from megamm.evaluation.judge import check_head
from megamm.evaluation.lockstep import judge_in_step
from megamm.evaluation.records import Answered, Record, Result, Scored, SkippedSample, result_from_json
from megamm.evaluation.shown import chosen_places, shown_answers
from megamm.inference.load import Loaded
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.telemetry.whereabouts import Whereabouts
from megamm.tokenizers.text import TextTokenizer
from megamm.train.journal import Journal
from megamm.train.run_folder import RunFolder

_log = get_logger("train")


@dataclass(frozen=True)
class TaskEvaluation:
    """The held-out samples that a run is asked about, the same ones every time.

    Attributes:
        recipe: Of the run.
        folder: Of the run; answers go to `answers/step_00000100.jsonl`.
        world: The ranks, which share the samples.
        tokenizer: Of the run.
        places: Where the samples of all ranks lie.
    """

    recipe: Recipe
    folder: RunFolder
    world: World
    tokenizer: TextTokenizer
    places: tuple[Place, ...]

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, tokenizer: TextTokenizer, world: World) -> TaskEvaluation | None:
        """Find the samples, or None where the recipe asks for no tasks; every rank calls it, once the shards have their indexes.

        Raises:
            ConfigError: Tasks are asked for, and the recipe names no held-out data, or its head answers nothing.
            DataError: Shards are missing or have no usable index.
            MegaMMError: A library that judges answers is not installed.
        """
        if not recipe.evaluation.tasks_every:
            return None
        with distributed.fail_together():
            check_libraries(())
            check_head(recipe.model.head)
            reading = resolved_reading(recipe.data)
            places = list_places(held_out_patterns(recipe), recipe.evaluation.tasks_samples, reading=reading)
        return cls(recipe, folder, world, tokenizer, tuple(places))

    def run(self, engine: Engine, step: int, *, where: Whereabouts, journal: Journal) -> None:
        """Put the samples to the model and log what it answers; every rank calls it.

        Raises:
            DataError: On every rank: a shard is missing, or changed since it was indexed.
        """
        settings, rank, size = self.recipe.evaluation, self.world.rank, self.world.size
        where.enter("evaluate", step)
        with engine.evaluating():
            own = judge_in_step(
                self._loaded(engine, step),
                self._read(self.places[rank::size]),
                world=self.world,
                batch_size=settings.tasks_batch_size,
                max_new_tokens=settings.tasks_max_new_tokens,
                moved=lambda: where.enter("evaluate", step),
            )
        parts = distributed.gather_json([result.to_json() for result in own])
        where.enter("evaluate", step)
        with distributed.fail_together():
            if self.world.is_main:
                self._tell([result_from_json(value) for part in parts for value in part], step, journal)

    def _loaded(self, engine: Engine, step: int) -> Loaded:
        """The model under training as inference takes one."""
        model = engine.module
        assert isinstance(model, MegaMMForConditionalGeneration)
        media = MediaRules.of(self.recipe.model, self.recipe.data)
        return Loaded(model=model, tokenizer=self.tokenizer, media=media, recipe=self.recipe, step=step, source=self.folder.path)

    def _read(self, places: Sequence[Place]) -> Iterable[tuple[Place, Sample | SkippedSample]]:
        forms = sample_forms(self.recipe, list(self.recipe.data.held_out))
        return read_samples(places, forms, reading=resolved_reading(self.recipe.data))

    def _tell(self, results: Sequence[Result], step: int, journal: Journal) -> None:
        for one in results:
            if isinstance(one, SkippedSample):
                _log.warning("held-out sample %s/%s in %s is not asked about: %s", one.dataset, one.key, one.shard, one.reason)
        records = [one for one in results if isinstance(one, Record)]
        nothing = {f"evaluation/{place.dataset}/samples": 0 for place in self.places} if not records else {}
        journal.numbers(step, nothing | task_values(records))
        self._keep(records, step)
        if journal.shows:
            samples = self._read(chosen_places(records, self.places))
            for name, content in shown_answers(records, samples, MediaRules.of(self.recipe.model, self.recipe.data)):
                journal.show(step, name, content)

    def _keep(self, records: Sequence[Record], step: int) -> None:
        """Write the answers beside those of other steps; a disk that does not take them ends no run."""
        lines = [json.dumps(one.to_json(), ensure_ascii=False) for group in grouped(records).values() for one in group]
        try:
            self.folder.answers.mkdir(exist_ok=True)
            write_text(self.folder.answers / f"step_{step:08d}.jsonl", "".join(f"{line}\n" for line in lines))
        except OSError as error:
            _log.warning("the answers of step %d are not kept: %s", step, error)


def task_values(records: Sequence[Record]) -> dict[str, float | int]:
    """`evaluation/DATASET/METRIC` -> value, and how many samples count; with the task before the metric where a dataset has several."""
    groups = grouped(records)
    datasets = [dataset for dataset, _ in groups]
    values: dict[str, float | int] = {}
    for (dataset, task), group in groups.items():
        prefix = f"evaluation/{dataset}/" + (f"{task}/" if datasets.count(dataset) > 1 else "")
        values[f"{prefix}samples"] = len(group)
        try:
            found = _values(task, group)
        except DataError as error:
            _log.warning("%s/%s has no figures: %s", dataset, task, error)
            continue
        values |= {f"{prefix}{name}": value for name, value in found.items() if value is not None}
    return values


def _values(task: str, group: Sequence[Record]) -> dict[str, float | None]:
    """Figure -> value, over the samples that were answered and over those that were scored."""
    answered = [one for one in group if isinstance(one, Answered)]
    scored = [one for one in group if isinstance(one, Scored)]
    found = {one.name: value_of(one, np.arange(len(answered))) for one in answer_figures(task, answered)} if answered else {}
    return found | ({one.name: value_of(one, np.arange(len(scored))) for one in score_figures(scored)} if scored else {})
