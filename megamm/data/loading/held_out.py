"""Held-out rows: every sample once, in order, the same number of micro-batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice

import numpy as np

from megamm.config import Batching, Data, Model
from megamm.core.errors import ConfigError
from megamm.core.logging import get_logger
from megamm.core.types import Batch, PackedRow, TokenSequence
from megamm.data.ledger import Skipped
from megamm.data.loading.collate import collate
from megamm.data.loading.decoders import RowJob
from megamm.data.loading.open_decoders import open_decoders
from megamm.data.media.features import MediaRules
from megamm.data.planning.rows import DEFAULT_COSTS, PlannedRow, Window
from megamm.data.samples.datasets import ShardSet, open_dataset
from megamm.data.samples.encode import SampleEncoder
from megamm.data.shards.reader import Reader
from megamm.tokenizers.text import TextTokenizer

_log = get_logger("data")


class HeldOut:
    """The held-out datasets of a recipe, packed in order. Stateless.

    Attributes:
        datasets: By name, sorted.
        tasks: Sorted names of the tasks that occur.
    """

    def __init__(self, data: Data, batch: Batching, *, model: Model, tokenizer: TextTokenizer) -> None:
        """Open the datasets; their lengths must have been planned (`lengths.ensure_lengths`).

        Raises:
            DataError: Shards, indexes or lengths are missing, damaged or changed.
        """
        rules = MediaRules.of(model, data)
        self.datasets = {
            name: open_dataset(name, data.held_out[name], data, tokenizer=tokenizer, rules=rules) for name in sorted(data.held_out)
        }
        self.tasks = tuple(sorted({task for dataset in self.datasets.values() for task in dataset.task_names}))
        self.data, self.batch, self.rules, self.tokenizer = data, batch, rules, tokenizer

    def rows(self) -> Iterator[PlannedRow]:
        """All rows, one of each dataset in turn until all are exhausted; a row holds samples of one dataset."""
        streams = [self._rows_of(dataset) for dataset in self.datasets.values()]
        while streams:
            for stream in list(streams):
                row = next(stream, None)
                if row is None:
                    streams.remove(stream)
                else:
                    yield row

    def _rows_of(self, dataset: ShardSet) -> Iterator[PlannedRow]:
        for start in range(0, dataset.num_samples, self.data.window):
            indices = np.arange(start, min(start + self.data.window, dataset.num_samples))
            window = Window.pack(
                (dataset.name,),
                indices,
                datasets=np.zeros_like(indices),
                indices=indices,
                epochs=np.zeros_like(indices),
                lengths=dataset.lengths[indices, 0],
                capacity=(self.batch.row_tokens, self.data.row_patches, self.data.row_frames),
                costs=DEFAULT_COSTS,
                row_key=None,
            )
            for sample in window.samples(window.unfit):
                reason = "it is larger than a row" if sample.tokens else dataset.problem(sample.index)
                _log.warning("held-out sample %d of %s is left out: %s", sample.index, dataset.name, reason)
            yield from (PlannedRow(window, number) for number in range(window.num_rows))


def held_out_batches(
    held_out: HeldOut,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_rows: int | None = None,
    tasks: tuple[str, ...] | None = None,
    task_weights: Mapping[str, float] | None = None,
    reader: Reader | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of the held-out rows, decoded one micro-batch ahead.

    The same samples whatever the number of ranks. Where rows do not divide by the ranks, the last micro-batches hold empty
    rows. Samples that cannot be used are left out with a warning.

    Args:
        held_out: What to read.
        rank: This rank.
        world_size: All ranks.
        num_rows: Rows of all ranks together, from the first on; None for all.
        tasks: Names that `task_ids` will index; the held-out tasks by default.
        task_weights: Task name -> loss weight of its tokens; 1 where not named.
        reader: Where bytes come from; what `data.reading` says by default.

    Raises:
        ConfigError: `tasks` lacks a held-out task.
        DataError: A shard cannot be read.
    """
    micro_rows, names = held_out.batch.micro_rows, held_out.tasks if tasks is None else tasks
    if unknown := sorted(set(held_out.tasks) - set(names)):
        raise ConfigError(f"held-out data hold the task {unknown[0]!r}, which is not among {', '.join(names)}; leave the dataset out")
    encoder = SampleEncoder(held_out.tokenizer, held_out.rules, task_weights or {})
    # One thread: held-out rows are few, and processes would take longer to start than to decode them.
    source, decoders = open_decoders(held_out.data, held_out.datasets, encoder, reader=reader, kind="threads", num_workers=1)

    def collated(jobs: list[RowJob]) -> Batch:
        packed = [PackedRow(_delivered(decoders.result(job))) for job in jobs]
        packed += [PackedRow()] * (micro_rows - len(packed))
        pad_id = held_out.tokenizer.vocabulary.control_id("pad")
        return collate(packed, held_out.batch.row_tokens, pad_id, names, head=held_out.rules.head)

    with closing(source), closing(decoders):
        ahead: list[RowJob] | None = None
        stream = islice(held_out.rows(), num_rows)
        while group := list(islice(stream, world_size * micro_rows)):
            jobs = [decoders.submit(row.samples) for row in group[rank * micro_rows : (rank + 1) * micro_rows]]
            if ahead is not None:
                yield collated(ahead)
            ahead = jobs
        if ahead is not None:
            yield collated(ahead)


def _delivered(outcomes: list[TokenSequence | Skipped]) -> list[TokenSequence]:
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            _log.warning("held-out sample %s/%s is left out: %s", outcome.dataset, outcome.key, outcome.reason)
    return [outcome for outcome in outcomes if isinstance(outcome, TokenSequence)]
