import math

import numpy as np
import pytest

from megamm.core.errors import DataError
from megamm.metrics.cider import cider_scores


def test_a_hand_computed_example():
    # "a" is in both pictures' references, so it weighs nothing; every other n-gram is in one, and weighs log 2.
    scores = cider_scores(["a red cat", "a bird"], [["a red cat"], ["a blue dog"]])
    # Whole words, pairs and triples agree; a caption of three words has no quadruples.
    assert scores == pytest.approx([10 * 3 / 4, 0])


def test_clipping_and_length_of_a_hand_computed_example():
    scores = cider_scores(["cat cat cat", "dog"], [["cat"], ["dog"]])
    # Weights of single words: 3 log 2 against log 2, clipped to the reference's; "cat cat" is unseen and has no counterpart.
    clipped = math.log(2) * math.log(2) / (3 * math.log(2) * math.log(2))
    assert scores == pytest.approx([10 / 4 * clipped * math.exp(-(2**2) / (2 * 6**2)), 10 / 4])


def test_several_references_are_averaged():
    one = cider_scores(["a red cat", "x"], [["a red cat"], ["y"]])[0]
    two = cider_scores(["a red cat", "x"], [["a red cat", "green tree"], ["y"]])[0]
    assert two == pytest.approx(one / 2)


def test_figures_of_the_authors_code():
    """Golden values: pycocoevalcap 1.2, `CiderScorer` on these lower-case captions, which its tokenizer would leave as they are."""
    answers = ["a man riding a horse on a beach", "two dogs play in the grass", "a plate of food", "the train is at the station"]
    references = [
        ["a man rides a horse on the beach", "a person riding a horse near the ocean", "man on a horse at a beach"],
        ["two dogs playing in the grass", "dogs run in the grass in a park"],
        ["a plate of food on a table", "a white plate with food and a fork", "a plate of pasta"],
        ["a red train at the station", "the train is stopped at the station platform"],
    ]
    assert cider_scores(answers, references) == pytest.approx(GOLDEN, rel=1e-9)


GOLDEN = [2.917120110124168, 3.456388079179404, 3.848953099956658, 3.88793769246435]


def test_case_and_punctuation_do_not_count():
    references = [["A red cat."], ["It's a blue dog!"]]
    assert cider_scores(["a RED cat", "it's: a blue dog"], references) == pytest.approx(
        cider_scores(["A red cat.", "It's a blue dog!"], references)
    )


def test_chinese_is_scored_in_characters():
    references = [["一只红色的猫"], ["蓝色的狗"], ["绿树"]]
    scores = cider_scores(["一只红色的猫", "红色的马", "绿树"], references, tokenize="characters")
    assert scores[0] == pytest.approx(10)
    assert 0 < scores[1] < 5
    # Two of four orders: there are no triples of two characters.
    assert scores[2] == pytest.approx(5)


def test_nothing_said_is_zero():
    assert np.array_equal(cider_scores(["", "!"], [["a cat"], ["a dog"]]), [0, 0])


def test_a_single_picture_is_refused():
    with pytest.raises(DataError, match="CIDEr-D of 1 picture is undefined"):
        cider_scores(["a cat"], [["a cat"]])


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(DataError, match="CIDEr tokenizer 'ptb' is not known; the tokenizers are words, characters"):
        cider_scores(["a", "b"], [["a"], ["b"]], tokenize="ptb")
