import dataclasses

import pytest
import torch

from megamm.config.schema import ImageFeatures, Model, Optimizer, Tower
from megamm.core.errors import ConfigError
from megamm.models.build import config_from_recipe, num_parameters, parameter_groups
from megamm.models.configuration_megamm import MegaMMConfig
from tests.support.multimodal import CONTROL_IDS, RESNET, TEXT, VISION, VOCAB_SIZE, tiny_config, tiny_model, tiny_recipe


def _config(recipe: Model) -> MegaMMConfig:
    return config_from_recipe(recipe, vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS)


def _with(recipe: Model, part: str, **changes) -> Model:
    return dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **changes)})


def test_facts_of_vocabulary_and_features_arrive():
    config = tiny_config(merge=2)
    assert config.text_config.vocab_size == VOCAB_SIZE and config.text_config.pad_token_id is None
    assert config.audio_config.num_mel_bins == config.audio_features["num_mel"] == 16
    assert config.audio_config.output_dim == config.text_config.hidden_size
    assert config.vision_config.vision_use_head is False and config.image_features["merge"] == 2
    assert config.eos_token_id == [CONTROL_IDS["end"], CONTROL_IDS["eos"]] and config.image_token_id == CONTROL_IDS["image"]
    assert MegaMMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (_with(tiny_recipe(), "text", type="qwen33"), "model.text.type='qwen33' is not a model_type"),
        (tiny_recipe(hiden_size=3), "model.text.config.hiden_size is not a key of Qwen3Config; did you mean 'hidden_size'"),
        (tiny_recipe(hidden_size="a"), "model.text.config is not valid for Qwen3Config"),
        (tiny_recipe(vocab_size=99), "model.text.config.vocab_size=99 is not the vocabulary's 128"),
        (tiny_recipe(attention_dropout=0.1), "model.text.config.attention_dropout=0.1 does not go with packed rows"),
        (tiny_recipe(use_sliding_window=True, sliding_window=8), "model.text.config.sliding_window=8"),
        (_with(tiny_recipe(), "image_features", patch_size=8), "patch_size=8 is not the vision tower's 4; set it to 4"),
        (_with(tiny_recipe(), "image_features", merge=5), "max_patches=16 is less than one merged token of 5x5"),
        (_with(tiny_recipe(), "image_features", kind="fixed"), "does not take model.image_features.kind='fixed'"),
        (_with(tiny_recipe(), "vision", config=VISION | {"vision_use_head": True}), "adds a pooling head"),
        (
            _with(tiny_recipe(), "vision", config=VISION | {"attention_dropout": 0.1}),
            "model.vision.config.attention_dropout=0.1 does not go",
        ),
        (_with(tiny_recipe(vision="resnet"), "image_features", kind="naflex"), "does not take model.image_features.kind='naflex'"),
        (_with(tiny_recipe(vision="resnet"), "image_features", size=36), "size=36 is not a multiple of stride 8 x merge 1; set it to 32"),
        (_with(tiny_recipe(vision="resnet"), "image_features", stride=16), "returns a map of 4x4 for 32 pixels, not 2x2"),
        (_with(tiny_recipe(), "audio", type="whisper"), "does not take sounds of any length"),
        (_with(tiny_recipe(), "audio", config={"output_dim": 7}), "output_dim=7 is not the decoder's hidden_size 32"),
        (_with(tiny_recipe(), "audio", config={"num_mel_bins": 7}), "num_mel=16 is not the audio tower's num_mel_bins=7; set it to 7"),
        (_with(tiny_recipe(), "audio", config={"n_window": 25}), "n_window=25 is not 50"),
        (_with(tiny_recipe(), "audio_features", rate_hz=8000), "rate_hz=8000 holds no 8 kHz"),
        (_with(tiny_recipe(), "text", pretrained="/nowhere"), "model.text.pretrained='/nowhere' has no config.json"),
    ],
)
def test_contradictions_are_one_line_with_the_fix(recipe, message):
    with pytest.raises(ConfigError) as caught:
        _config(recipe)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_fixed_tower_with_parameters_beside_its_map_is_refused():
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
    }
    features = ImageFeatures(kind="fixed", size=32, stride=8)
    # SigLIP without its head returns one position a patch; ViT adds a class token and a pooler.
    siglip = Model(text=Tower(type="qwen3", config=TEXT), vision=Tower(type="siglip_vision_model", config=config), image_features=features)
    assert _config(siglip).vision_config.vision_use_head is False
    with pytest.raises(ConfigError, match="returns a map of 17 for 32 pixels, not 4x4"):
        _config(_with(siglip, "vision", type="vit"))
    with pytest.raises(ConfigError, match="parameters that its feature map does not use"):
        _config(
            _with(siglip, "vision", type="convnext", config={"hidden_sizes": [8, 8], "depths": [1, 1], "patch_size": 4, "num_stages": 2})
        )


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"vision": "resnet"}, {"vision": "", "audio": False}])
def test_parameters_are_counted_without_allocating_them(changes):
    counts = num_parameters(tiny_config(**changes))
    model = tiny_model(**changes)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
    assert counts["lm_head"] == (0 if changes.get("tie_word_embeddings", True) else 128 * 32)
    assert ("vision_tower" in counts) == (changes.get("vision") != "")


def test_groups_hold_every_trainable_parameter_once_at_its_towers_rate():
    model = tiny_model(vision="resnet", tie_word_embeddings=False)
    recipe = tiny_recipe(vision="resnet", tie_word_embeddings=False)
    recipe = _with(recipe, "vision", lr_scale=0.1)
    recipe = dataclasses.replace(recipe, projector_lr_scale=5.0)
    groups = {group["name"]: group for group in parameter_groups(model, recipe, Optimizer(lr=1e-3, weight_decay=0.1))}
    assert list(groups) == [
        f"{owner}{end}"
        for owner in ("text", "vision", "audio", "projector")
        for end in ("", "_no_decay")
        if owner + end != "vision_no_decay"
    ]
    assert {name: group["lr"] for name, group in groups.items() if not name.endswith("decay")} == pytest.approx(
        {"text": 1e-3, "vision": 1e-4, "audio": 1e-3, "projector": 5e-3}
    )
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for name, group in groups.items():
        assert all((parameter.dim() > 1) == (group["weight_decay"] == 0.1) for parameter in group["params"]), name


def test_positions_are_not_decayed_and_partitioned_parameters_keep_their_rank():
    model = tiny_model()
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    matrix = model.model.language_model.layers[0].mlp.up_proj.weight
    # What ZeRO-3 leaves of a parameter: no elements, and the real shape beside it.
    matrix.ds_shape, matrix.data = matrix.shape, torch.empty(0)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, tiny_recipe(), Optimizer())}
    assert any(parameter is positions for parameter in groups["vision_no_decay"])
    assert any(parameter is matrix for parameter in groups["text"])


def test_frozen_towers_leave_the_groups_and_projectors_stay():
    model = tiny_model()
    recipe = tiny_recipe()
    for part in ("text", "vision", "audio"):
        recipe = _with(recipe, part, trainable=False)
    names = [group["name"] for group in parameter_groups(model, recipe, Optimizer())]
    assert names == ["projector", "projector_no_decay"]
    assert not model.lm_head.weight.requires_grad and not model.model.vision_tower.embeddings.patch_embedding.weight.requires_grad
    text = tiny_recipe(vision="", audio=False)
    with pytest.raises(ConfigError, match=r"model\.text\.trainable=true"):
        parameter_groups(tiny_model(vision="", audio=False), _with(text, "text", trainable=False), Optimizer())


def test_resnet_of_the_seed_example_is_accepted():
    assert _config(tiny_recipe(vision="resnet")).vision_hidden_size == RESNET["hidden_sizes"][-1]
