import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megamm.config import AudioFeatures, ImageFeatures
from megamm.core.lengths import audio_num_tokens
from megamm.data.media.decode import image_input
from megamm.inference.explain.places import patches, spans, token_of_frame, words


def test_patches_are_source_pixels_of_a_picture_that_was_resized():
    file = io.BytesIO()
    Image.new("RGB", (120, 60)).save(file, "PNG")
    image = image_input(file.getvalue(), ImageFeatures(patch_size=4, max_patches=8))
    assert image.grid == (2, 4)
    found = patches(np.arange(8.0).reshape(2, 4), image)
    assert [one.score for one in found] == list(range(8))
    assert found[0].xyxy == (0, 0, 30, 30) and found[6].xyxy == (60, 30, 90, 60)


@given(num_frames=st.integers(1, 500))
def test_frames_go_into_the_tokens_that_the_tower_makes_of_them(num_frames):
    tokens = token_of_frame(num_frames)
    assert tokens[0] == 0 and tokens[-1] == audio_num_tokens(num_frames) - 1
    assert set(np.diff(tokens)) <= {0, 1}


def test_spans_tile_a_sound():
    found = spans(np.arange(16.0), 118, AudioFeatures())
    assert (found[0].start, found[0].stop, found[-1].stop) == (0.0, 0.08, 1.18)
    assert [one.stop for one in found[:-1]] == [one.start for one in found[1:]]
    # The last token of a chunk of 100 frames has 4.
    assert found[12].stop == 1.0 and found[12].start == pytest.approx(0.96)


@given(text=st.text(st.sampled_from("ab é🙂数字 \n.$"), min_size=1, max_size=30), seed=st.integers(0, 100))
@settings(deadline=None)
def test_words_share_out_all_of_their_tokens_and_all_letters(pieces, text, seed):
    scores = np.random.default_rng(seed).standard_normal(len(pieces.encode(text)))
    found = words(text, pieces.spans(text), scores)
    assert sum(one.score for one in found) == pytest.approx(scores.sum(), abs=1e-9)
    assert all(one.text == text[one.start : one.stop] for one in found)
    covered = {place for one in found for place in range(one.start, one.stop)}
    assert {place for place, letter in enumerate(text) if not letter.isspace()} <= covered
    assert all(first.stop <= second.start for first, second in pairwise(found))


def test_tokens_make_words(pieces):
    text = "What digit, 数字?"
    names = [text[start:stop] for start, stop in pieces.spans(text)]
    found = words(text, pieces.spans(text), np.ones(len(names)))
    assert [one.text for one in found] == ["What", "digit,", "数", "字", "?"]
    # Three bytes a Chinese character; the space before the first one is its own token.
    assert [one.score for one in found][2:4] == [4, 3]


def test_words_that_share_a_token_are_one():
    found = words("ab cd ef", [(0, 5), (5, 8)], np.array([1.0, 2.0]))
    assert [(one.text, one.start, one.stop, one.score) for one in found] == [("ab cd", 0, 5, 1.0), ("ef", 6, 8, 2.0)]
    assert words("", [], np.zeros(0)) == ()
    assert words(" ", [(0, 1)], np.array([3.0]))[0].score == 3.0
