import pytest
import torch

from megamm.config import Head
from megamm.inference.explain.answer import find_answer
from megamm.inference.explain.gradients import TOLERANCE, gradient_times_input, integrated_gradients, smooth_times_input, total
from megamm.inference.explain.log_odds import LogOdds, alone
from megamm.inference.explain.question import read_question
from tests.inference.explain.conftest import QUESTION


@pytest.fixture(scope="module")
def log_odds(plain, question):
    return LogOdds(plain, question, find_answer(plain, question, "seven", max_new_tokens=1))


def test_integrated_gradients_sum_to_the_change_of_the_log_odds(log_odds):
    change = log_odds.at_input - log_odds.at_baseline
    contributions = integrated_gradients(log_odds, 256, 0)
    assert abs(change) > 0.1
    assert total(contributions) == pytest.approx(change, rel=0.05)
    assert {kind: value.shape for kind, value in contributions.items()} == {kind: value.shape for kind, value in log_odds.values.items()}


def test_a_way_with_a_bend_is_halved_where_it_bends(log_odds):
    class Bent:
        """Log odds that rise within a hundredth of the way."""

        def __init__(self):
            self.values, self.baseline, self.input_ids = {"text": torch.ones(1, 1)}, {"text": torch.zeros(1, 1)}, log_odds.input_ids
            self.at_baseline, self.at_input = float(self(alone(self.baseline))), float(self(alone(self.values)))
            self.places = []

        def __call__(self, values):
            if hasattr(self, "places") and values["text"].requires_grad:
                self.places += values["text"].flatten().tolist()
            return 5 * torch.tanh((values["text"].flatten() - 0.3) * 200)

    bent = Bent()
    assert total(integrated_gradients(bent, 8, 0)) != pytest.approx(10, abs=1)
    bent.places = []
    assert total(integrated_gradients(bent, 256, 0)) == pytest.approx(10, abs=0.15)
    assert len(bent.places) < 256
    assert sum(0.25 < place < 0.35 for place in bent.places) > len(bent.places) / 3


def test_gradient_times_input_is_the_slope_on_the_way_to_the_input(log_odds):
    def at(share):
        values = {kind: torch.lerp(log_odds.baseline[kind], value, share) for kind, value in log_odds.values.items()}
        with torch.no_grad():
            return log_odds(alone(values)).item()

    slope = (at(1.01) - at(0.99)) / 0.02
    assert total(gradient_times_input(log_odds, 0, 0)) == pytest.approx(slope, abs=0.02 * max(1.0, abs(slope)))


def test_layout_and_padding_contribute_nothing(log_odds, question):
    for how in (gradient_times_input, smooth_times_input, integrated_gradients):
        contributions = how(log_odds, 8, 0)
        words = slice(log_odds.text_start, log_odds.text_start + log_odds.num_text_tokens)
        assert contributions["text"][words].any()
        assert not contributions["text"][: words.start].any() and not contributions["text"][words.stop :].any()
        for number, image in enumerate(question.prompt.images):
            assert not contributions["image"][number, len(image.pixels) :].any()
        for number, audio in enumerate(question.prompt.audios):
            assert contributions["audio"][number, :, : audio.mel.shape[1]].any()
            assert not contributions["audio"][number, :, audio.mel.shape[1] :].any()


def test_smooth_gradients_are_those_of_their_seed(log_odds):
    first, again, other = (smooth_times_input(log_odds, 4, seed)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("states", ["decoder", "vision"])
def test_a_heads_label_is_attributed_completely(make_loaded, files, states):
    loaded = make_loaded(head=Head(kind="linear", labels=("zero", "one"), states=states))
    asked = read_question(loaded, QUESTION, images=[files / "a.jpg"])
    log_odds = LogOdds(loaded, asked, find_answer(loaded, asked, None, max_new_tokens=1))
    contributions = integrated_gradients(log_odds, 256, 0)
    change = log_odds.at_input - log_odds.at_baseline
    assert change != 0
    assert total(contributions) == pytest.approx(change, abs=2 * TOLERANCE)
    # A head that looks at the tower alone hears of no words.
    assert bool(contributions["text"].any()) == (states == "decoder")
