"""Limits hold before anything is allocated: every bomb is refused with its reason, and none costs memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import AudioFeatures, Data, ImageFeatures, Limits, SampleMapping
from megamm.core.types import MediaFacts
from megamm.data.ledger import BadSample
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.features import MediaRules
from megamm.data.media.files import MediaError, check_sound, decode_sound
from megamm.data.samples.lengths import plan_lengths
from megamm.data.samples.mapping import OWN_FORM, SampleForm
from megamm.data.samples.texts import read_json_object
from megamm.data.shards.index import build_index, write_index
from tests.data.conftest import MODEL
from tests.support import bombs
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

_MEASURE = """
import io, json, sys
from megamm.config import AudioFeatures, ImageFeatures
from megamm.core.errors import DataError
from megamm.data.media.decode import audio_input, image_input
from megamm.data.samples.mapping import OWN_FORM
from megamm.data.media.files import read_facts
from tests.support import bombs
from tests.support.shards import flac, jpeg

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def measure(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    try:
        call()
        reason = ""
    except DataError as error:
        reason = str(error)
    return status("VmHWM") - before, reason

def picture(content):
    read_facts("image", io.BytesIO(content))
    image_input(content, ImageFeatures())

def sound(content):
    read_facts("audio", io.BytesIO(content))
    audio_input(content, AudioFeatures())

pictures, sounds, documents = bombs.pictures(), bombs.sounds(), bombs.documents()
texts, channels = bombs.png_texts(), bombs.wav(1000, 16000, 1000)
for format in ("JPEG", "PNG", "WEBP"):
    picture(jpeg(300, 200, format=format))
sound(flac(16000))
found = {name: measure(lambda: picture(content)) for name, content in pictures.items()}
found |= {name: measure(lambda: sound(content)) for name, content in sounds.items()}
found |= {name: measure(lambda: OWN_FORM.sample("k", {"json": one}, ["json"], shard="s")) for name, one in documents.items()}
found |= {"texts": measure(lambda: picture(texts)), "channels": measure(lambda: sound(channels))}
print(json.dumps(found))
"""


def test_no_bomb_costs_memory():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    taken = {"texts", "channels"}
    assert {name for name, (_, reason) in found.items() if not reason} == taken
    for name, (kib, reason) in found.items():
        assert kib < 24 << 10, f"{name} took {kib} KiB: {reason}"


def test_reasons_name_the_limit_and_the_value():
    with pytest.raises(MediaError, match=r"9000 x 9000 pixels, data\.limits\.pixels is 64000000"):
        image_input(bombs.png(9000, 9000), ImageFeatures())
    image_input(bombs.png(100, 100), ImageFeatures(), limits=Limits(pixels=10_000))
    with pytest.raises(MediaError, match=r"100 x 101 pixels, data\.limits\.pixels is 10000"):
        image_input(bombs.png(100, 101), ImageFeatures(), limits=Limits(pixels=10_000))
    with pytest.raises(MediaError, match=r"1800\.0 s, model\.audio_features\.max_seconds is 30"):
        audio_input(bombs.flac_silence(1800), AudioFeatures())
    with pytest.raises(MediaError, match=r"rate of 655350 Hz.*data\.limits\.rate_hz \(384000\)"):
        audio_input(bombs.flac_states(1 << 35, 655_350), AudioFeatures())
    reasons = {name: _reason(content) for name, content in bombs.documents().items()}
    assert "104857768 bytes of JSON, data.limits.text_bytes is 4194304" in reasons["large"]
    assert "1000003 objects and lists in JSON, data.limits.values is 100000" in reasons["lists"]
    assert "20000 messages, data.limits.messages is 4096" in reasons["messages"]
    assert "50001 parts, data.limits.parts is 16384" in reasons["parts"]
    assert "recursion" in reasons["deep"] and "surrogate" in reasons["surrogate"] and "not JSON" in reasons["open"]


def _reason(content: bytes) -> str:
    with pytest.raises(BadSample) as error:
        OWN_FORM.sample("k", {"json": content}, ["json"], shard="s.tar")
    assert str(error.value).startswith("s.tar k: ")
    return str(error.value)


def test_brackets_in_texts_are_no_values():
    code = chat([{"type": "text", "text": '{[\\"' * 60_000}], "{}")
    assert OWN_FORM.sample("k", as_files(code), ["json"], shard="s").messages[0].content[0].text == '{[\\"' * 60_000


_STRINGS = st.text(st.sampled_from('{}[]"\\,ax'), max_size=8)
_VALUES = st.recursive(_STRINGS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_STRINGS, inner, max_size=4))


@given(st.dictionaries(_STRINGS, _VALUES, max_size=4))
def test_values_are_counted_as_they_are_built(document):
    def count(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return isinstance(value, (dict, list)) + sum(map(count, inner))

    content, num_values = json.dumps(document).encode(), count(document)
    assert read_json_object(content, Limits(values=num_values), "here") == document
    if num_values > 1:
        with pytest.raises(BadSample, match=f"{num_values} objects and lists in JSON, data.limits.values is {num_values - 1}"):
            read_json_object(content, Limits(values=num_values - 1), "here")


def test_samples_beyond_a_limit_are_planned_as_skipped_and_cost_no_other(tmp_path, tokenizer):
    question = [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "what?"}]
    tar = write_tar(
        tmp_path / "x.tar",
        {
            "fine": as_files(chat(question, "x"), _0_jpg=jpeg(20, 20)),
            "members": as_files(text_document("x"), **{f"_{number}_jpg": jpeg(4, 4) for number in range(9)}),
            "bytes": as_files(text_document("x"), _0_bin=bytes(20_000)),
            "text": as_files(text_document("x" * 3000)),
            "pixels": as_files(chat(question, "x"), _0_jpg=jpeg(50, 30)),
        },
    )
    write_index(tar)
    limits = Limits(pixels=1000, sample_bytes=16_384, text_bytes=2000, members=8)
    lengths = plan_lengths(tar, tokenizer, MediaRules(MODEL.image_features, None, limits), form=SampleForm(limits=limits))
    assert set(lengths.problems) == {1, 2, 3, 4} and lengths.tokens[0] > 0
    for number, name in enumerate(("members", "sample_bytes", "text_bytes", "pixels"), 1):
        assert f"data.limits.{name} is" in lengths.problems[number]
    assert not plan_lengths(tar, tokenizer, MediaRules(MODEL.image_features, None)).problems


def test_members_that_nothing_names_are_not_held_against_a_sample(tmp_path, tokenizer):
    tar = write_tar(tmp_path / "x.tar", {"a": {"jpg": b"rotten", "txt": b"plain words", "bin": bytes(5000)}})
    write_index(tar)
    form = SampleForm(SampleMapping(task="text", answer="txt"), limits=Limits(text_bytes=100))
    assert "jpg" in build_index(tar).problems[0]
    assert not plan_lengths(tar, tokenizer, MediaRules(None, None), form=form).problems


def test_what_is_said_of_a_rotten_medium_reaches_the_plan(tmp_path, tokenizer):
    tar = write_tar(tmp_path / "x.tar", {"a": as_files(chat([{"type": "image", "member": "0.jpg"}], "x"), _0_jpg=b"rotten")})
    write_index(tar)
    reason = plan_lengths(tar, tokenizer, MediaRules.of(MODEL, Data())).problems[0]
    assert "no readable image" in reason and "header cannot be read" in reason


@given(st.integers(1, 1 << 36), st.integers(1, 1 << 21))
def test_sounds_within_the_limits_are_bounded_in_memory(num_frames, rate_hz):
    features, limits = AudioFeatures(), Limits()
    try:
        check_sound(num_frames, rate_hz, features, limits)
    except MediaError:
        with pytest.raises(MediaError):
            MediaRules(None, features, limits).footprint(MediaFacts("audio", 0, 0, num_frames, rate_hz))
        return
    assert num_frames <= features.max_seconds * limits.rate_hz
    assert MediaRules(None, features, limits).footprint(MediaFacts("audio", 0, 0, num_frames, rate_hz)).frames <= 3000


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 600])
def test_channels_are_averaged(channels):
    content = flac(3000, channels=channels, format="WAV")
    values, _ = soundfile.read(io.BytesIO(content), dtype="float64", always_2d=True)
    wave, rate_hz = decode_sound(content, AudioFeatures())
    assert rate_hz == 16000 and wave.dtype == np.float32
    np.testing.assert_allclose(wave, values.mean(axis=1), rtol=0, atol=1e-6)
