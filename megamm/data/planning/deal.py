"""Dealing the rows of a step to ranks and micro-steps by cost, so that no rank waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol, TypeVar

from megamm.config import Batching
from megamm.core.errors import ConfigError


class HasCost(Protocol):
    """Something with an estimated cost, in any unit."""

    @property
    def cost(self) -> float:
        """The cost."""
        ...


Row = TypeVar("Row", bound=HasCost)


def resolve_accumulation(batch: Batching, world_size: int) -> int:
    """Micro-steps a step: `batch.accumulation`, or where that is 0 the least that holds all rows.

    Raises:
        ConfigError: Fewer rows than ranks, or a given accumulation that does not make up the global batch.
    """
    if batch.global_rows < world_size:
        raise ConfigError(
            f"batch.global_rows={batch.global_rows} is less than one row a rank at world size {world_size}; "
            f"set batch.global_rows to {world_size} or more, or start fewer ranks"
        )
    slots = batch.micro_rows * world_size
    if batch.accumulation == 0:
        return -(-batch.global_rows // slots)
    total = slots * batch.accumulation
    if batch.global_rows != total:
        raise ConfigError(
            f"batch.global_rows={batch.global_rows} is not micro_rows {batch.micro_rows} × accumulation {batch.accumulation} "
            f"× world {world_size} = {total}; set batch.global_rows to {total}, or batch.accumulation to 0 for empty rows in spare slots"
        )
    return batch.accumulation


def deal(rows: Sequence[Row], world_size: int, micro_rows: int, accumulation: int) -> list[list[list[Row | None]]]:
    """Deal rows to ranks so that every rank has equally many (to one) and nearly the same cost.

    A pure function of its arguments: every rank computes the same. Within a rank rows run from the costliest down, so that
    ranks run rows of similar cost at the same time; slots that are left over hold None (an empty row) and come last.

    Args:
        rows: The rows of a step in their global order.
        world_size: Ranks.
        micro_rows: Slots of a micro-step.
        accumulation: Micro-steps.

    Returns:
        Rows by [rank][micro-step][slot].

    Raises:
        ConfigError: More rows than slots, or fewer rows than ranks.

    Source: the balanced largest differencing method: Michiels, Korst, Aarts and van Leeuwen, "Performance Ratios for the
        Differencing Method Applied to the Balanced Number Partitioning Problem" (2003).
    """
    num_slots = micro_rows * accumulation
    if not world_size <= len(rows) <= world_size * num_slots:
        raise ConfigError(
            f"{len(rows)} rows cannot be dealt to {world_size} ranks of {num_slots} slots; every rank needs one row, every row one slot"
        )
    ordered: list[Row | None] = [rows[number] for number in sorted(range(len(rows)), key=lambda number: (-rows[number].cost, number))]
    ordered += [None] * (-len(rows) % world_size)
    # An empty row runs as many tokens as any other.
    cheapest = min(row.cost for row in rows)
    alone = [(cheapest if row is None else row.cost, [row]) for row in ordered]
    hands = _level([alone[start : start + world_size] for start in range(0, len(alone), world_size)])
    dealt = []
    for hand in hands:
        # Stable, so that rows of equal cost keep the order in which they were dealt.
        full = sorted((row for row in hand if row is not None), key=lambda row: -row.cost)
        slots = [*full, *[None] * (num_slots - len(full))]
        dealt.append([slots[start : start + micro_rows] for start in range(0, num_slots, micro_rows)])
    return dealt


def _level(groups: list[list[tuple[float, list[Row | None]]]]) -> list[list[Row | None]]:
    """Merge groups of one hand a rank, always the two whose hands differ most, the heaviest hand with the lightest."""

    def entry(group: list[tuple[float, list[Row | None]]], number: int):
        # Lightest minus heaviest, since the heap gives the smallest first; the number is unique, so groups are never compared.
        return group[-1][0] - group[0][0], number, group

    heap = [entry(group, number) for number, group in enumerate(groups)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, number, second = heapq.heappop(heap)
        pairs = zip(first, reversed(second), strict=True)
        merged = [(heavy + light, [*ones, *others]) for (heavy, ones), (light, others) in pairs]
        heapq.heappush(heap, entry(sorted(merged, key=lambda hand: -hand[0]), number + len(groups)))
    return [hand for _, hand in heap[0][2]]
