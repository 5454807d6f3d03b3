import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import ConfigError
from megamm.tokenizers import pieces

# Characters of the corpus, so that pieces join, beside any others, so that bytes step in.
texts = st.text(st.one_of(st.sampled_from("enstrahd. 0127\n\t数字七🙂<>x|"), st.characters(codec="utf-8")), max_size=60)


@pytest.fixture(scope="module")
def processor(trained_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained_folder / "tokenizer.model"))


@given(text=texts)
def test_tokenizers_segments_as_sentencepiece(tokenizer, processor, text):
    assert tokenizer.encode(text) == processor.encode(text)


def test_tokenizers_segments_the_corpus_as_sentencepiece(tokenizer, processor, sentences):
    for text in sentences:
        for start in range(len(text)):
            assert tokenizer.encode(text[start:]) == processor.encode(text[start:])
    assert len(tokenizer.encode(sentences[0])) <= len(sentences[0]) / 1.9  # pieces were joined, the comparison is not of bytes


@given(text=texts)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(pieces.SPACE, " ")


def test_digits_stay_single(processor):
    assert processor.encode("12 + 30", out_type=str)[-1] == "0"
    digits = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    assert not [piece for piece in digits if not piece.startswith("<0x") and sum(character.isdigit() for character in piece) > 1]


def test_equal_texts_give_equal_bytes(sentences):
    assert pieces.train_pieces(sentences, 400) == pieces.train_pieces(iter(sentences), 400)


def test_a_tiny_corpus_gives_the_pieces_that_it_has():
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces.train_pieces(["aba ab"], 4000))
    assert 257 < model.get_piece_size() < 300
    assert model.decode(model.encode("aba 数")) == "aba 数"


def test_many_characters_fall_back_to_bytes_instead_of_failing():
    text = "".join(chr(0x4E00 + index) for index in range(3000)) + "the digit seven " * 50
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces.train_pieces([text], 320))
    assert model.get_piece_size() == 320
    assert len(model.encode("the")) < 3
    assert len(model.encode(chr(0x4E00 + 2999))) == 3


def test_least_text_size():
    pieces.train_pieces(["aab"], 259)
    with pytest.raises(ConfigError, match="text_size=258 leaves no room"):
        pieces.train_pieces(["aab"], 258)


@pytest.mark.parametrize("corpus", [[], ["", "  \n"]])
def test_no_text_is_an_error(corpus):
    with pytest.raises(ConfigError, match="no text"):
        pieces.train_pieces(corpus, 300)


def test_long_texts_are_not_dropped():
    text = "seven " * 20_000
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces.train_pieces([text], 300))
    assert len(model.encode("seven seven")) == 2


def test_thinning_keeps_texts_of_the_whole_corpus():
    kept = pieces._thin((f"{index:04}" for index in range(1000)), max_bytes=400)
    numbers = [int(text) for text in kept]
    assert 50 <= len(numbers) <= 100
    assert numbers == list(range(0, 1000, numbers[1]))
    assert pieces._thin(["abc", "de"], max_bytes=5) == ["abc", "de"]
    assert pieces._thin(["a" * 100], max_bytes=5) == ["a" * 100]
