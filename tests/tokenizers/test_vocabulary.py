import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Tokenizer
from megamm.core.errors import ConfigError, DataError
from megamm.tokenizers.vocabulary import CONTROL_NAMES, NUM_CONTROL, Vocabulary

counts = st.integers(0, 12)
vocabularies = st.builds(
    Vocabulary,
    text=st.integers(1, 300),
    location=counts,
    image=counts,
    audio_levels=counts,
    audio_codes=counts,
    item_levels=counts,
    item_codes=counts,
    spare=counts,
)


@given(vocabularies)
def test_blocks_cover_every_id_once_in_order(vocabulary):
    names = [block.name for block in vocabulary.blocks]
    assert names == ["text", "control", "location", "image", "audio", "item", "spare"]
    end = 0
    for block in vocabulary.blocks:
        assert block.start == end
        end += block.size
    assert end == vocabulary.size
    assert vocabulary.size % 128 == 0
    assert 0 <= vocabulary.block("spare").size - vocabulary.spare < 128


@given(vocabularies)
def test_id_and_block_offset_are_a_bijection(vocabulary):
    seen = {}
    for token_id in range(vocabulary.size):
        name, offset = vocabulary.describe(token_id)
        assert vocabulary.block(name).start + offset == token_id
        assert 0 <= offset < vocabulary.block(name).size
        seen[name, offset] = token_id
    assert len(seen) == vocabulary.size


@given(vocabularies)
def test_codes_are_where_describe_finds_them(vocabulary):
    for index in range(vocabulary.location):
        assert vocabulary.describe(vocabulary.location_id(index)) == ("location", index)
    for code in range(vocabulary.image):
        assert vocabulary.describe(vocabulary.image_id(code)) == ("image", code)
    for kind, levels, codes in (
        ("audio", vocabulary.audio_levels, vocabulary.audio_codes),
        ("item", vocabulary.item_levels, vocabulary.item_codes),
    ):
        ids = [getattr(vocabulary, f"{kind}_id")(level, code) for level in range(levels) for code in range(codes)]
        assert ids == list(range(vocabulary.block(kind).start, vocabulary.block(kind).start + levels * codes))


@given(vocabularies)
def test_strings_are_unique(vocabulary):
    ids = range(vocabulary.text, vocabulary.size)
    assert len({vocabulary.token_string(token_id) for token_id in ids}) == len(ids)


@given(vocabularies)
def test_json_round_trip(vocabulary):
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_layout_of_the_documented_example():
    vocabulary = Vocabulary.from_config(Tokenizer(audio_levels=2, audio_codes=8, spare=5), text_size=512)
    assert vocabulary.blocks[:3] == (("text", 0, 512), ("control", 512, 64), ("location", 576, 1000))
    assert vocabulary.control_id("pad") == 512
    assert vocabulary.audio_id(1, 3) == 1576 + 8 + 3
    assert vocabulary.size == 1664  # 1592 used and 5 spare, up to the next multiple of 128
    spellings = [vocabulary.token_string(token_id) for token_id in (513, 512 + NUM_CONTROL - 1, 576, 1587)]
    assert spellings == ["<|bos|>", "<|reserved_63|>", "<|loc_0|>", "<|audio_1_3|>"]


def test_control_tokens_keep_their_ids():
    vocabulary = Vocabulary(text=1)
    assert [vocabulary.control_id(name) for name in CONTROL_NAMES] == list(range(1, 18))


@pytest.mark.parametrize("call", [("location_id", 1000), ("location_id", -1), ("image_id", 0), ("audio_id", 2, 0), ("audio_id", 0, 8)])
def test_codes_outside_their_block_are_refused(call):
    vocabulary = Vocabulary(text=300, location=1000, audio_levels=2, audio_codes=8)
    name, *arguments = call
    with pytest.raises(DataError, match=r"is not in \[0, "):
        getattr(vocabulary, name)(*arguments)


def test_errors_name_the_value():
    vocabulary = Vocabulary(text=300)
    with pytest.raises(DataError, match="token id 384 "):
        vocabulary.describe(384)
    with pytest.raises(DataError, match="token id 3 is a text piece"):
        vocabulary.token_string(3)
    with pytest.raises(ConfigError, match="'tool'"):
        vocabulary.control_id("tool")
    with pytest.raises(ConfigError, match="'video'"):
        vocabulary.block("video")
    with pytest.raises(ConfigError, match="image=-1"):
        Vocabulary(text=1, image=-1)
    with pytest.raises(ConfigError, match="text=0"):
        Vocabulary(text=0)


def test_a_file_whose_layout_contradicts_its_sizes_is_refused():
    value = Vocabulary(text=300).to_json()
    with pytest.raises(ConfigError, match="size=400"):
        Vocabulary.from_json({**value, "size": 400})
    with pytest.raises(ConfigError, match="without usable sizes"):
        Vocabulary.from_json({"sizes": {"words": 3}})
