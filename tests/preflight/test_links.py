"""Rounds of pairs: each node once a round, each pair once in all."""

from __future__ import annotations

from itertools import combinations

import pytest

from megamm.preflight.links import group_name, pair_rounds


@pytest.mark.parametrize("num_nodes", range(1, 18))
def test_every_pair_meets_once_and_no_node_twice_in_a_round(num_nodes):
    rounds = pair_rounds(num_nodes, max_rounds=100)
    assert sorted(pair for one in rounds for pair in one) == list(combinations(range(num_nodes), 2))
    assert all(len({node for pair in one for node in pair}) == 2 * len(one) for one in rounds)


def test_many_nodes_have_a_few_rounds_each():
    rounds = pair_rounds(512, max_rounds=15)
    assert len(rounds) == 15
    assert all(sum(node in pair for one in rounds for pair in one) == 15 for node in (0, 1, 255, 511))


def test_names_of_groups():
    assert group_name(["a"], 1) == "a"
    assert group_name(["a", "b"], 2) == "a+b"
    assert group_name(["a", "b", "c"], 3) == "all"
