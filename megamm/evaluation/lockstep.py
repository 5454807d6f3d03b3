"""Held-out samples put to a model whose weights are split over ranks, so that no rank can run a forward alone.

Under ZeRO-3 every forward gathers weights from all ranks. Each rank therefore reads and prepares its own samples first, all agree on how
many batches there are of each way of judging, and a rank with fewer keeps step with nothing. In each batch greedy answers go on until the
last rank has its own, and rankings have the same size everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megamm.core.types import Sample
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.evaluation.held_out import Place
from megamm.evaluation.judge import WAYS, Item, Judge, prepared
from megamm.evaluation.records import Result, SkippedSample
from megamm.inference.load import Loaded


def judge_in_step(
    loaded: Loaded,
    samples: Iterable[tuple[Place, Sample | SkippedSample]],
    *,
    world: World,
    batch_size: int,
    max_new_tokens: int,
    moved: Callable[[], None],
) -> list[Result]:
    """Answer or score this rank's samples, all ranks together; one result a sample, in no certain order.

    Args:
        loaded: A model in evaluation mode whose forwards take all ranks.
        samples: This rank's, from `read_samples`; all are held in memory at once.
        world: The ranks.
        batch_size: Samples that a rank runs at once.
        max_new_tokens: Bound on an answer.
        moved: Called before each batch, for those who watch this rank.

    Raises:
        DataError: On every rank: a shard of one rank is missing, or changed since it was indexed.
    """
    judge = Judge(loaded, max_new_tokens, in_step=world.size > 1)
    results: list[Result] = []
    waiting: dict[str, list[Item]] = {way: [] for way in WAYS}
    with distributed.fail_together():
        for found in prepared(judge, samples, ()):
            if isinstance(found, SkippedSample):
                results.append(found)
            else:
                waiting[found[0]].append(found[1])
    own = [-(-len(waiting[way]) // batch_size) for way in WAYS]
    for way, num_batches in zip(WAYS, map(max, zip(*distributed.gather_json(own), strict=True)), strict=True):
        for start in range(0, num_batches * batch_size, batch_size):
            moved()
            results += judge.run(way, waiting[way][start : start + batch_size])
    return results
