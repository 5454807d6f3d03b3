"""Augmentation: the same at the same position, never another length than was planned, memory bounded by the result."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from megamm.config import AudioFeatures, Augment, ImageFeatures
from megamm.core.types import Message, Part
from megamm.data.media.augment import Changes
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.features import MediaRules
from megamm.data.media.files import read_facts
from tests.support.shards import flac, jpeg

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
SIZE = PICTURE.size
# Of every setting a value that shows.
VALUES = {
    "image_crop": 0.5,
    "image_stretch": 0.5,
    "image_shift": 0.4,
    "image_zoom": 0.4,
    "image_rotate_degrees": 8.0,
    "image_flip": True,
    "image_turns": True,
    "image_brightness": 0.4,
    "image_contrast": 0.4,
    "image_saturation": 0.4,
    "image_hue": 0.4,
    "audio_gain_db": 8.0,
    "audio_equalizer_db": 8.0,
    "audio_noise": 8.0,
    "audio_mask_frames": 8,
    "audio_mask_bands": 8,
}
EVERYTHING = Augment(**VALUES, audio_masks=3)


def changes(position=0, **values):
    made = Changes.at(Augment(**values), 7, position)
    assert made is not None
    return made


def test_nothing_asked_is_nothing_done():
    assert Changes.at(Augment(), 7, 0) is None
    assert Changes.at(Augment(audio_speeds=(0.9, 1.1)), 7, 0) is None


def test_a_position_draws_the_same_again_and_another_one_differently():
    def drawn(position: int) -> list[np.ndarray]:
        made = Changes.at(EVERYTHING, 7, position)
        assert made is not None
        picture = made.colour(made.shape(PICTURE, SIZE)[0].resize(SIZE))
        wave = made.wave(np.sin(np.arange(4000, dtype=np.float32)))
        return [np.asarray(picture), wave, made.mel(np.random.default_rng(0).random((40, 60)), blank=0.0)]

    one, again, other = drawn(5), drawn(5), drawn(6)
    assert all(np.array_equal(*pair) for pair in zip(one, again, strict=True))
    assert not any(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_one_more_setting_leaves_the_draws_of_the_others_alone():
    with_flip = changes(3, image_flip=True, image_shift=0.1, image_brightness=0.5).shape(PICTURE, SIZE)[0]
    upright = changes(3, image_shift=0.1).shape(PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), SIZE)[0]
    plain = changes(3, image_shift=0.1).shape(PICTURE, SIZE)[0]
    assert np.array_equal(with_flip, upright) or np.array_equal(with_flip, plain)


def test_a_shift_moves_pixels_and_continues_the_edge():
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (10, 100, 3))
    moved = np.asarray(changes(image_shift=0.2).shape(Image.fromarray(ramp), (100, 10))[0])[5, :, 0].astype(int)
    shift = moved[50] - 50
    assert shift != 0
    assert np.abs(moved - np.clip(np.arange(100) + shift, 0, 99)).max() <= 1


def test_a_turn_continues_the_edge_everywhere():
    white = Image.new("RGB", (90, 10), (255, 255, 255))
    for position in range(20):
        turned = changes(position, image_rotate_degrees=180.0, image_zoom=0.5, image_shift=1.0).shape(white, (90, 10))[0]
        assert turned.size == (90, 10) and np.asarray(turned).min() == 255


def test_no_turn_no_zoom_no_shift_is_the_picture_itself():
    tiny = changes(image_rotate_degrees=1e-9)
    assert np.abs(np.asarray(tiny.shape(PICTURE, SIZE)[0]).astype(int) - np.asarray(PICTURE)).max() <= 1


def test_the_map_that_comes_with_a_picture_says_where_its_pixels_went():
    """A white spot in a large black picture is found where the map puts it, whatever happened."""
    for position in range(60):
        spot = (130.0 + 7 * (position % 9), 140.0 - 5 * (position % 7))
        picture = Image.new("RGB", (260, 240))
        ImageDraw.Draw(picture).ellipse([spot[0] - 8, spot[1] - 8, spot[0] + 8, spot[1] + 8], fill=(255, 255, 255))
        made = changes(
            position,
            image_crop=0.3,
            image_stretch=0.2,
            image_flip=True,
            image_turns=True,
            image_shift=0.05,
            image_zoom=0.2,
            image_rotate_degrees=40.0,
        )
        changed, moved = made.shape(picture, (120, 100) if position % 2 else (110, 110))
        light = np.asarray(changed)[..., 0].astype(float)
        # Far from the border, where the edge is continued, light has the spot as its centre.
        x, y = moved((spot[0] + 0.5, spot[1] + 0.5))
        if 25 < x < changed.width - 25 and 25 < y < changed.height - 25:
            ys, xs = np.mgrid[: changed.height, : changed.width] + 0.5
            found = (light * xs).sum() / light.sum(), (light * ys).sum() / light.sum()
            assert found == pytest.approx((x, y), abs=0.6)
        assert moved.inverse()((x, y)) == pytest.approx((spot[0] + 0.5, spot[1] + 0.5), abs=1e-6)


def test_half_of_the_pictures_are_mirrored():
    mirrored = np.asarray(PICTURE)[:, ::-1]
    share = np.mean([np.array_equal(changes(position, image_flip=True).shape(PICTURE, SIZE)[0], mirrored) for position in range(400)])
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("num_samples", [1, 2, 1601, 16000])
def test_an_equalizer_changes_each_frequency_smoothly_and_within_its_bound(num_samples):
    wave, spread = np.zeros(num_samples, np.float32), []
    wave[num_samples // 3] = 1.0
    for position in range(20):
        changed = changes(position, audio_equalizer_db=6.0).wave(wave)
        assert changed.dtype == np.float32 and changed.shape == wave.shape
        # The spectrum of a click is 1 everywhere.
        gains_db = 20 * np.log10(np.abs(np.fft.rfft(changed.astype(np.float64))))
        assert np.abs(gains_db).max() < 6.001
        spread.append(np.ptp(gains_db))
        # From octave to octave the gain changes by twice the bound at most.
        frequencies = np.arange(1, len(gains_db))
        assert (np.abs(np.diff(gains_db[1:])) <= 12 * np.diff(np.log2(frequencies)) + 1e-3).all()
    assert num_samples < 3 or min(spread) > 0.5


@pytest.mark.parametrize(("size", "num_symmetries"), [((24, 24), 8), ((32, 24), 4)])
def test_turned_and_mirrored_pictures_are_all_symmetries_each_as_likely(size, num_symmetries):
    picture = PICTURE.crop((0, 0, *size))
    found = Counter()
    for position in range(800):
        turned, moved = changes(position, image_flip=True, image_turns=True).shape(picture, size)
        assert turned.size == size
        found[turned.tobytes()] += 1
        # A pixel of the source is where the map says, to the last digit.
        x, y = moved((3.5, 5.5))
        assert turned.getpixel((int(x), int(y))) == picture.getpixel((3, 5))
    assert len(found) == num_symmetries
    assert all(0.7 < count * num_symmetries / 800 < 1.3 for count in found.values())


def test_a_crop_is_a_part_of_the_picture_of_the_stated_area():
    areas = []
    for position in range(200):
        part = np.asarray(changes(position, image_crop=0.75, image_stretch=0.3).shape(PICTURE, SIZE)[0])
        places = [
            (y, x)
            for y in range(25 - part.shape[0])
            for x in range(33 - part.shape[1])
            if np.array_equal(np.asarray(PICTURE)[y : y + part.shape[0], x : x + part.shape[1]], part)
        ]
        assert places
        areas.append(part.shape[0] * part.shape[1] / (24 * 32))
    assert 0.2 < min(areas) < 0.4 and max(areas) > 0.9


def test_colours_keep_within_their_bounds():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    for position in range(50):
        light = np.asarray(changes(position, image_brightness=0.25).colour(grey))
        assert light.min() >= 74 and light.max() <= 126
        # Grey has no colour to turn or to fade.
        still = np.asarray(changes(position, image_hue=0.5, image_saturation=1.0).colour(grey))
        assert np.abs(still.astype(int) - 100).max() <= 1
    red = Image.new("RGB", (1, 1), (200, 0, 0))
    hues = {tuple(np.asarray(changes(position, image_hue=0.5).colour(red))[0, 0].tolist()) for position in range(100)}
    assert len(hues) > 20 and all(max(hue) >= 198 and min(hue) <= 2 for hue in hues)


def test_masks_are_as_many_and_as_wide_as_stated():
    mel = np.random.default_rng(0).uniform(1, 2, (80, 300)).astype(np.float32)
    for position in range(50):
        masked = changes(position, audio_mask_frames=20, audio_masks=3).mel(mel, blank=float(mel.min()))
        blank = (masked == mel.min()).all(axis=0)
        assert blank.sum() <= 60 and np.diff(blank.astype(int)).clip(0).sum() <= 3
        assert np.array_equal(masked[:, ~blank], mel[:, ~blank])


def test_items_side_by_side_change_places_and_everything_else_stays():
    def item(name):
        return Part("item", data={"id": name})

    line = Part("text", text="\n")
    question = Message("user", (*map(item, "abcdefgh"), line, item("i"), item("j"), line))
    answer = Message("assistant", (item("k"), item("l")))
    seen = set()
    for position in range(40):
        made = changes(position, item_shuffle=True, image_shift=0.5)
        asked, answered = made.messages([question, answer])
        names = "".join(part.data.get("id", "|") for part in asked.content)
        assert sorted(names[:8]) == list("abcdefgh") and names[8] == names[11] == "|" and sorted(names[9:11]) == ["i", "j"]
        assert {part.data["id"] for part in answered.content} == {"k", "l"} and [asked.role, answered.role] == ["user", "assistant"]
        seen.add((names, answered.content[0].data["id"]))
        again = changes(position, item_shuffle=True, image_shift=0.5)
        assert again.messages([question, answer]) == [asked, answered]
        # The media of the sample draw as they do without it.
        assert np.array_equal(made.shape(PICTURE, SIZE)[0], changes(position, image_shift=0.5).shape(PICTURE, SIZE)[0])
    assert len(seen) > 35 and {first for _, first in seen} == {"k", "l"}
    assert changes(image_shift=0.5).messages([question]) == [question]


def test_large_pictures_are_shrunk_before_they_are_turned():
    large = Image.new("RGB", (6000, 1000))
    tracemalloc.start()
    try:
        assert changes(image_rotate_degrees=180.0).shape(large, (224, 64))[0].size == (448, 128)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", list(VALUES))
def test_every_setting_changes_its_medium_and_keeps_its_length(name):
    picture, sound = jpeg(40, 30), flac(9000)
    images, audio = ImageFeatures(patch_size=4, max_patches=16), AudioFeatures(num_mel=40)
    plain = image_input(picture, images), audio_input(sound, audio)
    changed = False
    for position in range(8):
        image = image_input(picture, images, changes=changes(position, **{name: VALUES[name]}))
        heard = audio_input(sound, audio, changes=changes(position, **{name: VALUES[name]}))
        assert image.grid == plain[0].grid and image.pixels.shape == plain[0].pixels.shape and heard.mel.shape == plain[1].mel.shape
        changed |= (
            not np.array_equal(image.pixels, plain[0].pixels) if name.startswith("image") else not np.array_equal(heard.mel, plain[1].mel)
        )
    assert changed


def test_every_setting_is_tried_here():
    assert {field.name for field in dataclasses.fields(Augment)} == {*VALUES, "audio_speeds", "audio_masks", "item_shuffle"}


@given(st.integers(0, 2**40), st.integers(1, 120), st.integers(1, 120), st.sampled_from(["naflex", "fixed"]))
@settings(max_examples=25)
def test_whatever_is_drawn_takes_what_was_planned(position, width, height, kind):
    features = ImageFeatures(kind=kind, patch_size=8, max_patches=36, size=64, stride=16)
    content = jpeg(width, height)
    found = image_input(content, features, changes=Changes.at(EVERYTHING, 1, position))
    assert found.num_tokens == image_input(content, features).num_tokens and np.isfinite(found.pixels).all()


@given(st.integers(1, 40_000), st.sampled_from([8000, 11025, 16000, 22050, 44100]), st.floats(0.5, 2.0))
@settings(max_examples=25)
def test_a_sound_at_any_speed_takes_what_was_planned(num_frames, rate_hz, speed):
    content = flac(num_frames, rate_hz=rate_hz, format="WAV")
    features = AudioFeatures(num_mel=8)
    with_file = read_facts("audio", io.BytesIO(content))
    planned = MediaRules(None, features).footprint(with_file, speed)
    found = audio_input(content, features, speed=speed, changes=Changes.at(EVERYTHING, 1, num_frames))
    assert (planned.tokens, planned.frames) == (found.num_tokens, found.mel.shape[1])


def test_speed_raises_pitch_and_shortens():
    from megamm.data.media.decode import log_mel
    from tests.data.media.test_decode import wav

    def tone(hertz: float, seconds: float) -> np.ndarray:
        return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)

    found = audio_input(wav(tone(400, 1.1)), AudioFeatures(), speed=1.1).mel
    expected = log_mel(tone(440, 1.0), AudioFeatures())
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[8:16, 10:90], expected[8:16, 10:90], atol=0.05)
