"""Changed media: what they hold, that nothing moves, and that the same is drawn again."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megamm.config import AudioFeatures, ImageFeatures
from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Message, Part, Sample
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.features import MediaRules
from megamm.data.media.files import decode_picture, decode_sound
from megamm.evaluation.changes import CHANGES, changed, places_of, select_changes
from megamm.evaluation.held_out import Place
from megamm.evaluation.records import SkippedSample
from tests.support.shards import flac, jpeg

RULES = MediaRules(ImageFeatures(patch_size=4, max_patches=64), AudioFeatures(num_mel=16, max_seconds=1.0))
PARTS = (Part("image", member="0.png"), Part("audio", member="0.flac"), Part("text", text="?"))
MASK = Part("mask", member="1.png", data={"image": 0, "labels": ["x"]})


@pytest.fixture(scope="module")
def sample():
    media = {"0.png": jpeg(40, 30, format="PNG"), "1.png": b"a mask", "0.flac": flac(12_000)}
    return Sample("k", "t", (Message("user", PARTS), Message("assistant", (MASK,))), media)


def media_of(sample, change, strength, *, rules=RULES):
    place = Place("x", Path("a.tar"), 0, change=f"{change}={strength:g}")
    ((_, result),) = changed([(place, sample)], rules)
    return result if isinstance(result, SkippedSample) else result.media


def pixels(content):
    return np.asarray(decode_picture(content), dtype=float)


@pytest.mark.parametrize("change", [one for one in CHANGES if one.medium == "image"], ids=lambda one: one.name)
def test_pictures_suffer_more_at_each_strength_and_stay_where_they_are(sample, change):
    source, distances = pixels(sample.media["0.png"]), []
    for strength in change.strengths:
        media = media_of(sample, change.name, strength)
        assert media["1.png"] == b"a mask" and media["0.flac"] == sample.media["0.flac"]
        assert media == media_of(sample, change.name, strength)
        found = image_input(media["0.png"], RULES.image)
        assert found.view == image_input(sample.media["0.png"], RULES.image).view and found.grid == (7, 9)
        distances.append(np.abs(pixels(media["0.png"]) - source).mean())
    assert distances == sorted(distances) and distances[0] > 1


def test_noise_is_as_strong_as_it_says_and_another_one_for_another_sample(sample):
    grey = io.BytesIO()
    Image.new("RGB", (60, 60), (128, 128, 128)).save(grey, "PNG")
    other = Sample("another", "t", sample.messages, {**sample.media, "0.png": grey.getvalue()})
    noise = pixels(media_of(other, "image_noise", 0.1)["0.png"]) - 128
    assert noise.std() == pytest.approx(25.5, rel=0.05) and abs(noise.mean()) < 1
    weaker = pixels(media_of(other, "image_noise", 0.05)["0.png"]) - 128
    assert np.abs(2 * weaker - noise).max() <= 2
    same = Sample("k", "t", sample.messages, other.media)
    assert not np.array_equal(pixels(media_of(same, "image_noise", 0.1)["0.png"]) - 128, noise)


def test_a_blur_spares_a_picture_without_edges(sample):
    even = io.BytesIO()
    Image.new("RGB", (20, 20), (10, 200, 90)).save(even, "PNG")
    one = Sample("k", "t", sample.messages, {**sample.media, "0.png": even.getvalue()})
    assert np.array_equal(pixels(media_of(one, "image_blur", 0.04)["0.png"]), pixels(even.getvalue()))


def sound_of(media):
    return decode_sound(media["0.flac"], RULES.audio)


def test_sounds_change_as_they_say(sample):
    wave, rate_hz = sound_of(sample.media)
    noisy, same_rate = sound_of(media_of(sample, "audio_noise", 10))
    assert same_rate == rate_hz
    assert 20 * np.log10(np.std(wave) / np.std(noisy - wave)) == pytest.approx(10, abs=0.3)
    quiet, _ = sound_of(media_of(sample, "audio_gain", -20))
    np.testing.assert_allclose(quiet, wave / 10, rtol=1e-5)
    loud, _ = sound_of(media_of(sample, "audio_gain", 10))
    np.testing.assert_allclose(loud, np.clip(wave * 10**0.5, -1, 1), rtol=1e-5)
    features = [audio_input(media["0.flac"], RULES.audio) for media in (sample.media, media_of(sample, "audio_speed", 1.25))]
    assert [one.mel.shape[1] for one in features] == [75, 60]


def test_a_sound_that_becomes_too_long_is_named(sample):
    long = Sample("k", "t", sample.messages, {**sample.media, "0.flac": flac(15_000)})
    with pytest.raises(DataError, match=r"the sound lasts 1\.2 s"):
        audio_input(media_of(long, "audio_speed", 0.8)["0.flac"], RULES.audio)


def test_damage_is_named_with_the_place(sample):
    damaged = Sample("k", "t", sample.messages, {**sample.media, "0.png": b"nothing"})
    found = media_of(damaged, "image_blur", 0.01)
    assert isinstance(found, SkippedSample) and (found.key, found.change) == ("k", "image_blur=0.01")
    deaf = media_of(sample, "audio_gain", 10, rules=MediaRules(RULES.image, None))
    assert isinstance(deaf, SkippedSample) and "no tower for it" in deaf.reason


def test_wav_keeps_every_bit_of_a_float(sample):
    content = media_of(sample, "audio_speed", 0.9)["0.flac"]
    values, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate_hz == 14_400 and np.array_equal(values, sound_of(sample.media)[0])


def test_names_choose_kinds_and_unknown_ones_are_refused():
    assert [one.name for one in select_changes(["noise"])] == ["image_noise", "audio_noise"]
    assert [one.name for one in select_changes(["gain", "image_blur", "blur"])] == ["image_blur", "audio_gain"]
    assert select_changes([]) == ()
    with pytest.raises(ConfigError, match=r"change 'nois' is not known; the changes are image_noise, .*did you mean 'noise'"):
        select_changes(["nois"])


def test_places_carry_the_change():
    (blur,) = select_changes(["blur"])
    places = places_of(blur, [Place("x", Path("a.tar"), 3), Place("x", Path("a.tar"), 5)])
    found = [(place.change, place.number) for place in places[:3]]
    assert found == [
        ("image_blur=0.01", 3),
        ("image_blur=0.01", 5),
        ("image_blur=0.02", 3),
    ]
