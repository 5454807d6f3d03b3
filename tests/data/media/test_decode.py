"""Decoding equals the exported processor's, takes every mode and format, and refuses what is damaged or too large."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megamm.config import AudioFeatures, ImageFeatures
from megamm.core.types import MediaFacts
from megamm.data.media.decode import audio_input, image_input, log_mel
from megamm.data.media.features import MediaRules, resampled_length
from megamm.data.media.files import MediaError, decode_picture, read_facts
from tests.support.shards import flac, jpeg

RULES = MediaRules(ImageFeatures(), AudioFeatures())


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def wav(wave: np.ndarray, rate_hz: int = 16000, subtype: str = "FLOAT", format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format=format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 48), (300, 200), (31, 517), (640, 480), (1, 1), (5, 900)])
def test_picture_equals_the_siglip2_processor(width, height):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    content = jpeg(width, height, quality=90)
    features = ImageFeatures(patch_size=16, max_patches=64, mean=(0.4, 0.5, 0.6), std=(0.5, 0.25, 0.3))
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64, image_mean=[0.4, 0.5, 0.6], image_std=[0.5, 0.25, 0.3])
    expected = processor(Image.open(io.BytesIO(content)), return_tensors="np")
    found = image_input(content, features)
    assert found.grid == tuple(expected["spatial_shapes"][0].tolist())
    assert found.num_tokens == len(found.pixels) == expected["pixel_attention_mask"].sum()
    np.testing.assert_allclose(found.pixels, expected["pixel_values"][0][: len(found.pixels)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_samples", [100, 8000, 16000, 16159, 80_003])
@pytest.mark.parametrize("kind", ["noise", "tone", "silence"])
def test_sound_equals_the_qwen3_asr_extractor(num_samples, kind):
    from transformers.models.qwen3_asr.feature_extraction_qwen3_asr import Qwen3ASRFeatureExtractor

    time = np.arange(num_samples) / 16000
    wave = {"noise": np.random.default_rng(0).uniform(-0.5, 0.5, num_samples), "tone": np.sin(3000 * time), "silence": 0 * time}[kind]
    wave = wave.astype(np.float32)
    extractor = Qwen3ASRFeatureExtractor(feature_size=128)
    expected = extractor(wave, sampling_rate=16000, padding="longest", n_window=0, return_tensors="np")["input_features"][0]
    found = audio_input(wav(wave), AudioFeatures()).mel
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([1, 2]), st.sampled_from(["naflex", "fixed"]))
@settings(max_examples=25)
def test_a_picture_takes_what_was_planned(width, height, merge, kind):
    features = ImageFeatures(kind=kind, patch_size=8, max_patches=36, merge=merge, size=64, stride=16)
    rules = MediaRules(features, None)
    planned = rules.footprint(MediaFacts("image", width, height))
    found = image_input(encoded(Image.new("RGB", (width, height))), features)
    assert planned.tokens == found.num_tokens
    assert planned.patches == (len(found.pixels) if kind == "naflex" else found.num_tokens)
    assert planned.patches <= 36 if kind == "naflex" else found.pixels.shape == (3, 64, 64)


@given(st.integers(1, 60_000), st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000]))
@settings(max_examples=25)
def test_a_sound_takes_what_was_planned(num_frames, rate_hz):
    content = wav(np.zeros(num_frames, np.float32), rate_hz)
    planned = RULES.footprint(read_facts("audio", io.BytesIO(content)))
    found = audio_input(content, AudioFeatures())
    assert (planned.tokens, planned.frames) == (found.num_tokens, found.mel.shape[1])


def test_resampling_keeps_a_tone():
    def tone(rate_hz: int, seconds: float = 1.0) -> np.ndarray:
        return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(np.float32)

    expected = log_mel(tone(16000), AudioFeatures())
    for rate_hz in (8000, 22050, 44100):
        found = audio_input(wav(tone(rate_hz), rate_hz), AudioFeatures())
        # Away from the edges, where the resampler's filter sees the end of the sound, and in the bands that hold the tone.
        np.testing.assert_allclose(found.mel[8:16, 10:90], expected[8:16, 10:90], atol=0.05)
    assert resampled_length(1, 48000, 8000) == 1


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
def test_sound_formats(format, subtype):
    wave = np.sin(np.arange(32000) * 0.1).astype(np.float32) * 0.5
    stereo = np.stack([wave, wave], axis=1)
    expected = log_mel(wave, AudioFeatures())
    found = audio_input(wav(stereo, subtype=subtype, format=format), AudioFeatures()).mel
    frames = min(expected.shape[1], found.shape[1]) - 10
    loud = expected[:, 10:frames] > 1
    assert np.abs(found[:, 10:frames] - expected[:, 10:frames])[loud].max() < 0.1


def test_without_band_means_a_louder_sound_of_another_colour_is_the_same():
    features = AudioFeatures(normalize="bands")
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * np.linspace(0.2, 1.0, 16000, dtype=np.float32)
    found = log_mel(wave, features)
    assert np.abs(found.mean(axis=1)).max() < 1e-5
    np.testing.assert_allclose(log_mel(3 * wave, features), found, atol=1e-4)
    # A filter of one tap before another: what a band loses or gains is nearly the same in all of its frames.
    coloured = np.convolve(wave, [1.0, -0.9])[:16000].astype(np.float32)
    plain = np.abs(log_mel(coloured, AudioFeatures()) - log_mel(wave, AudioFeatures())).mean()
    assert np.abs(log_mel(coloured, features) - found).mean() < 0.1 * plain
    # Of a short sound the silence that fills it up does not count.
    short = log_mel(wave[:3000], features)
    assert short.shape[1] == 50 and np.abs(short[:, :18].mean(axis=1)).max() < 1e-5
    short_coloured, quiet = log_mel(coloured[:3000], features), 3000 // 160 + 2
    assert np.abs(short_coloured - short)[:, :16].mean() < 0.1 * plain < np.abs(short[:, quiet:]).mean()


def grey_ramp(dtype, top: int) -> np.ndarray:
    return np.linspace(0, top, 64 * 64).reshape(64, 64).astype(dtype)


def without_adobe(content: bytes) -> bytes:
    """A JPEG without its APP14 segment."""
    start = content.index(b"\xff\xee")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def png16(colour_type: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel, all channels a grey ramp."""
    values = np.stack([grey_ramp(np.uint16, 65535)] * channels, axis=2).astype(">u2")
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in values))
    parts = {b"IHDR": struct.pack(">IIBBBBB", 64, 64, 16, colour_type, 0, 0, 0), b"IDAT": pixels, b"IEND": b""}
    chunks = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def laid_on_white(ramp: np.ndarray) -> np.ndarray:
    """Grey as light as it is opaque, on white."""
    share = ramp.astype(np.float64)[..., None].repeat(3, 2) / 255
    return 255 * (share * share + 1 - share)


def modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Encoded pictures of a grey ramp in many modes, with the RGB values that they mean."""
    ramp = grey_ramp(np.uint8, 255)
    rgb = np.stack([ramp] * 3, axis=2)
    alpha = np.zeros_like(ramp)
    white = np.full_like(rgb, 255)
    return {
        "grey": (encoded(Image.fromarray(ramp)), rgb),
        "rgb": (encoded(Image.fromarray(rgb)), rgb),
        "webp": (encoded(Image.fromarray(rgb), "WEBP", lossless=True), rgb),
        "sixteen bits": (encoded(Image.fromarray(grey_ramp(np.uint16, 65535))), grey_ramp(np.uint16, 65535)[..., None].repeat(3, 2) >> 8),
        "transparent": (encoded(Image.fromarray(np.dstack([rgb, alpha]))), white),
        "grey with alpha": (encoded(Image.fromarray(np.dstack([ramp, alpha]), "LA")), white),
        "opaque": (encoded(Image.fromarray(np.dstack([rgb, alpha + 255]))), rgb),
        "palette": (encoded(Image.fromarray(ramp).convert("P")), rgb),
        "transparent palette": (encoded(Image.new("P", (64, 64)), transparency=0), white),
        "bits": (encoded(Image.fromarray(ramp > 127)), (rgb > 127) * np.uint8(255)),
        "progressive": (encoded(Image.fromarray(rgb), "JPEG", quality=100, subsampling=0, progressive=True), rgb),
        "grey jpeg": (encoded(Image.fromarray(ramp), "JPEG", quality=100), rgb),
        "cmyk": (encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100, subsampling=0), rgb),
        "cmyk without the marker of Adobe": (without_adobe(encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100)), rgb),
        "two pictures in a jpeg": (encoded(Image.fromarray(rgb), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]), rgb),
        "sixteen bits of each colour": (png16(2, 3), grey_ramp(np.uint16, 65535)[..., None].repeat(3, 2) >> 8),
        "sixteen bits with alpha": (png16(6, 4), laid_on_white(ramp)),
        "sixteen bits of grey with alpha": (png16(4, 2), laid_on_white(ramp)),
        "animated png": (encoded(Image.fromarray(rgb), "PNG", save_all=True, append_images=[Image.new("RGB", (64, 64))]), rgb),
        "named wrongly": (encoded(Image.fromarray(rgb), "PNG"), rgb),
        "animated": (encoded(Image.fromarray(rgb), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 64))]), rgb),
    }


@pytest.mark.parametrize("name", list(modes()))
def test_picture_modes(name):
    content, expected = modes()[name]
    features = ImageFeatures(kind="fixed", size=64, stride=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = image_input(content, features).pixels.transpose(1, 2, 0) * 255
    # JPEG loses a little, and alpha is applied in whole steps.
    loss = 3 if content[:2] == b"\xff\xd8" else 1.5 if "alpha" in name and "bits" in name else 0.01
    np.testing.assert_allclose(found, expected, atol=loss)


def test_cmyk_keeps_its_colours():
    content = encoded(Image.new("RGB", (32, 32), (200, 30, 90)).convert("CMYK"), "JPEG", quality=95)
    for one in (content, without_adobe(content)):
        assert np.abs(np.asarray(decode_picture(one)).astype(int) - (200, 30, 90)).max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_texts_and_profiles_of_a_png_change_nothing(orientation):
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("packed", "x" * 1000, zip=True)
    texts.add_itxt("packed too", "x" * 1000, zip=True)
    texts.add_text("plain", "x" * 1000)
    texts.add_itxt("plain too", "x" * 1000)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    plain = encoded(picture, exif=exif)
    full = encoded(picture, exif=exif, pnginfo=texts, icc_profile=bytes(1000))
    assert full.count(b"zTXt") == 1 and full.count(b"iTXt") == 2 and b"iCCP" in full
    assert read_facts("image", io.BytesIO(full)) == read_facts("image", io.BytesIO(plain))
    assert np.array_equal(np.asarray(decode_picture(full)), np.asarray(decode_picture(plain)))


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "WAV", "FLAC", "OGG", "MP3"]), st.data())
@settings(max_examples=150)
def test_damage_is_an_error_of_ours_or_goes_unnoticed(format, data):
    is_picture = format in ("JPEG", "PNG", "WEBP")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(jpeg(24, 16, format=format, exif=exif) if is_picture else flac(3000, rate_hz=16000, format=format))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    for read in (
        lambda: read_facts("image" if is_picture else "audio", io.BytesIO(damaged)),
        lambda: image_input(damaged, ImageFeatures()) if is_picture else audio_input(damaged, AudioFeatures()),
    ):
        try:
            read()
        except MediaError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright(orientation, format):
    from PIL import ImageOps

    values = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(values), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    features = ImageFeatures(patch_size=8, max_patches=60)
    assert read_facts("image", io.BytesIO(content)) == MediaFacts("image", *upright.size)
    found, expected = image_input(content, features), image_input(encoded(upright), features)
    assert found.grid == expected.grid
    np.testing.assert_array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", jpeg(64, 64)[:400], jpeg(64, 64, format="PNG")[:-3000], b"GIF89a" + bytes(100), b"%!PS-Adobe"]
)
def test_damaged_pictures_are_refused(content):
    with pytest.raises(MediaError):
        image_input(content, ImageFeatures())


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF", flac(16000)[:100], flac(16000)[:-8000], b"ID3" + bytes(200), wav(np.zeros(0, np.float32)), flac(99, format="WAV")[:-2]],
)
def test_damaged_sounds_are_refused(content):
    with pytest.raises(MediaError):
        audio_input(content, AudioFeatures())


def test_a_wav_of_unknown_length_is_taken_as_it_is():
    content = flac(9000, format="WAV")
    place = content.index(b"data") + 4
    for size in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        found = audio_input(content[:place] + size + content[place + 4 :], AudioFeatures())
        np.testing.assert_array_equal(found.mel, audio_input(content, AudioFeatures()).mel)


def test_useless_sounds_are_refused():
    with pytest.raises(MediaError, match="not finite"):
        audio_input(wav(np.array([0.0, np.nan] * 8000, np.float32)), AudioFeatures())
    with pytest.raises(MediaError, match="so loud that its spectrum overflows"):
        audio_input(wav(np.array([1e38, -1e38] * 8000, np.float32)), AudioFeatures())
    with pytest.raises(MediaError, match=r"lasts 31\.0 s"):
        audio_input(flac(31 * 16000), AudioFeatures())


def test_models_without_a_tower_refuse_its_media():
    none = MediaRules(None, None)
    with pytest.raises(MediaError, match="no vision tower"):
        none.footprint(MediaFacts("image", 1, 1))
    with pytest.raises(MediaError, match="no audio tower"):
        none.footprint(MediaFacts("audio", 0, 0, 1, 1))
