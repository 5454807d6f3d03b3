import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen3ASRFeatureExtractor, Siglip2ImageProcessorPil

from megamm.config.schema import AudioFeatures, Tokenizer
from megamm.core.lengths import audio_num_mel_frames, audio_num_tokens, image_num_tokens, patch_grid
from megamm.data.media.decode import audio_input, image_input
from megamm.models.build import config_from_recipe
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.models.processing_megamm import MegaMMProcessor
from megamm.tokenizers import text
from megamm.tokenizers.vocabulary import CONTROL_NAMES
from tests.support.multimodal import NUM_MEL, PATCH, tiny_recipe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text.train(["one two three four five six seven eight nine zero"] * 40, Tokenizer(text_size=280, location_bins=10), folder)
    return folder


@pytest.fixture
def make(tokenizer_folder):
    """Build a configuration and its processor."""

    def make(**changes):
        vocabulary = text.TextTokenizer.load(tokenizer_folder).vocabulary
        control_ids = {name: vocabulary.control_id(name) for name in CONTROL_NAMES}
        config = config_from_recipe(tiny_recipe(**changes), vocab_size=vocabulary.size, control_ids=control_ids)
        return config, MegaMMProcessor.from_config(config, AutoTokenizer.from_pretrained(tokenizer_folder))

    return make


def _picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _sound(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32)


def _chat(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def _ask(processor, chats, **arguments):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True, **arguments)


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("size", [(20, 13), (5, 90), (64, 64), (1, 1)])
@pytest.mark.parametrize("num_samples", [10, 8000, 16161])
def test_placeholders_are_the_counts_of_training(make, merge, size, num_samples):
    config, processor = make(merge=merge)
    out = _ask(processor, _chat({"type": "image", "image": _picture(*size)}, {"type": "audio", "audio": _sound(num_samples)}))
    grid = patch_grid(*size, patch_size=PATCH, max_patches=16, merge=merge)
    frames = audio_num_mel_frames(num_samples, hop_length=160, min_samples=8000)
    assert out["spatial_shapes"].tolist() == [list(grid)] and out["input_features_mask"].sum() == frames
    assert (out["input_ids"] == config.image_token_id).sum() == image_num_tokens(grid, merge)
    assert (out["input_ids"] == config.audio_token_id).sum() == audio_num_tokens(frames)
    assert out["input_ids"][0, 0] == config.bos_token_id


def test_small_pictures_stay_small_where_the_recipe_says_so(make, tmp_path):
    config, made = make(max_scale=1.0)
    made.save_pretrained(tmp_path)
    for processor in (made, AutoProcessor.from_pretrained(tmp_path)):
        out = processor(images=[_picture(2 * PATCH, 3 * PATCH), _picture(40, 40)], text="<|image|> <|image|>")
        assert out["spatial_shapes"].tolist() == [[2, 3], [4, 4]]
        assert (out["input_ids"] == config.image_token_id).sum() == 6 + 16


def test_pictures_equal_the_stock_processor_where_it_can_do_the_same(make):
    _, processor = make()
    pictures = [_picture(20, 13), _picture(9, 40)]
    stock = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)(pictures, return_tensors="pt")
    out = processor(images=pictures, text="<|image|> <|image|>")
    for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask"):
        assert torch.equal(out[name], stock[name]), name


def test_grey_and_transparent_pictures_and_arrays_become_rgb(make):
    _, processor = make()
    grey, clear = _picture(8, 8).convert("L"), _picture(8, 8).convert("RGBA")
    for picture in (grey, clear, np.asarray(_picture(8, 8))):
        assert processor(images=[picture], text="<|image|>")["pixel_values"].shape == (1, 16, 3 * PATCH * PATCH)


def _stored_pictures() -> dict[str, Image.Image]:
    clear = _picture(30, 21).convert("RGBA")
    clear.putalpha(_picture(30, 21).convert("L"))
    turned = _picture(12, 40)
    turned.getexif()[0x0112] = 6
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16))
    return {"plain": _picture(33, 14), "clear": clear, "turned": turned, "deep": deep, "grey": _picture(5, 5).convert("L")}


@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("name", _stored_pictures())
def test_picture_files_become_what_training_decodes(make, tmp_path, vision, merge, name):
    _, processor = make(vision=vision, merge=merge)
    path = tmp_path / "picture.png"
    picture = _stored_pictures()[name]
    picture.save(path, exif=picture.getexif())
    trained = image_input(path.read_bytes(), tiny_recipe(vision=vision, merge=merge).image_features)
    from_path = _ask(processor, _chat({"type": "image", "path": str(path)}))
    opened = _ask(processor, _chat({"type": "image", "image": Image.open(path)}))
    for out in (from_path, opened):
        pixels = out["pixel_values"][0].numpy()
        np.testing.assert_allclose(pixels[: len(trained.pixels)], trained.pixels, rtol=0, atol=1e-6)
        assert (out["input_ids"] == processor.image_token_id).sum() == trained.num_tokens


@pytest.mark.parametrize("num_samples", [500, 16000, 40123])
@pytest.mark.parametrize("normalize", ["none", "bands"])
def test_sound_files_become_what_training_decodes(make, tmp_path, num_samples, normalize):
    config, processor = make()
    config.audio_features["normalize"] = processor.normalize = normalize
    features = AudioFeatures(**config.audio_features)
    path = tmp_path / "sound.wav"
    soundfile.write(path, 0.1 * _sound(num_samples), 16000, subtype="FLOAT")
    trained = audio_input(path.read_bytes(), features)
    wave, _ = soundfile.read(path, dtype="float32")
    out = processor(audio=[wave], text="<|audio|>")
    num_frames = trained.mel.shape[1]
    assert out["input_features_mask"].sum() == num_frames
    assert not out["input_features"][0, :, num_frames:].any()
    np.testing.assert_allclose(out["input_features"][0, :, :num_frames].numpy(), trained.mel, rtol=0, atol=2e-5)
    assert (out["input_ids"] == processor.audio_token_id).sum() == trained.num_tokens


def test_band_means_are_taken_away_where_the_recipe_says_so(make, tmp_path):
    config, _ = make()
    config.audio_features["normalize"] = "bands"
    made = MegaMMProcessor.from_config(config, make()[1].tokenizer)
    made.save_pretrained(tmp_path)
    for processor in (made, AutoProcessor.from_pretrained(tmp_path)):
        found = processor(audio=[_sound(9000), _sound(40000)], text="<|audio|><|audio|>")
        assert found["input_features"].mean(dim=-1).abs().max() < 1e-4
        assert found["input_features"].abs().max() > 0.1


def test_a_sounds_features_do_not_depend_on_its_neighbours(make):
    _, processor = make()
    sounds = [_sound(9000), _sound(40000)]
    together = processor(audio=sounds, text="<|audio|><|audio|>")
    stock = Qwen3ASRFeatureExtractor(feature_size=NUM_MEL)
    for index, sound in enumerate(sounds):
        alone = stock(sound, sampling_rate=16000, padding=True)["input_features"][0]
        frames = alone.shape[-1]
        assert torch.equal(together["input_features"][index, :, :frames], alone)
        assert not together["input_features"][index, :, frames:].any()
    assert together["input_features"].shape[-1] % 100 == 0


def test_a_wrong_sampling_rate_is_refused(make):
    _, processor = make()
    with pytest.raises(ValueError, match="sampling rate"):
        processor(audio=[_sound(9000)], text="<|audio|>", sampling_rate=8000)


def test_fixed_size_towers_get_squares(make):
    config, processor = make(vision="resnet", merge=2)
    out = _ask(processor, _chat({"type": "image", "image": _picture(20, 50)}))
    assert out["pixel_values"].shape == (1, 3, 32, 32)
    assert (out["input_ids"] == config.image_token_id).sum() == 4
    square = np.asarray(_picture(20, 50).resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64).transpose(2, 0, 1)
    np.testing.assert_allclose(out["pixel_values"][0].numpy(), square / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
def test_answers_of_a_left_padded_batch_equal_single_ones(make, vision):
    config, processor = make(vision=vision)
    torch.manual_seed(0)
    model = MegaMMForConditionalGeneration(config).eval()
    chats = [
        _chat({"type": "image", "image": _picture(20, 13)}, {"type": "text", "text": "seven"}),
        _chat({"type": "audio", "audio": _sound(20000)}, {"type": "text", "text": "nine"}),
        _chat({"type": "text", "text": "one two"}),
    ]
    together = _ask(processor, chats)
    assert together["attention_mask"][:, -1].all() and not together["attention_mask"][2, 0]
    logits = model(**together).logits[:, -1]
    for index, chat in enumerate(chats):
        single = _ask(processor, [chat])
        torch.testing.assert_close(model(**single).logits[0, -1], logits[index], rtol=0, atol=2e-6)


@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
def test_saved_processor_loads_alike(make, tmp_path, vision):
    config, processor = make(vision=vision, merge=2)
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MegaMMProcessor) and loaded.to_dict() == processor.to_dict()
    chat = _chat({"type": "image", "image": _picture(30, 17)}, {"type": "audio", "audio": _sound(9000)}, {"type": "text", "text": "four"})
    ours, theirs = _ask(processor, [chat]), _ask(loaded, [chat])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(ours) <= set(processor.model_input_names)
