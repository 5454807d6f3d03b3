import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import ConfigError
from megamm.tokenizers.item_codes import learn_codes
from megamm.tokenizers.item_features import item_features

pytest.importorskip("sklearn")


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_two_items_share_their_codes_however_alike_they_are(data):
    num_levels, num_codes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    num_items = data.draw(st.integers(1, num_codes**num_levels))
    generator = np.random.default_rng(data.draw(st.integers(0, 9)))
    # Few different points, some of them far from the others.
    features = generator.normal(size=(data.draw(st.integers(1, 4)), 3))[generator.integers(0, 1, num_items)] * generator.choice(
        [0, 1, 100], (num_items, 1)
    )
    codes = learn_codes(features, num_levels, num_codes, seed=1)
    assert codes.shape == (num_items, num_levels)
    assert 0 <= codes.min() <= codes.max() < num_codes
    assert len(np.unique(codes, axis=0)) == num_items


def test_more_items_than_codes_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"10 items do not fit into tokenizer.item_levels=2 levels of item_codes=3 \(9 combinations\)"):
        learn_codes(np.zeros((10, 2)), 2, 3, seed=0)


def test_items_that_are_alike_begin_alike():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 8)
    features = 10 * np.eye(4)[group] + generator.normal(scale=0.1, size=(32, 4))
    codes = learn_codes(features, 2, 8, seed=0)
    # More codes than groups: a group may take two, never share one.
    for code in range(8):
        assert len(set(group[codes[:, 0] == code])) <= 1
    assert learn_codes(features, 2, 8, seed=0).tolist() == codes.tolist()


def test_a_full_code_keeps_the_nearest():
    # Two far points and a crowd: three codes of one level with room for one each at the last level.
    features = np.array([[0.0], [0.1], [5.0]])
    codes = learn_codes(features, 1, 3, seed=0)[:, 0]
    assert len(set(codes.tolist())) == 3
    crowd = np.array([[0.0], [0.0], [0.0], [9.0]])
    first = learn_codes(crowd, 2, 2, seed=0)[:, 0]
    # A code of two has room for two of the three that are alike, and the far one keeps its own.
    assert sorted(np.bincount(first, minlength=2).tolist()) == [2, 2]
    assert first[0] == first[1] != first[2] == first[3]


def test_words_and_company_bring_items_together():
    texts = ["red lamp small", "red lamps large", "egg cup", "egg cups blue", "", ""]
    near = item_features(texts, [], seed=0)
    near = near @ near.T
    assert near[0, 1] > 0.1 + near[0, 2]
    assert near[2, 3] > 0.1 + near[1, 3]
    assert near[4, 5] == 0
    baskets = [np.array(basket) for basket in ([0, 2], [0, 2], [1, 3], [1, 3], [0, 2, 4])]
    met = item_features([""] * 6, baskets, seed=0)
    met = met @ met.T
    assert met[0, 2] > 0.3 + met[0, 1]
    assert met[5, 5] == 0


def test_one_item_has_features_and_codes():
    assert learn_codes(item_features(["lamp"], [], seed=0), 2, 4, seed=0).tolist() == [[0, 0]]


def test_features_are_the_same_every_time():
    texts, baskets = [f"thing number {index}" for index in range(20)], [np.array([index, (7 * index + 3) % 20]) for index in range(20)]
    assert np.array_equal(item_features(texts, baskets, seed=3), item_features(texts, baskets, seed=3))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"pip install 'megamm\[prepare\]'"):
        learn_codes(np.zeros((2, 2)), 1, 2, seed=0)
