"""The data of a run: planned lengths, the plan, its loader, the held-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from megamm.config import Recipe
from megamm.core.errors import ConfigError, DataError
from megamm.core.logging import get_logger
from megamm.core.types import Batch
from megamm.data.ledger import Skipped
from megamm.data.loading.held_out import HeldOut, held_out_batches
from megamm.data.loading.loader import StepLoader
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.lengths import ONE_SPEED, ensure_lengths, lengths_key, load_lengths, open_catalogue
from megamm.data.samples.mapping import SampleForm
from megamm.data.shards.index import load_index, problem_kinds
from megamm.data.shards.remote import open_reader
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.tokenizers.text import TextTokenizer
from megamm.train.exclusion import check_known, read_keys

_log = get_logger("train")


@dataclass(frozen=True, slots=True)
class DataChanges:
    """What somebody changes about a run's data when it starts or resumes; the state of the data records all of it.

    Attributes:
        exclude: A file of `dataset/key` lines: these samples are kept out from the next step on. None for no more than before.
        accept: Go on although shards or settings of the data are not those that the run began with.
        leave_out: First and last of some steps whose data are left out; None for none.
    """

    exclude: Path | None = None
    accept: bool = False
    leave_out: tuple[int, int] | None = None


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is watched on.

    Attributes:
        recipe: Whose data these are.
        plan: Of the training datasets.
        held_out: The held-out datasets; None where the recipe names none or never evaluates.
    """

    recipe: Recipe
    plan: DataPlan
    held_out: HeldOut | None

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: TextTokenizer, world: World) -> TrainingData:
        """Plan the lengths that are missing (one process does it), then open everything; every rank calls it.

        Raises:
            ConfigError: No training data, or a held-out task that is not trained.
            DataError: Shards or sidecars are missing, damaged or changed.
        """
        with distributed.fail_together():
            if world.is_main:
                for _ in plan_all_lengths(recipe, tokenizer):
                    pass
        with distributed.fail_together():
            plan = DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed)
            held_out = None
            if recipe.evaluation.every and recipe.data.held_out:
                held_out = HeldOut(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer)
                if unknown := sorted(set(held_out.tasks) - set(plan.tasks)):
                    raise ConfigError(f"data.held_out holds the task {unknown[0]!r}, which data.train has not; leave the dataset out")
        return cls(recipe, plan, held_out)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names that `Batch.task_ids` index."""
        return self.plan.tasks

    def begin(self, saved: LoaderState | None, changes: DataChanges, world: World) -> LoaderState:
        """The state that a run starts or resumes from, with what somebody changed recorded in it; every rank calls it.

        Args:
            saved: Of the checkpoint; None for the beginning.
            changes: What to change. What is kept out or left out already is not noted again.
            world: The ranks; one of them reads the file.

        Raises:
            ConfigError: The file of keys cannot be read, or names a sample that is not there; or data to leave out were delivered.
            DataError: The data are not those of the checkpoint, and that was not accepted.
        """
        with distributed.fail_together():
            state = self.plan.start() if saved is None else self.plan.resume(saved, accept_change=changes.accept)
            if changes.leave_out is not None and changes.leave_out not in [(one.first, one.last) for one in state.stretches]:
                state = self.plan.leave_out(state, *changes.leave_out, reason="--skip-steps")
            keys: list[str] = []
            if changes.exclude is not None and world.is_main:
                keys = read_keys(changes.exclude)
                check_known(keys, self.plan.datasets)
        kept_out = {key for exclusion in state.exclusions for key in exclusion.keys}
        new = [key for key in distributed.broadcast_json(keys) if key not in kept_out]
        if not new:
            return state
        _log.info("%d samples are kept out from step %d on", len(new), state.step + 1)
        return state.excluding(new)

    def loader(self, state: LoaderState, world: World, ledger: Sequence[Skipped] = ()) -> StepLoader:
        """Steps from `state` on (from `begin`), decoded ahead; `ledger` is what was skipped before."""
        return StepLoader(
            self.plan, rank=world.rank, world_size=world.size, state=state, task_weights=self.recipe.loss.task_weights, ledger=ledger
        )

    def held_out_batches(self, world: World) -> Iterator[Batch]:
        """This rank's micro-batches of the first `evaluation.rows` held-out rows; as many on every rank."""
        assert self.held_out is not None, "ask for held-out batches only where there is held-out data"
        return held_out_batches(
            self.held_out,
            rank=world.rank,
            world_size=world.size,
            num_rows=self.recipe.evaluation.rows,
            tasks=self.tasks,
            task_weights=self.recipe.loss.task_weights,
        )


def plan_all_lengths(recipe: Recipe, tokenizer: TextTokenizer) -> Iterator[str]:
    """Plan the lengths of every shard of a recipe that lacks them; a line a dataset and below it why samples cannot be used.

    Raises:
        DataError: A shard or its index is missing, damaged or changed.
    """
    rules = MediaRules.of(recipe.model, recipe.data)
    for part, datasets in (("train", recipe.data.train), ("held out", recipe.data.held_out)):
        for name, dataset in datasets.items():
            tars = find_shards(name, dataset, Path(recipe.data.root), reading=recipe.data.reading)
            form = SampleForm.of(name, dataset, recipe.data)
            # Held-out sounds are played as they are, whatever the dataset says of training.
            speeds = dataset.augment.audio_speeds if part == "train" else ONE_SPEED
            # One shard after the other, each once.
            with closing(open_reader(replace(recipe.data.reading, max_open_files=1))) as reader:
                written = ensure_lengths(tars, tokenizer, rules, form=form, speeds=speeds, reader=reader)
            known = open_catalogue(tars, lengths_key(tokenizer, rules, form=form, speeds=speeds))
            yield (
                f"{part}: {name}: {known.num_samples.sum():,} samples, {known.num_tokens:,} tokens, "
                f"{known.num_problems} that cannot be used, shards: {len(tars)}, planned now: {len(written)}"
            )
            if known.num_problems:
                key = lengths_key(tokenizer, rules, form=form, speeds=speeds)
                kinds = sum((problem_kinds(tar, load_index(tar), load_lengths(tar, key).problems) for tar in tars), Counter[str]())
                yield from (f"    {num:,}: {kind}" for kind, num in kinds.most_common(5))
            if known.num_problems == known.num_samples.sum():
                raise DataError(f"dataset {name} ({part}): none of its samples can be used; the reasons are above")
