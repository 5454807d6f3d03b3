"""Dealing: every row once, no rank idle, costs level, and the arithmetic of the batch triple."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Batching
from megamm.core.errors import ConfigError
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.packing import pack


@dataclass(frozen=True)
class Row:
    number: int
    cost: float


def rows_of(costs) -> list[Row]:
    return [Row(number, cost) for number, cost in enumerate(costs)]


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.data())
def test_every_row_is_dealt_once_and_every_rank_has_one(world_size, micro_rows, accumulation, data):
    slots = world_size * micro_rows * accumulation
    rows = rows_of(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.5]), min_size=world_size, max_size=slots)))
    hands = deal(rows, world_size, micro_rows, accumulation)
    dealt = [row for hand in hands for step in hand for row in step if row is not None]
    assert sorted(dealt, key=lambda row: row.number) == rows
    assert all(len(hand) == accumulation and all(len(step) == micro_rows for step in hand) for hand in hands)
    assert all(any(row is not None for step in hand for row in step) for hand in hands)
    for hand in hands:
        flat = [row for step in hand for row in step]
        costs = [row.cost for row in flat if row is not None]
        assert costs == sorted(costs, reverse=True)
        assert None not in flat[: len(costs)]


def test_left_over_slots_are_empty_and_last():
    hands = deal(rows_of([1.0] * 5), 2, 2, 2)
    assert [[[row is not None for row in step] for step in hand] for hand in hands] == [
        [[True, True], [True, False]],
        [[True, True], [False, False]],
    ]


def test_costs_are_level_over_64_ranks():
    """Rows of 8192 tokens with log-normal documents: attention makes single rows up to 1.48 times as costly as the mean.

    A rank that has the costliest row and seven of the cheapest still has 1.014 times the mean.
    """
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5.5, 1.2, 65536), 8, 8192).astype(np.int64)
    packed = pack(np.stack([tokens, 0 * tokens, 0 * tokens], axis=1), (8192, 1, 1))
    costs = 8192 + np.bincount(packed, weights=tokens.astype(float) ** 2) / 12288
    rng.shuffle(costs)
    hands = deal(rows_of(costs[: 64 * 8].tolist()), 64, 1, 8)
    sums = [sum(row.cost for step in hand for row in step if row) for hand in hands]
    assert max(sums) / np.mean(sums) <= 1.03
    # A micro-step lasts as long as its slowest rank; in the order of packing it takes 1.44 times the mean.
    lockstep = sum(max(sum(row.cost for row in hand[step] if row) for hand in hands) for step in range(8))
    assert lockstep / np.mean(sums) <= 1.05


def test_impossible_deals_are_refused():
    with pytest.raises(ConfigError, match="every rank needs one row"):
        deal(rows_of([1.0]), 2, 1, 1)
    with pytest.raises(ConfigError, match="every row one slot"):
        deal(rows_of([1.0] * 3), 2, 1, 1)


@pytest.mark.parametrize(
    ("global_rows", "micro_rows", "world_size", "expected"), [(8, 1, 1, 8), (8, 2, 2, 2), (9, 2, 2, 3), (8, 4, 3, 1), (3, 1, 3, 1)]
)
def test_accumulation_is_derived(global_rows, micro_rows, world_size, expected):
    assert resolve_accumulation(Batching(global_rows=global_rows, micro_rows=micro_rows), world_size) == expected


def test_given_accumulation_must_make_up_the_batch():
    assert resolve_accumulation(Batching(global_rows=16, micro_rows=2, accumulation=4), 2) == 4
    with pytest.raises(ConfigError) as error:
        resolve_accumulation(Batching(global_rows=250, micro_rows=4, accumulation=8), 8)
    assert str(error.value).startswith(
        "batch.global_rows=250 is not micro_rows 4 × accumulation 8 × world 8 = 256; set batch.global_rows to 256"
    )


def test_less_than_one_row_a_rank_is_refused():
    with pytest.raises(ConfigError, match=r"batch\.global_rows=3 is less than one row a rank at world size 4"):
        resolve_accumulation(Batching(global_rows=3), 4)
