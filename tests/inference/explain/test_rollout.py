import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import Head
from megamm.config.schema import Adapter
from megamm.core.errors import ConfigError
from megamm.inference.explain import rollout
from megamm.inference.explain.answer import find_answer
from megamm.inference.explain.explain import METHODS
from megamm.inference.explain.log_odds import LogOdds, alone
from megamm.inference.explain.question import read_question
from megamm.inference.explain.recorded_attention import recorded, recording
from megamm.inference.explain.rollout import AttentionMethod, relevant, rolled_out, trace
from tests.inference.explain.conftest import QUESTION

BY_ATTENTION = {name: method.how for name, method in METHODS.items() if isinstance(method.how, AttentionMethod)}


def _everything(loaded, files):
    asked = read_question(loaded, QUESTION, images=[files / "a.jpg", files / "b.png"], audios=[files / "c.flac", files / "d.flac"])
    return LogOdds(loaded, asked, find_answer(loaded, asked, "7 = seven", max_new_tokens=1))


def _sum(shares):
    return float(shares.tokens.sum()) + sum(float(one.sum()) for one in (*shares.cells, *shares.sounds)) + shares.prefix


@given(seed=st.integers(0, 10_000), size=st.integers(1, 6), num_layers=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_rows_of_every_stack_sum_to_one(seed, size, num_layers):
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(size, size, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(num_layers)]
    for mix in (rolled_out, relevant):
        mixed = mix(layers)
        assert (mixed >= 0).all()
        assert torch.allclose(mixed.sum(1), torch.ones(size, dtype=torch.float64))


def test_two_layers_are_mixed_in_their_order():
    swap, first = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    # The second layer takes half of its own state, half of the other's; the first one has moved half of state 1 to state 0.
    assert torch.allclose(rolled_out([first, swap]), torch.tensor([[0.75, 0.25], [0.75, 0.25]]).double())
    assert torch.allclose(rolled_out([swap, first]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double())
    # 1 + 0.2 A: what comes from elsewhere, without the state itself, shares its half.
    assert torch.allclose(relevant([0.2 * swap]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double())
    assert torch.equal(relevant([torch.zeros(2, 2).double()]), torch.eye(2).double())


def test_recorded_attention_says_the_same_and_leaves_no_trace(plain, files):
    log_odds = _everything(plain, files)
    configs = [plain.model.model.language_model.config, plain.model.model.vision_tower.config, plain.model.model.audio_tower.config]
    before = [config._attn_implementation for config in configs]
    with recording(plain.model), torch.no_grad():
        assert log_odds(alone(log_odds.values)).item() == pytest.approx(log_odds.at_input, abs=1e-3)
        layers = recorded(plain.model.model.language_model)
        assert [len(calls) for calls in layers] == [1, 1]
        num_tokens = len(log_odds.input_ids)
        assert layers[0][0].shape == (1, 4, num_tokens, num_tokens) and not layers[0][0].triu(1).any()
        assert [calls[0].shape[0] for calls in recorded(plain.model.model.vision_tower)] == [2, 2]
        # Two sounds, a window each.
        assert [len(calls) for calls in recorded(plain.model.model.audio_tower)] == [2, 2]
    assert [config._attn_implementation for config in configs] == before
    assert not recorded(plain.model)


@pytest.mark.parametrize("method", BY_ATTENTION)
@pytest.mark.parametrize("changes", [{}, {"merge": 2}, {"vision": "resnet"}, {"vision": "resnet", "merge": 2}], ids=str)
def test_shares_of_everything_sum_to_one(make_loaded, files, method, changes):
    log_odds = _everything(make_loaded(**changes), files)
    shares = trace(log_odds, BY_ATTENTION[method])
    assert _sum(shares) == pytest.approx(1, abs=1e-6)
    assert [tuple(one.shape) for one in shares.cells] == [image.grid for image in log_odds.prompt.images]
    assert [len(one) for one in shares.sounds] == [audio.num_tokens for audio in log_odds.prompt.audios]
    assert all(float(one.sum()) > 0 for one in (*shares.cells, *shares.sounds)) and shares.prefix == 0
    assert all((one >= 0).all() for one in (shares.tokens, *shares.cells, *shares.sounds))


def test_answers_differ_in_what_is_relevant_and_not_in_where_attention_goes(plain, question):
    def shares(answer, method):
        return trace(LogOdds(plain, question, find_answer(plain, question, answer, max_new_tokens=1)), BY_ATTENTION[method])

    # Answers of one token each, so that both are read at the same place.
    assert torch.equal(shares("3", "rollout").cells[0], shares("1", "rollout").cells[0])
    assert not torch.allclose(shares("3", "relevance").cells[0], shares("1", "relevance").cells[0], rtol=1e-3)


@pytest.mark.parametrize("method", BY_ATTENTION)
def test_a_learned_prefix_takes_a_share_of_its_own(make_loaded, files, method):
    loaded = make_loaded(adapter=Adapter(method="prefix", prefix_tokens=3))
    shares = trace(_everything(loaded, files), BY_ATTENTION[method])
    assert _sum(shares) == pytest.approx(1, abs=1e-6)
    assert 0 < shares.prefix < 1


@pytest.mark.parametrize("method", BY_ATTENTION)
@pytest.mark.parametrize(
    "states, pool", [("decoder", "mean"), ("decoder", "last"), ("vision", "mean"), ("audio", "last"), ("towers", "mean")]
)
def test_a_head_is_traced_from_the_states_that_it_reads(make_loaded, files, method, states, pool):
    loaded = make_loaded(head=Head(kind="linear", labels=("zero", "one"), states=states, pool=pool))
    images = [] if states == "audio" else [files / "a.jpg"]
    asked = read_question(loaded, QUESTION, images=images, audios=[files / "c.flac"])
    shares = trace(LogOdds(loaded, asked, find_answer(loaded, asked, None, max_new_tokens=1)), BY_ATTENTION[method])
    assert _sum(shares) == pytest.approx(1, abs=1e-6)
    if states == "vision":
        assert float(shares.cells[0].sum()) == pytest.approx(1)
    elif states == "audio":
        assert float(shares.sounds[0].sum()) == pytest.approx(1)
    elif states == "towers":
        assert float(shares.cells[0].sum()) == pytest.approx(0.5) and float(shares.sounds[0].sum()) == pytest.approx(0.5)
    else:
        assert shares.tokens.any() and shares.cells[0].any() and shares.sounds[0].any()


def test_attention_that_recording_would_change_is_refused(plain, question, monkeypatch):
    log_odds = LogOdds(plain, question, find_answer(plain, question, "7", max_new_tokens=1))
    log_odds.at_input += 1.0
    with pytest.raises(ConfigError, match="the log odds change by 1 when it is; take --method integrated"):
        trace(log_odds, BY_ATTENTION["rollout"])
    monkeypatch.setattr(rollout, "recorded", lambda part: [])
    log_odds.at_input -= 1.0
    with pytest.raises(ConfigError, match="0 of the decoder's 2 layers"):
        trace(log_odds, BY_ATTENTION["rollout"])
