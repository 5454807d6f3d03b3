import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.prepare.chunks import chunks

TEXTS = st.text(st.sampled_from("ab .!?\n\r。！e\u0301\u200d👩\U0001f3fd—”") | st.characters(codec="utf-8"), max_size=200)


def cut(text, max_characters):
    return [text[begin:end] for begin, end in chunks(text, max_characters)]


@given(TEXTS, st.integers(1, 30))
def test_nothing_is_lost_repeated_or_too_long(text, max_characters):
    pieces = cut(text, max_characters)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_characters for piece in pieces)


@given(TEXTS, st.integers(1, 30))
def test_chunks_are_at_least_half_full_or_the_last(text, max_characters):
    pieces = cut(text, max_characters)
    assert all(len(piece) > max_characters / 2 - 32 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "max_characters", "expected"),
    [
        ("short", 10, ["short"]),
        ("one\n\ntwo\nthree four", 12, ["one\n\ntwo\n", "three four"]),
        ("aaaa bb\n\ncc d. e f", 14, ["aaaa bb\n\n", "cc d. e f"]),
        ("aaaa bb\ncc d. e f", 12, ["aaaa bb\n", "cc d. e f"]),
        ("First it is. Then it was not", 20, ["First it is. ", "Then it was not"]),
        ("He said “no.” Then left", 18, ["He said “no.” ", "Then left"]),
        ("月落乌啼霜满天。江枫渔火对愁眠。", 12, ["月落乌啼霜满天。", "江枫渔火对愁眠。"]),
        ("price is 3.14159 and more", 12, ["price is ", "3.14159 and ", "more"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("aaa" + "e\u0301" * 3, 4, ["aaa", "e\u0301e\u0301", "e\u0301"]),
        ("ab👩\u200d💻c", 4, ["ab", "👩\u200d💻c"]),
        ("abc\r\nde", 4, ["abc", "\r\nde"]),
    ],
)
def test_cuts_stand_where_a_reader_pauses(text, max_characters, expected):
    assert cut(text, max_characters) == expected


def test_accents_without_end_are_cut_all_the_same():
    text = "a" + "\u0301" * 200
    assert all(map(unicodedata.combining, text[1:]))
    assert [len(piece) for piece in cut(text, 100)] == [100, 100, 1]
