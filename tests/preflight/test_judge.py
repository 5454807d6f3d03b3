"""Which nodes are blamed for what: made-up facts of nodes, one of which is wrong."""

from __future__ import annotations

import copy

import pytest

from megamm.config import Preflight
from megamm.preflight.gpus import Gpus
from megamm.preflight.judge import blamed_for_links, judge, merged_links

NODES = ("a", "b", "c", "d")


def facts_of(nodes=NODES, num_tasks=2):
    one = {
        "num_devices": 2,
        "software": {"torch": "2.13.0", "python": "3.11"},
        "recipe": "r",
        "gflops": 100.0,
        "gpus": Gpus(num_gpus=2).to_json(),
        "run_disk": {"free_gib": 100.0, "write_mib_per_second": 500.0},
        "scratch_disk": {"free_gib": 100.0, "write_mib_per_second": 500.0},
        "shared_memory_gib": 10.0,
        "open_files": 65536,
        "shared": {"run_disk": "a"},
        "data": "d",
        "problems": [],
    }
    ranks = [(node, local) for node in nodes for local in range(num_tasks)]
    return {rank: {**copy.deepcopy(one), "node": node, "local_rank": local} for rank, (node, local) in enumerate(ranks)}


def verdict(facts, *, clocks=None, links=None, missing=None, **settings):
    return judge(Preflight(**settings), facts, clocks=clocks or {}, links=links or {}, missing=missing or {})


def link(speed):
    return {"bytes_per_second": speed * 2**20}


def all_pairs(speed, *, slow=(), failed=()):
    pairs = [f"{one}+{other}" for number, one in enumerate(NODES) for other in NODES[number + 1 :]]
    links = {pair: link(speed) for pair in pairs} | {node: link(10 * speed) for node in NODES}
    links |= {pair: link(speed / 10) for pair in slow}
    return links | {pair: {"error": "timed out"} for pair in failed}


def test_equal_nodes_may_train():
    assert verdict(facts_of(), clocks=dict.fromkeys(NODES, 0.01), links=all_pairs(1000)).may_train


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_devices": 1}, "1 GPUs for 2 tasks"),
        ({"gpus": Gpus(num_gpus=1).to_json()}, "nvidia-smi lists 1 GPUs, on most nodes 2"),
        ({"gpus": Gpus(num_gpus=2, faults=("GPU 1: hot",)).to_json()}, "GPU 1: hot"),
        ({"run_disk": {"free_gib": 0.5, "write_mib_per_second": 500.0}}, "the run folder's disk has free_gib 0.5, at least 1 is wanted"),
        ({"scratch_disk": {"free_gib": 9.0, "write_mib_per_second": 1.0}}, "write_mib_per_second 1, at least 2 is wanted"),
        ({"shared_memory_gib": 0.06}, "shared_memory_gib is 0.06"),
        ({"open_files": 256}, "open_files is 256, at least 1024 is wanted"),
        ({"software": {"torch": "2.12.0", "python": "3.11"}}, "software torch is 2.12.0, on 3 of 4 nodes 2.13.0"),
        ({"software": {"torch": "2.13.0"}}, "software python is None, on 3 of 4 nodes 3.11"),
        ({"gpus": Gpus(num_gpus=2, driver="535.1").to_json()}, "GPU driver is 535.1, on 3 of 4 nodes"),
        ({"shared": {"run_disk": "b"}}, "its run folder is not the one that 3 of 4 nodes see (a and others)"),
        ({"recipe": "other"}, "recipe is other, on 3 of 4 nodes r"),
        ({"data": "other"}, "data is other, on 3 of 4 nodes d"),
        ({"gflops": 40.0}, "rank 2 multiplies matrices at 40 GFLOP/s, the median is 100"),
        ({"problems": ["the data: no shard matches"]}, "the data: no shard matches"),
    ],
)
def test_a_node_that_is_unlike_the_others_or_below_a_floor_is_named_with_the_reason(change, reason):
    facts = facts_of()
    facts[2] |= change
    found = verdict(facts).bad_nodes
    assert set(found) == {"b"}
    assert any(reason in line for line in found["b"]), found


def test_what_most_nodes_have_wrong_is_no_nodes_fault():
    facts = facts_of()
    for one in facts.values():
        one["problems"] = ["the data: no shard matches"]
    found = verdict(facts)
    assert not found.bad_nodes and not found.may_train
    assert found.problems == ["the data: no shard matches (4 of 4 nodes)"]


def test_run_folders_that_nobody_shares_are_no_nodes_fault():
    facts = facts_of()
    for one in facts.values():
        one["shared"] = {"run_disk": one["node"]}
    found = verdict(facts)
    assert not found.bad_nodes and "check its mount (3 of 4 nodes)" in found.problems[0]


def test_clocks_and_tasks_that_are_missing():
    found = verdict(facts_of(NODES[:3]), clocks={"a": 0.0, "b": -7.0, "c": 0.2}, missing={"d": "2 of its tasks did not come within 9 s"})
    assert found.bad_nodes == {
        "b": ["its clock is +7.00 s off the usual one, 5 s are borne"],
        "d": ["2 of its tasks did not come within 9 s"],
    }


def test_a_first_node_whose_clock_is_wrong_is_named_and_not_all_others():
    assert verdict(facts_of(), clocks={"a": 0.0, "b": 9.0, "c": 9.1, "d": 8.9}).bad_nodes == {
        "a": ["its clock is +8.90 s off the usual one, 5 s are borne"]
    }


def test_machines_without_gpus_are_compared_as_such():
    facts = facts_of()
    for one in facts.values():
        one |= {"num_devices": 0, "gpus": Gpus().to_json()}
    assert verdict(facts).may_train


@pytest.mark.parametrize("kind", ["slow", "failed"])
def test_a_bad_node_is_blamed_and_not_its_partners(kind):
    found = blamed_for_links(Preflight(), list(NODES), all_pairs(1000, **{kind: ("a+c", "b+c", "c+d")}))
    assert set(found) == {"c"}
    assert "a+c" in found["c"] and "and 2 more" in found["c"]


def test_of_three_nodes_the_bad_one_is_found_though_two_pairs_of_three_are_slow():
    links = {"a+b": link(1), "a+c": link(250), "b+c": link(1), "all": link(1)}
    assert set(blamed_for_links(Preflight(), ["a", "b", "c"], links)) == {"b"}


def test_one_bad_link_between_good_nodes_costs_one_of_them_and_says_that_it_may_be_the_other():
    found = blamed_for_links(Preflight(), list(NODES), all_pairs(1000, failed=("a+c",)))
    assert len(found) == 1 and "cannot be told" in next(iter(found.values()))
    # Its other links tell more.
    tells = all_pairs(1000, failed=("a+c",)) | {"b+c": link(500)}
    assert set(blamed_for_links(Preflight(), list(NODES), tells)) == {"c"}


def test_links_of_a_node_that_is_bad_anyway_are_blamed_on_it():
    links = {"a+b": {"error": "timed out"}}
    found = verdict(facts_of(("a", "b")), links=links, missing={"b": "1 of its tasks went away"}).bad_nodes
    assert found == {"b": ["1 of its tasks went away", "all-reduce of a+b fails: timed out"]}
    together = all_pairs(1000) | {"all": {"error": "timed out"}}
    assert set(verdict(facts_of(), links=together, missing={"d": "1 of its tasks went away"}).bad_nodes) == {"d"}


def test_a_floor_for_all_links_and_slow_work_inside_of_a_node():
    assert blamed_for_links(Preflight(min_link_mib_per_second=2000), ["a", "b"], {"a+b": link(1000)})
    inside = all_pairs(1000) | {"d": link(100)}
    assert set(blamed_for_links(Preflight(), list(NODES), inside)) == {"d"}
    assert not blamed_for_links(Preflight(min_link_share=0), list(NODES), inside)


def test_where_pairs_are_well_and_all_together_fail_nobody_is_left_out():
    found = verdict(facts_of(), links=all_pairs(1000) | {"all": {"error": "timed out"}})
    assert not found.bad_nodes and "all-reduce of all nodes fails: timed out (4 of 4 nodes)" in found.problems


def test_all_nodes_together_have_the_floor_of_links_and_no_share_of_them():
    links = all_pairs(1000) | {"all": link(100)}
    assert verdict(facts_of(), links=links).may_train
    found = verdict(facts_of(), links=links, min_link_mib_per_second=200)
    assert not found.bad_nodes
    assert found.problems == ["all-reduce of all nodes carries 100.0 MiB/s, at least 200.0 is wanted (4 of 4 nodes)"]


def test_a_group_is_as_fast_as_its_slowest_task_and_an_error_of_one_is_its_error():
    merged = merged_links({0: {"a+b": link(10), "a": link(5)}, 1: {"a+b": link(3)}, 2: {"a": {"error": "late"}}, 3: {"a": link(1)}})
    assert merged == {"a+b": link(3), "a": {"error": "late"}}
