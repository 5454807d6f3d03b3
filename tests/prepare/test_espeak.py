import sys

import numpy as np
import pytest

from megamm.core.errors import ConfigError, DataError
from megamm.prepare import espeak
from megamm.prepare.espeak import Utterance, render

installed = pytest.mark.skipif(espeak.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")


def utterance(**changes):
    return Utterance(**{"text": "seven", "accent": "en-us", "variant": "m1", "rate": 160, "pitch": 50, **changes})


@installed
def test_a_list_of_utterances_always_sounds_the_same():
    utterances = [utterance(variant=variant) for variant in ("m1", "croak", "klatt", "m1")]
    (rate_hz, first), (_, second) = render(utterances), render(utterances)
    assert rate_hz == 22050
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(sound.dtype == np.int16 and 0.3 < len(sound) / rate_hz < 1 for sound in first)


@installed
def test_every_setting_is_heard():
    plain, slow, high, other_voice, other_word = render(
        [utterance(), utterance(rate=100), utterance(pitch=90), utterance(variant="f2"), utterance(text="two")]
    )[1]
    assert len(slow) > 1.2 * len(plain)
    for sound in (high, other_voice, other_word):
        assert len(sound) != len(plain) or np.abs(sound.astype(int) - plain).max() > 3000


@installed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "nobody"}, "no voice variant 'nobody'"),
        ({"accent": "en-nowhere"}, r"refuses voice 'en-nowhere\+m1' with status 2"),
    ],
)
def test_unknown_voices_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        render([utterance(**changes)])
    assert "\n" not in str(raised.value)


@installed
def test_silence_is_an_error():
    with pytest.raises(DataError, match=r"no sound for ' ' by en-us\+m1"):
        render([utterance(text=" ")])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ConfigError, match=r"pip install 'megamm\[quickstart\]'"):
        render([utterance()])
