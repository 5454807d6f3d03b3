import dataclasses

import pytest
import torch
from transformers import Qwen3ForCausalLM, Siglip2Config, Siglip2Model

from megamm.config.schema import Tower
from megamm.core.errors import ConfigError
from megamm.models.build import config_from_recipe
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.models.views import VIEWS
from megamm.models.weights import pretrained_weights
from tests.support.multimodal import CONTROL_IDS, TEXT, VISION, VOCAB_SIZE, tiny_model, tiny_recipe


def _start(recipe, vocab_size: int = VOCAB_SIZE):
    config = config_from_recipe(recipe, vocab_size=vocab_size, control_ids=CONTROL_IDS)
    model = MegaMMForConditionalGeneration(config)
    weights = dict(pretrained_weights(recipe, config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    return model, weights, missing


@pytest.fixture(scope="module")
def source():
    return tiny_model(seed=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """A composed folder, the stock text and audio views of it, and a whole SigLIP2 with a pooling head and a text model."""
    root = tmp_path_factory.mktemp("pretrained")
    source.save_pretrained(root / "megamm", max_shard_size="60kB")
    for name in ("text", "audio"):
        view = VIEWS[name].build(VIEWS[name].config(source.config))
        view.load_state_dict({new: value for old, value in source.state_dict().items() if (new := VIEWS[name].rename(old))})
        view.save_pretrained(root / name)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    siglip = Siglip2Model(Siglip2Config(vision_config=VISION, text_config=text))
    siglip.save_pretrained(root / "siglip2")
    return root, siglip


def _tower(kind: str, folder) -> Tower:
    return Tower(type={"text": "qwen3", "vision": "siglip2_vision_model", "audio": "qwen3_asr_encoder"}[kind], pretrained=str(folder))


@pytest.mark.parametrize(
    ("places", "prefixes"),
    [
        ({"text": "text"}, ("model.language_model.", "lm_head.")),
        (
            {"text": "megamm", "vision": "megamm", "audio": "megamm"},
            ("model.language_model.", "model.vision_tower.", "model.audio_tower.", "lm_head."),
        ),
        ({"audio": "audio"}, ("model.audio_tower.",)),
    ],
)
def test_towers_start_from_stock_and_composed_folders(source, folders, places, prefixes):
    recipe = tiny_recipe(tie_word_embeddings=False)
    recipe = dataclasses.replace(recipe, **{kind: _tower(kind, folders[0] / place) for kind, place in places.items()})
    model, weights, _ = _start(recipe)
    expected = {name for name in source.state_dict() if name.startswith(prefixes)}
    assert set(weights) == expected
    for name in expected:
        assert torch.equal(model.state_dict()[name], source.state_dict()[name]), name


def test_a_vision_tower_is_taken_out_of_a_whole_siglip2_without_its_head(folders):
    root, siglip = folders
    recipe = dataclasses.replace(tiny_recipe(), vision=_tower("vision", root / "siglip2"))
    model, weights, _ = _start(recipe)
    own = siglip.vision_model.state_dict()
    assert set(weights) == {f"model.vision_tower.{name}" for name in own if not name.startswith("head.")}
    assert torch.equal(model.model.vision_tower.encoder.layers[1].mlp.fc1.weight, own["encoder.layers.1.mlp.fc1.weight"])


@pytest.mark.parametrize("vocab_size", [64 + 64, 256])
@pytest.mark.parametrize("folder_ids", [100, 300])
@pytest.mark.parametrize("tied", [True, False])
def test_ids_of_the_folder_come_first_and_new_ones_start_at_the_mean(tmp_path, vocab_size, folder_ids, tied):
    stock = Qwen3ForCausalLM(type(tiny_model().config.text_config)(**TEXT, vocab_size=folder_ids))
    stock.save_pretrained(tmp_path)
    config = stock.config
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    recipe = dataclasses.replace(tiny_recipe(vision="", audio=False), text=_tower("text", tmp_path))
    model, _, missing = _start(recipe, vocab_size)
    # The folder's head is tied: an untied one of ours starts from its embedding.
    assert missing == (["lm_head.weight"] if tied else [])
    kept = min(vocab_size, folder_ids)
    theirs = stock.get_input_embeddings().weight
    for ours in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.equal(ours[:kept], theirs[:kept])
        torch.testing.assert_close(ours[kept:], theirs.mean(0).expand(vocab_size - kept, -1), rtol=0, atol=1e-7)


def test_folders_that_do_not_fit_are_named(folders, tmp_path):
    root, siglip = folders
    recipe = dataclasses.replace(tiny_recipe(), vision=_tower("vision", root / "text"))
    with pytest.raises(ConfigError, match="holds qwen3, not 'siglip2_vision_model'"):
        _start(recipe)
    broken = tmp_path / "broken"
    state = {name: value for name, value in siglip.state_dict().items() if "layers.1.mlp" not in name}
    siglip.save_pretrained(broken, state_dict=state)
    with pytest.raises(ConfigError, match=r"lacks 4 of \d+ weights of 'siglip2_vision_model' \(encoder.layers.1.mlp.fc1.bias first\)"):
        _start(dataclasses.replace(recipe, vision=_tower("vision", broken)))
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        _start(dataclasses.replace(recipe, vision=_tower("vision", broken)))
