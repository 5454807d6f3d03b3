import math

import pytest
import torch

from megamm.config import Head
from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Message, Part, Sample
from megamm.inference import heads
from megamm.inference.explain.answer import find_answer
from megamm.inference.explain.log_odds import LogOdds, alone
from megamm.inference.explain.question import read_question
from megamm.inference.generate import Sampling, generate
from tests.inference.explain.conftest import QUESTION

LABELS = ("zero", "one", "two")


def test_log_odds_are_those_of_the_answer_that_the_model_gives(plain, question):
    said = generate(plain, [question.prompt], Sampling(max_new_tokens=3))[0]
    answer = find_answer(plain, question, None, max_new_tokens=3)
    assert answer.token_ids == said.token_ids and not answer.is_given
    log_odds = LogOdds(plain, question, answer)
    wanted = sum(math.log(one / (1 - one)) for one in said.probabilities)
    assert log_odds.at_input == pytest.approx(wanted, abs=1e-3)
    assert log_odds.log_probabilities() == pytest.approx([math.log(one) for one in said.probabilities], abs=1e-4)


def test_several_variants_give_what_each_gives_alone(plain, question):
    log_odds = LogOdds(plain, question, find_answer(plain, question, "seven", max_new_tokens=1))
    both = {kind: torch.stack([log_odds.values[kind], log_odds.baseline[kind]]) for kind in log_odds.values}
    with torch.no_grad():
        assert log_odds(both).tolist() == pytest.approx([log_odds.at_input, log_odds.at_baseline], abs=1e-3)
        assert log_odds(alone(log_odds.baseline)).item() == pytest.approx(log_odds.at_baseline, abs=1e-3)
    assert abs(log_odds.at_input - log_odds.at_baseline) > 0.01


def test_the_baseline_has_no_content_and_the_same_layout(plain, question):
    log_odds = LogOdds(plain, question, find_answer(plain, question, "seven", max_new_tokens=1))
    changed = (log_odds.values["text"] != log_odds.baseline["text"]).any(1)
    words = torch.zeros(len(changed), dtype=torch.bool)
    words[log_odds.text_start : log_odds.text_start + log_odds.num_text_tokens] = True
    assert torch.equal(changed, words)
    assert plain.tokenizer.decode(log_odds.input_ids[words]) == QUESTION
    for number, image in enumerate(question.prompt.images):
        shown, rest = log_odds.baseline["image"][number].tensor_split([len(image.pixels)])
        assert (shown.unflatten(1, (-1, 3)) - shown.unflatten(1, (-1, 3))[0, 0]).abs().max() == 0
        assert shown.mean() == pytest.approx(float(image.pixels.mean()), abs=1e-5) and not rest.any()
    for number, audio in enumerate(question.prompt.audios):
        heard = log_odds.baseline["audio"][number, :, : audio.mel.shape[1]]
        assert (heard == float(audio.mel.min())).all()
        assert not log_odds.baseline["audio"][number, :, audio.mel.shape[1] :].any()


@pytest.mark.parametrize("states", ["decoder", "vision", "audio"])
def test_a_heads_label_is_the_one_that_it_predicts(make_loaded, files, states):
    loaded = make_loaded(head=Head(kind="linear", labels=LABELS, states=states))
    media = {"images": [files / "a.jpg"]} if states != "audio" else {"audios": [files / "c.flac"]}
    asked = read_question(loaded, QUESTION, **media)
    answer = find_answer(loaded, asked, None, max_new_tokens=1)
    kind, path = ("audio", files / "c.flac") if states == "audio" else ("image", files / "a.jpg")
    message = Message("user", (Part(kind, member="0"), Part("text", text=QUESTION)))
    said = heads.predict(loaded, [Sample("key", "classification", (message,), {"0": path.read_bytes()})])[0]
    best = said.labels[0]
    log_odds = LogOdds(loaded, asked, answer)
    assert (answer.text, answer.label) == (best.label, LABELS.index(best.label))
    assert math.exp(log_odds.log_probabilities()[0]) == pytest.approx(best.score, abs=1e-5)
    assert log_odds.at_input == pytest.approx(math.log(best.score / (1 - best.score)), abs=1e-4)
    given = LogOdds(loaded, asked, find_answer(loaded, asked, "one", max_new_tokens=1))
    scores = {one.label: one.score for one in said.labels}
    assert given.at_input == pytest.approx(math.log(scores["one"] / (1 - scores["one"])), abs=1e-4)


def test_labels_of_a_head_with_many_have_odds_of_their_own(make_loaded, files):
    loaded = make_loaded(head=Head(kind="linear", labels=LABELS, multi_label=True, pool="last"))
    asked = read_question(loaded, QUESTION, images=[files / "a.jpg"])
    answer = find_answer(loaded, asked, "two", max_new_tokens=1)
    log_odds = LogOdds(loaded, asked, answer)
    with torch.no_grad():
        logits, _ = log_odds.logits(alone(log_odds.values))
    assert log_odds.at_input == pytest.approx(float(logits[0, 0, 2]))
    assert log_odds.log_probabilities()[0] == pytest.approx(math.log(torch.sigmoid(logits[0, 0, 2]).item()))


def test_what_cannot_be_asked_or_explained_is_named(plain, make_loaded, files, question, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    for arguments, error, message in (
        ({"text": ""}, ConfigError, "nothing is asked; give --text, --image or --audio"),
        ({"text": "", "images": [files / "gone.jpg"]}, ConfigError, r"gone\.jpg does not exist"),
        ({"text": "", "images": [files / "c.flac"]}, ConfigError, r"c\.flac is no image file; give it to --audio"),
        ({"text": "", "images": [tmp_path / "damaged.png"]}, DataError, r"damaged\.png: "),
    ):
        with pytest.raises(error, match=message):
            read_question(plain, **arguments)
    with pytest.raises(DataError, match="this model has no tower for a sound"):
        read_question(make_loaded(audio=False), "", audios=[files / "c.flac"])
    with pytest.raises(DataError, match="no tower for it"):
        read_question(make_loaded(vision=""), "", images=[files / "a.jpg"])
    with pytest.raises(ConfigError, match="--answer '' holds no token"):
        find_answer(plain, question, "", max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"take \d+ tokens, more than the decoder's"):
        find_answer(plain, question, "seven " * 40_000, max_new_tokens=1)
    linear = make_loaded(head=Head(kind="linear", labels=LABELS, states="vision"))
    with pytest.raises(ConfigError, match="--answer 'twoo' is no label of the head; did you mean 'two'"):
        find_answer(linear, read_question(linear, QUESTION, images=[files / "a.jpg"]), "twoo", max_new_tokens=1)
    with pytest.raises(DataError, match="holds 2 image parts"):
        read_question(linear, QUESTION, images=[files / "a.jpg", files / "b.png"])
    fused = make_loaded(head=Head(kind="linear", labels=LABELS, states="towers"))
    with pytest.raises(DataError, match="the sample holds no image and no audio, and this linear head looks at nothing else"):
        read_question(fused, QUESTION)
    speech = make_loaded(head=Head(kind="ctc", labels=("a", "b"), states="audio"))
    with pytest.raises(ConfigError, match="a ctc head gives no label that could be explained"):
        find_answer(speech, read_question(speech, "", audios=[files / "c.flac"]), None, max_new_tokens=1)
