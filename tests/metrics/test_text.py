import math

import numpy as np
import pytest
import sacrebleu

from megamm.core.errors import DataError
from megamm.metrics.text import (
    bits_per_byte,
    bleu,
    bleu_statistic,
    chrf,
    chrf_statistic,
    constant_exact_match,
    exact_match,
    exact_matches,
    perplexity,
)

ANSWERS = ["the cat sat on the mat", "a dog barks", "", "il fait beau aujourd'hui ."]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["the dog barks loudly"],
    ["hello"],
    ["il fait beau", "quel beau temps", "beau"],
]


def test_bleu_of_a_hand_computed_example():
    # Five of six words, three of five pairs, two of four triples and one of three quadruples; no brevity penalty.
    score = bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    shorter = bleu(["the cat sat on a"], [["the cat sat on a mat"]])
    assert shorter == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_chrf_of_a_hand_computed_example():
    # Characters: three of three answered, three of four wanted; pairs 2/2 and 2/3; triples 1/1 and 1/2.
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3
    assert chrf(["abc"], [["abcd"]]) == pytest.approx(100 * 5 * recall / (4 + recall))


@pytest.mark.parametrize(("metric", "theirs"), [(bleu, sacrebleu.BLEU(force=True)), (chrf, sacrebleu.CHRF())])
def test_corpora_with_several_references_equal_sacrebleu(metric, theirs):
    streams = [[texts[number] if number < len(texts) else None for texts in REFERENCES] for number in range(3)]
    assert metric(ANSWERS, REFERENCES) == pytest.approx(theirs.corpus_score(ANSWERS, streams).score)


@pytest.mark.parametrize(("metric", "statistic"), [(bleu, bleu_statistic), (chrf, chrf_statistic)])
def test_a_statistic_is_the_metric_of_its_selection(metric, statistic):
    counted = statistic(ANSWERS, REFERENCES)
    for chosen in ([0], [1, 1, 0], [3, 2, 0, 3]):
        expected = metric([ANSWERS[index] for index in chosen], [REFERENCES[index] for index in chosen])
        assert counted(np.array(chosen)) == pytest.approx(expected)


def test_chinese_needs_its_own_tokenizer():
    answers, references = ["我今天去了学校，很高兴。"], [["我今天去学校，很高兴。"]]
    assert bleu(answers, references) < 5
    assert 60 < bleu(answers, references, tokenize="zh") < 80
    assert bleu(["我们都很好"], [["我们都很好"]], tokenize="zh") == pytest.approx(100)


def test_all_wrong_and_nothing_said_are_zero():
    for answers in (["xyz qqq"], [""]):
        assert bleu(answers, [["the cat sat down"]]) == chrf(answers, [["the cat sat down"]]) == 0


def test_exact_match_of_a_counted_example():
    answers = [" two\ncats", "caf\u00e9", "Two", ""]
    references = [["two cats", "2 cats"], ["cafe\u0301"], ["two"], ["none"]]
    assert exact_matches(answers, references).tolist() == [True, True, False, False]
    assert exact_match(answers, references) == 0.5


def test_the_constant_answer_is_the_one_that_suits_most():
    references = [["yes", "yeah"], ["no"], ["yeah"], ["yeah", "yeah "]]
    assert constant_exact_match(references) == exact_match(["yeah"] * 4, references) == 0.75


def test_likelihoods_of_counted_examples():
    # Each of ten tokens is one of eight equally likely ones, and three bytes long.
    nats = 10 * math.log(8)
    assert perplexity(nats, 10) == pytest.approx(8)
    assert bits_per_byte(nats, 30) == pytest.approx(1)
    assert perplexity(0, 1) == 1
    assert perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize("nats_and_count", [(1.0, 0), (math.nan, 3)])
def test_likelihoods_of_nothing_are_refused(nats_and_count):
    for metric in (perplexity, bits_per_byte):
        with pytest.raises(DataError, match="have no mean"):
            metric(*nats_and_count)


@pytest.mark.parametrize("metric", [bleu, chrf, exact_match])
@pytest.mark.parametrize(
    ("answers", "references", "words"),
    [
        ([], [], "0 predictions for 0 references"),
        (["a"], ["a"], "sample 0 has references 'a'"),
        (["a", "b"], [["a"], []], "sample 1 has references"),
        (["a"], [["a", " "]], "none of them blank"),
    ],
)
def test_references_that_judge_nothing_are_named(metric, answers, references, words):
    with pytest.raises(DataError, match=words):
        metric(answers, references)


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(DataError, match="BLEU tokenizer 'cn' is not known; the tokenizers are 13a, intl, zh, char, none"):
        bleu(["a"], [["a"]], tokenize="cn")
