from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import ConfigError, DataError
from megamm.prepare.plan import Limits, Splitting, make_plan, read_names, split_of
from megamm.prepare.source import Record


def records(sizes, splits=None, groups=None):
    return [
        Record(f"key-{index}", size, index, splits[index] if splits else "", groups[index] if groups else "")
        for index, size in enumerate(sizes)
    ]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 100),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.3]),
)
def test_every_record_is_in_one_shard_within_the_limits(sizes, num_samples, num_bytes, seed, share):
    plans = make_plan(records(sizes), Splitting(seed=seed, test_share=share), Limits(num_samples, num_bytes))
    placed = [index for plan in plans for number in range(plan.num_shards) for index in plan.records(number)]
    assert sorted(placed) == list(range(len(sizes)))
    for plan in plans:
        for number in range(plan.num_shards):
            inside = plan.records(number)
            assert 0 < len(inside) <= num_samples
            assert len(inside) == 1 or sum(sizes[index] for index in inside) <= num_bytes
            if number + 1 < plan.num_shards:  # the next record would have been too much
                more = sum(sizes[index] for index in inside) + sizes[plan.records(number + 1)[0]]
                assert len(inside) == num_samples or more > num_bytes


def test_a_seed_decides_the_order_and_shuffles_it():
    def order(seed):
        return make_plan(records([1] * 1000), Splitting(seed=seed), Limits())[0].order

    assert np.array_equal(order(1), order(1))
    assert not np.array_equal(order(1), order(2))
    assert abs(np.corrcoef(order(1), np.arange(1000))[0, 1]) < 0.1


def test_splits_of_the_source_stay_apart_and_sort_by_name():
    plans = make_plan(records([1] * 6, ["train", "test", "train", "validation", "test", ""]), Splitting("train"), Limits())
    assert {plan.split: sorted(plan.order.tolist()) for plan in plans} == {"test": [1, 4], "train": [0, 2, 5], "validation": [3]}
    assert [plan.split for plan in plans] == ["test", "train", "validation"]
    assert plans[0].shard_name(0) == "test-00000"


def test_names_sort_as_numbers_beyond_five_digits():
    plan = make_plan(records([1]), Splitting(), Limits())[0]
    assert plan.shard_name(0) == "train-00000"
    plan = replace(plan, starts=np.arange(100_002))
    names = [plan.shard_name(number) for number in (0, 99_999, 100_000)]
    assert names == ["train-000000", "train-099999", "train-100000"]


@given(st.integers(0, 2**63), st.floats(0.05, 0.95))
def test_groups_are_held_out_whole_and_whatever_else_there_is(seed, share):
    groups = [f"group-{index // 4}" for index in range(400)]
    splitting = Splitting(seed=seed, test_share=share)
    found = [split_of(record, splitting) for record in records([1] * 400, groups=groups)]
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 400, 4))
    assert found[:100] == [split_of(record, splitting) for record in records([1] * 100, groups=groups[:100])]
    # 100 groups: the bound is eight standard deviations
    assert abs(found.count("test") / 400 - share) < 8 * (share * (1 - share) / 100) ** 0.5


def test_listed_keys_and_groups_are_held_out():
    listed = Splitting(test_names=frozenset({"key-1", "b"}))
    plans = make_plan(records([1] * 4, groups=["a", "a", "b", "c"]), listed, Limits())
    assert {plan.split: sorted(plan.order.tolist()) for plan in plans} == {"test": [1, 2], "train": [0, 3]}


def test_the_digest_sees_every_change_of_a_split():
    def digest(changed, split="train"):
        plans = make_plan(changed, Splitting(), Limits())
        return next(plan.digest for plan in plans if plan.split == split)

    base = records([1, 2, 3], ["train", "train", "test"])
    assert digest(base) == digest(list(base))
    for record in (Record("other", 1, 0), Record("key-0", 5, 0), Record("key-0", 1, "label")):
        assert digest([record, *base[1:]]) != digest(base)
        assert digest([record, *base[1:]], "test") == digest(base, "test")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"records": []}, DataError, "holds no sample"),
        ({"records": records([1, 1]) + records([1])}, DataError, "key 'key-0' belongs to 2 records"),
        ({"splitting": Splitting("Train")}, ConfigError, "split 'Train' cannot begin a file's name"),
        ({"splitting": Splitting("a-b")}, ConfigError, "split 'a-b' cannot begin"),
        ({"records": records([1], ["dev"]), "splitting": Splitting("val")}, ConfigError, r"--split val names nothing, .* itself \(dev\)"),
        ({"splitting": Splitting(test_share=1.5)}, ConfigError, "--test-share 1.5 is not a share"),
        ({"splitting": Splitting("test", test_share=0.5)}, ConfigError, "--split test puts everything"),
        (
            {"splitting": Splitting(test_names=frozenset({"key-0", "absent", "gone"}))},
            DataError,
            "2 names of --test-list .* first is 'absent'",
        ),
        (
            {"records": records([1], ["dev"]), "splitting": Splitting(test_share=0.5)},
            ConfigError,
            r"the source splits itself \('key-0' is 'dev'\)",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(changes, error, message):
    arguments = {"records": records([1, 1]), "splitting": Splitting(), "limits": Limits(), **changes}
    with pytest.raises(error, match=message):
        make_plan(**arguments)


def test_name_lists_are_lines(tmp_path):
    (tmp_path / "test.txt").write_text("a/b.jpg\n\n  七 \n", encoding="utf-8")
    assert read_names(tmp_path / "test.txt") == {"a/b.jpg", "七"}
    with pytest.raises(ConfigError, match=r"--test-list .*absent\.txt cannot be read"):
        read_names(tmp_path / "absent.txt")
