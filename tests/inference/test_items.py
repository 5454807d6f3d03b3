from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Message, Part
from megamm.inference import make_prompt, ranking
from megamm.inference.constrained import OnlyItems, answer_items, beam_rank
from megamm.inference.item_trie import ItemTrie
from megamm.inference.prompt import left_padded
from megamm.inference.ranking import item_log_probabilities, rank_items
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable
from megamm.tokenizers.vocabulary import Vocabulary
from tests.support.shards import jpeg
from tests.support.tiny_run import SENTENCES, TOKENIZER, random_model

LEVELS, CODES, ITEMS = 3, 4, 23


def make_table(keys, num_levels, num_codes):
    codes = np.array([[key // num_codes**level % num_codes for level in range(num_levels)] for key in keys], dtype=np.int32)
    ids = tuple(f"item{row:03}" for row in range(len(codes)))
    return ItemTable(ids, ("",) * len(ids), codes, num_codes)


@st.composite
def tries(draw):
    num_levels, num_codes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    keys = draw(st.lists(st.integers(0, num_codes**num_levels - 1), min_size=1, max_size=25, unique=True))
    table = make_table(keys, num_levels, num_codes)
    return ItemTrie(table, Vocabulary(text=9, item_levels=num_levels, item_codes=num_codes)), table


def paths(trie, without, beginning=()):
    """All token sequences that the trie lets through."""
    node = trie.walk(beginning)
    if len(beginning) == trie.num_levels:
        return [beginning]
    return [path for token in trie.next_tokens(node, without).tolist() for path in paths(trie, without, (*beginning, token))]


@given(one=tries(), data=st.data())
def test_a_trie_lets_through_all_items_but_those_left_out_and_nothing_else(one, data):
    trie, table = one
    vocabulary = Vocabulary(text=9, item_levels=table.num_levels, item_codes=table.num_codes)
    left_out = data.draw(st.sets(st.sampled_from(table.ids)))
    expected = {tuple(table.token_ids(item, vocabulary)): item for item in table.ids if item not in left_out}
    found = paths(trie, trie.places_of(sorted(left_out)))
    assert sorted(found) == sorted(expected)
    for path in found:
        node = trie.walk(path)
        assert node.end == node.start + 1
        assert trie.item_at(node.start) == expected[path]
    assert trie.walk((*next(iter(paths(trie, np.zeros(0, dtype=np.int64)))), 0)) is None
    assert trie.walk((3,)) is None


@given(one=tries(), data=st.data())
def test_an_answer_under_the_filter_is_different_existing_items(one, data):
    trie, table = one
    vocabulary = Vocabulary(text=9, item_levels=table.num_levels, item_codes=table.num_codes)
    left_out = data.draw(st.sets(st.sampled_from(table.ids)))
    num_items = data.draw(st.integers(1, 6))
    min_items = data.draw(st.integers(0, num_items))
    end = vocabulary.control_id("end")
    only = OnlyItems(
        trie,
        num_prompt_tokens=2,
        end_id=end,
        num_items=num_items,
        min_items=min_items,
        excluded=[np.zeros(0, dtype=np.int64), trie.places_of(sorted(left_out))],
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.zeros((2, 2), dtype=torch.long)
    for _ in range(num_items * trie.num_levels + 2):
        scores = torch.randn(2, vocabulary.size, generator=generator)
        left = only(ids, scores)
        assert torch.equal(left[left.isfinite()], scores[left.isfinite()])
        ids = torch.cat([ids, left.argmax(1, keepdim=True)], dim=1)
    for written, without in zip(ids[:, 2:].tolist(), (set(), left_out), strict=True):
        length = written.index(end)
        assert set(written[length:]) == {end}
        items = [table.item_of(written[start : start + trie.num_levels], vocabulary) for start in range(0, length, trie.num_levels)]
        assert len(items) == len(set(items))
        assert not set(items) & without
        assert min(min_items, len(table) - len(without)) <= len(items) <= num_items


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    keys = np.random.default_rng(3).permutation(CODES**LEVELS)[:ITEMS].tolist()
    config = replace(TOKENIZER, item_levels=LEVELS, item_codes=CODES)
    return random_model(folder, pieces=text.train(SENTENCES * 4, config, folder / "items", items=make_table(keys, LEVELS, CODES)))


@pytest.fixture(scope="module")
def trie(loaded):
    return ItemTrie.of(loaded)


@pytest.fixture(scope="module")
def prompts(loaded):
    questions = [
        (Part("text", text="What is next?"),),
        (Part("image", member="0.png"), Part("text", text="1")),
        (Part("text", text="say"),),
    ]
    return [make_prompt(loaded, [Message("user", parts)], {"0.png": jpeg(40, 30, format="PNG")}) for parts in questions]


@pytest.fixture(scope="module")
def exact(loaded, prompts):
    """Log probability of every item after every prompt: one whole forward each."""
    items = loaded.tokenizer.items
    found = np.zeros((len(prompts), len(items)))
    for row, prompt in enumerate(prompts):
        for column, item in enumerate(items.ids):
            ids = items.token_ids(item, loaded.tokenizer.vocabulary)
            inputs = left_padded([replace(prompt, input_ids=np.concatenate([prompt.input_ids, ids]))], 0, loaded.device)
            with torch.no_grad():
                log_probabilities = loaded.model(**inputs).logits[0, -LEVELS - 1 : -1].double().log_softmax(-1)
            found[row, column] = log_probabilities[range(LEVELS), ids].sum().item()
    return found


def is_order_of(exact, rows):
    """Whether all items stand in descending order of their scores, as far as float32 tells them apart."""
    return sorted(rows) == list(range(len(exact))) and bool((np.diff(exact[rows]) < 2e-3).all())


@pytest.mark.parametrize("elements", [1 << 25, 3000, 1])
def test_the_ranking_is_that_of_every_item_alone(loaded, trie, prompts, exact, monkeypatch, elements):
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", elements)
    found = item_log_probabilities(loaded, trie, prompts)
    assert np.allclose(found.numpy(), exact, rtol=1e-4, atol=1e-3)
    assert (exact.max(1) - exact.min(1) > 1).all()
    for row, ranked in enumerate(rank_items(loaded, trie, prompts)):
        assert is_order_of(exact[row], [loaded.tokenizer.items.row_of(item.id) for item in ranked])
        assert ranked[0].log_probability == pytest.approx(exact[row].max(), rel=1e-4, abs=1e-3)


def test_known_items_can_be_left_out(loaded, trie, prompts):
    full = [[item.id for item in ranked] for ranked in rank_items(loaded, trie, prompts)]
    excluded = [full[0][:2], [], full[2][1:]]
    ranked = [[item.id for item in ranked] for ranked in rank_items(loaded, trie, prompts, excluded=excluded, max_items=5)]
    assert ranked == [full[0][2:7], full[1][:5], full[2][:1]]
    beams = beam_rank(loaded, trie, prompts, num_beams=2 * ITEMS, excluded=excluded)
    assert [[item.id for item in found][:5] for found in beams] == ranked
    with pytest.raises(DataError, match="item 'z' is not among"):
        rank_items(loaded, trie, prompts[:1], excluded=[["z"]])


def test_as_many_beams_as_items_rank_exactly(loaded, trie, prompts, exact):
    for row, found in enumerate(beam_rank(loaded, trie, prompts, num_beams=ITEMS)):
        assert is_order_of(exact[row], [loaded.tokenizer.items.row_of(item.id) for item in found])
        scores = [item.log_probability for item in found]
        assert np.allclose(scores, np.sort(exact[row])[::-1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_fewer_beams_find_items_with_their_own_scores(loaded, trie, prompts, exact, num_beams):
    for row, found in enumerate(beam_rank(loaded, trie, prompts, num_beams=num_beams)):
        assert 1 <= len(found) <= num_beams
        scores = [item.log_probability for item in found]
        assert scores == sorted(scores, reverse=True)
        rows = [loaded.tokenizer.items.row_of(item.id) for item in found]
        assert np.allclose(scores, exact[row, rows], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_several_items_come_in_one_answer_without_repeats(loaded, trie, prompts, num_beams):
    excluded = [["item001"], [], ["item000", "item002"]]
    answers = answer_items(loaded, trie, prompts, num_items=4, min_items=4, num_beams=num_beams, excluded=excluded)
    assert [len(set(items)) for items in answers] == [4, 4, 4]
    assert all(
        item in loaded.tokenizer.items and item not in without for items, without in zip(answers, excluded, strict=True) for item in items
    )
    if num_beams == 1:
        (everything,) = answer_items(loaded, trie, prompts[:1], num_items=ITEMS + 2, min_items=ITEMS + 1)
        assert sorted(everything) == list(loaded.tokenizer.items.ids)


def test_a_greedy_answer_takes_the_likeliest_token_that_goes_on(loaded, trie, prompts):
    (answer,) = answer_items(loaded, trie, prompts[:1], num_items=2, min_items=2)
    vocabulary, items = loaded.tokenizer.vocabulary, loaded.tokenizer.items
    written = []
    for left in (set(items.ids), set(items.ids) - {answer[0]}):
        rows = [items.token_ids(item, vocabulary) for item in left]
        for level in range(LEVELS):
            ids = np.concatenate([prompts[0].input_ids, written]).astype(np.int32)
            with torch.no_grad():
                logits = loaded.model(**left_padded([replace(prompts[0], input_ids=ids)], 0, loaded.device)).logits[0, -1]
            begun = written[len(written) - level :]
            allowed = sorted({row[level] for row in rows if row[:level] == begun})
            written.append(allowed[int(logits[allowed].argmax())])
    assert written == [token for item in answer for token in items.token_ids(item, vocabulary)]


def test_what_cannot_be_ranked_is_refused_by_name(loaded, trie, prompts):
    for bad in ({"num_items": 0}, {"num_items": 2, "min_items": 3}, {"num_items": 1, "num_beams": 0}):
        with pytest.raises(ConfigError, match="give no answer"):
            answer_items(loaded, trie, prompts, **bad)
    with pytest.raises(ConfigError, match="num_beams=0 finds nothing"):
        beam_rank(loaded, trie, prompts, num_beams=0)
    for ask in (rank_items, lambda *words, excluded: beam_rank(*words, num_beams=1, excluded=excluded)):
        with pytest.raises(ConfigError, match="1 lists of excluded items for 3 prompts"):
            ask(loaded, trie, prompts, excluded=[[]])
    assert beam_rank(loaded, trie, [], num_beams=2) == rank_items(loaded, trie, []) == []
    with pytest.raises(ConfigError, match=r"exceed the decoder's \d+ positions"):
        answer_items(loaded, trie, prompts, num_items=loaded.config.text_config.max_position_embeddings)
    long = replace(prompts[0], input_ids=np.zeros(loaded.config.text_config.max_position_embeddings - 1, dtype=np.int32))
    with pytest.raises(ConfigError, match=r"exceed the decoder's \d+ positions; show a shorter history"):
        rank_items(loaded, trie, [long])


def test_a_model_without_items_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"knows no items; set tokenizer\.item_levels"):
        ItemTrie.of(random_model(tmp_path))


def test_decoders_with_windows_are_refused(loaded, trie, prompts):
    config = loaded.config.text_config
    kinds = config.layer_types
    config.layer_types = ["sliding_attention", *kinds[1:]]
    try:
        with pytest.raises(ConfigError, match="rank with beams instead"):
            rank_items(loaded, trie, prompts)
    finally:
        config.layer_types = kinds
