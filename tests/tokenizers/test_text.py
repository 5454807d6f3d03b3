import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Tokenizer
from megamm.core.errors import ConfigError, DataError
from megamm.tokenizers import text
from megamm.tokenizers.vocabulary import CONTROL_NAMES

HOSTILE = ["<|end|>", "a<|bos|>b", "<|loc_3|><|image|>", "<|audio_0_1|>", "<unk>", "<0x41>", "<|reserved_63|>", "</s>"]


@pytest.fixture(scope="module")
def hugging_face(trained_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained_folder, local_files_only=True)


@pytest.mark.parametrize("string", HOSTILE)
def test_control_strings_in_text_are_plain_text(tokenizer, string):
    ids = tokenizer.encode(string)
    assert max(ids) < tokenizer.vocabulary.text
    assert 0 not in ids  # <unk>
    assert tokenizer.decode(ids) == string


@given(string=st.text(st.characters(codec="utf-8")))
def test_text_never_leaves_the_text_block(tokenizer, string):
    assert all(0 < token_id < tokenizer.vocabulary.text for token_id in tokenizer.encode(string))


def test_words_in_another_encoding_are_named(tokenizer):
    with pytest.raises(DataError, match="is no whole Unicode; write it as UTF-8"):
        tokenizer.encode(b"a\xffb".decode(errors="surrogateescape"))


def test_decode_skips_other_blocks(tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = [vocabulary.control_id("bos"), *tokenizer.encode("七 7"), vocabulary.location_id(3), -100, *tokenizer.encode("🙂"), 10**9]
    assert tokenizer.decode(ids) == "七 7🙂"


def test_auto_tokenizer_has_our_ids(hugging_face, tokenizer):
    vocabulary = tokenizer.vocabulary
    assert len(hugging_face) == vocabulary.size
    for token_id in range(vocabulary.text, vocabulary.size):
        assert hugging_face(vocabulary.token_string(token_id)).input_ids == [token_id]
    for name in CONTROL_NAMES:
        assert getattr(hugging_face, f"{name}_token_id") == vocabulary.control_id(name)


def test_auto_tokenizer_encodes_text_as_ours(hugging_face, tokenizer, sentences):
    for sentence in sentences:
        assert hugging_face(sentence).input_ids == tokenizer.encode(sentence)
        assert hugging_face.decode(tokenizer.encode(sentence)) == sentence


def test_skipping_special_tokens_keeps_codes(hugging_face, tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = [vocabulary.control_id("bos"), vocabulary.location_id(3), vocabulary.audio_id(1, 2), vocabulary.control_id("end")]
    assert hugging_face.decode(ids, skip_special_tokens=True) == "<|loc_3|><|audio_1_2|>"


def test_auto_tokenizer_survives_saving(hugging_face, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    hugging_face.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again.get_vocab() == hugging_face.get_vocab()
    assert (again.image_token_id, again.chat_template) == (hugging_face.image_token_id, hugging_face.chat_template)


def test_writing_twice_is_fine_and_another_tokenizer_is_refused(trained_folder, sentences, tmp_path):
    folder = tmp_path / "tokenizer"
    config = Tokenizer(text_size=300, location_bins=0)
    first = text.train(sentences, config, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert text.train(sentences, config, folder).fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match=r"already holds another tokenizer \(tokenizer.json differs\)"):
        text.train(sentences, Tokenizer(text_size=300, location_bins=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_writing_is_completed(sentences, tmp_path):
    config = Tokenizer(text_size=300, location_bins=0)
    text.train(sentences, config, tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks vocabulary\.json"):
        text.TextTokenizer.load(tmp_path)
    text.train(sentences, config, tmp_path)
    assert text.TextTokenizer.load(tmp_path).decode([65 + 1]) == "A"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocabulary.json", "chat_template.jinja"])
def test_fingerprint_covers_every_file(trained_folder, tmp_path, name):
    original = text.TextTokenizer.load(trained_folder).fingerprint
    shutil.copytree(trained_folder, tmp_path, dirs_exist_ok=True)
    assert text.TextTokenizer.load(tmp_path).fingerprint == original
    path = tmp_path / name
    match name:
        case "tokenizer.json":
            value = json.loads(path.read_text())
            value["model"]["merges"].pop()
            path.write_text(json.dumps(value))
        case "vocabulary.json":
            vocabulary = text.TextTokenizer.load(tmp_path).vocabulary
            path.write_text(json.dumps(type(vocabulary)(text=vocabulary.text, location=19).to_json()))
        case _:
            path.write_text(path.read_text() + " ")
    assert text.TextTokenizer.load(tmp_path).fingerprint != original


def test_damaged_folders_are_named(trained_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"lacks tokenizer\.json"):
        text.TextTokenizer.load(tmp_path)
    shutil.copytree(trained_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocabulary.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged JSON"):
        text.TextTokenizer.load(tmp_path)
