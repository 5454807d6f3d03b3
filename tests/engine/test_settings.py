import json

import pytest

from megamm.config.schema import Batching, Engine, Optimizer
from megamm.core.errors import ConfigError
from megamm.engine import settings


def merged(**changes):
    engine = Engine(**changes)
    return settings.deepspeed_config(engine, batch=Batching(micro_rows=3), optim=Optimizer(max_grad_norm=0.5), world_size=4, accumulation=2)


def leaves(value):
    return [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]


def test_the_recipe_decides_batch_precision_and_clipping():
    config = merged(precision="bf16")
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


def test_fp32_enables_no_half_precision():
    config = merged(precision="fp32")
    assert (config["bf16"], config["fp16"]) == ({"enabled": False}, {"enabled": False})


@pytest.mark.parametrize("name", settings.preset_names())
def test_presets_hold_zero_mechanics_only_and_nothing_auto(name):
    assert settings.load_preset(name).keys() <= {"zero_optimization", "aio"}
    config = merged(preset=name, overrides={"zero_optimization.zero_hpz_partition_size": 2} if name == "zero3_hpz" else {})
    assert "auto" not in leaves(config)
    json.dumps(config)


def test_overrides_go_on_top_of_the_preset():
    config = merged(
        overrides={"zero_optimization.reduce_bucket_size": 7, "zero_optimization": {"sub_group_size": 9}, "wall_clock_breakdown": True}
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["sub_group_size"] == 9
    assert config["zero_optimization"]["stage"] == 3
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gradient_clipping": 2.0}, r"engine.overrides sets gradient_clipping=2.0 and the recipe sets gradient_clipping=0.5"),
        ({"bf16.enabled": False}, r"engine.overrides sets bf16.enabled=False"),
        ({"fp16.enabled": True}, r"engine.overrides sets fp16.enabled=True and the recipe sets fp16.enabled=False"),
        ({"data_types": 3}, r"data_types=3 and the recipe sets data_types.grad_accum_dtype"),
        ({"zero_optimization.stage": 2, "zero_optimization": {"stage": 1}}, r"zero_optimization.stage is set twice, to 2 and 1"),
        ({"zero_optimization.stage3_max_live_parameter": 1}, r"did you mean 'stage3_max_live_parameters'\?"),
        ({"zero_optimisation.stage": 1}, r"did you mean 'zero_optimization'\?"),
        ({"zero_optimization.reduce_bucket_size": "auto"}, r'reduce_bucket_size="auto" leaves the value to nobody'),
        ({"zero_optimization": 3}, r"zero_optimization"),
        ({"train_batch_size": 5}, r"sets train_batch_size=24; remove the override"),
        ({"zero_optimization.stage": 0}, r"stage=0 has no checkpoints, the run would be lost; use a preset with stage 1, 2 or 3"),
        ({"zero_optimization.offload_param.device": "nvme"}, r"offload_param.device='nvme' has no checkpoints.*use 'cpu'"),
        ({"zero_optimization.round_robin_gradients": True}, r"round_robin_gradients=true .* remove it"),
        ({"zero_optimization.zero_hpz_partition_size": 3}, r"zero_hpz_partition_size=3 does not divide 4 ranks"),
    ],
)
def test_a_key_has_one_owner_and_one_spelling(overrides, message):
    with pytest.raises(ConfigError, match=message):
        merged(overrides=overrides)


def test_an_unknown_preset_suggests_one():
    with pytest.raises(ConfigError, match=r"'zero_3' is not known; did you mean 'zero3'\?"):
        merged(preset="zero_3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}',
            r"mine.json sets gradient_clipping; a preset holds zero_optimization",
        ),
        ('{"bf16": {"enabled": true}}', r"mine.json sets bf16; "),
        ("[]", r"mine.json sets list; "),
        ("{", r"mine.json is not valid JSON"),
    ],
)
def test_a_preset_holds_zero_mechanics_in_json(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv("MEGAMM_DS_CONFIGS", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        merged(preset="mine")


def test_a_missing_folder_of_presets_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMM_DS_CONFIGS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="set MEGAMM_DS_CONFIGS"):
        merged()
