import json
import pickle

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from megamm.config import Tokenizer
from megamm.core.errors import ConfigError
from megamm.tokenizers import text
from megamm.tokenizers.vocabulary import Vocabulary


def byte_level(sentences, folder):
    """The kind that GPT-2, Qwen and Llama 3 use."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens(["<|im_start|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def metaspace(sentences, folder, prepend_scheme):
    """The kind that Llama 2 and Mistral use."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def adopted(sentences, tmp_path_factory):
    base = tmp_path_factory.mktemp("adopt")
    original = byte_level(sentences, base / "original")
    ours = text.adopt(Tokenizer(adopt=str(base / "original"), location_bins=7), base / "ours")
    return original, ours, base / "ours"


def test_ids_stay_and_blocks_follow(adopted, sentences):
    original, ours, folder = adopted
    for sentence in sentences:
        assert ours.encode(sentence) == original.encode(sentence, add_special_tokens=False).ids
        assert ours.decode(ours.encode(sentence)) == sentence
    assert ours.vocabulary == Vocabulary(text=original.get_vocab_size(), location=7)
    assert text.TextTokenizer.load(folder).fingerprint == ours.fingerprint


def test_its_ordinary_added_tokens_work_and_its_special_ones_are_text(adopted):
    original, ours, _ = adopted
    assert ours.encode("<think>") == [original.token_to_id("<think>")]
    assert ours.encode("</think>") == [original.token_to_id("</think>")]
    ids = ours.encode("<|im_start|><|end|>")
    assert len(ids) > 2
    assert ours.decode(ids) == "<|im_start|><|end|>"


def test_a_copy_in_another_process_reads_them_alike(adopted):
    _, ours, _ = adopted
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode("<|im_start|><|end|>") == ours.encode("<|im_start|><|end|>")
    assert copy.fingerprint == ours.fingerprint


def test_a_special_token_of_our_spelling_keeps_its_id_under_another(adopted):
    from transformers import AutoTokenizer

    original, ours, folder = adopted
    hugging_face = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert hugging_face("<|end|>").input_ids == [ours.vocabulary.control_id("end")]
    assert hugging_face.convert_ids_to_tokens(original.token_to_id("<|end|>")) == "<|adopted_end|>"
    assert len(hugging_face) == ours.vocabulary.size


def test_metaspace_of_the_first_word_only_is_adopted_as_it_works_inside_a_chat(sentences, tmp_path):
    original = metaspace(sentences, tmp_path / "original", "first")
    original.add_special_tokens(["<|chat|>"])
    ours = text.adopt(Tokenizer(adopt=str(tmp_path / "original")), tmp_path / "ours")
    for sentence in sentences:
        assert ours.encode(sentence) == original.encode("<|chat|>" + sentence).ids[1:]


def test_metaspace_of_every_text_is_adopted_unchanged(sentences, tmp_path):
    original = metaspace(sentences, tmp_path / "original", "always")
    ours = text.adopt(Tokenizer(adopt=str(tmp_path / "original")), tmp_path / "ours")
    assert ours.encode("seven") == original.encode("seven").ids


def test_holes_in_the_ids_are_refused(sentences, tmp_path):
    byte_level(sentences, tmp_path / "original")
    path = tmp_path / "original/tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["~~"] = 400
    value["added_tokens"] = []
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="holes in its ids"):
        text.adopt(Tokenizer(adopt=str(tmp_path / "original")), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        ("{", "is not a tokenizer file"),
        ('{"model": {"vocab": [], "type": "Unigram"}, "added_tokens": []}', "Unigram"),
    ],
)
def test_unusable_folders_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        text.adopt(Tokenizer(adopt=str(tmp_path)), tmp_path / "ours")
