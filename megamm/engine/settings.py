"""The DeepSpeed config of a run: a preset of ZeRO mechanics, what the recipe decides, and the recipe's overrides.

Each key has one owner. A preset that sets the batch, or an override that sets the precision, would contradict the recipe
that the run archives, so both are refused. Nothing is `"auto"`: DeepSpeed drops such fields silently.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamm.config.schema import Batching, Engine, Optimizer
from megamm.core.errors import ConfigError
from megamm.core.names import did_you_mean

_PRESET_KEYS = ("zero_optimization", "aio")
# DeepSpeed ignores a top-level key that it does not know, so a misspelled override would do nothing.
_OVERRIDABLE = (
    "activation_checkpointing",
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "compile",
    "data_types",
    "disable_python_gc",
    "flops_profiler",
    "fp16",
    "memory_breakdown",
    "prescale_gradients",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_optimization",
)


def deepspeed_config(engine: Engine, *, batch: Batching, optim: Optimizer, world_size: int, accumulation: int) -> dict[str, Any]:
    """Merge preset, recipe and overrides into the dictionary that DeepSpeed is given.

    Args:
        engine: Preset, precision and overrides.
        batch: Rows a micro-batch.
        optim: The clipping norm.
        world_size: Number of ranks.
        accumulation: Micro-steps a step, already resolved (at least 1).

    Raises:
        ConfigError: An unknown preset or key, a key that two of them set, a value `"auto"`, or a state that checkpoints cannot take apart.
    """
    preset = _leaves(load_preset(engine.preset))
    recipe = _leaves(_recipe_settings(engine, batch, optim, world_size=world_size, accumulation=accumulation))
    overrides = _leaves(engine.overrides)
    for key, value in overrides.items():
        _refuse_shared_key(key, value, recipe)
        _check_override(key)
    merged = preset | recipe | overrides
    for key, value in merged.items():
        if value == "auto":
            raise ConfigError(f'{key}="auto" leaves the value to nobody; write the number')
    _refuse_what_cannot_be_saved(merged)
    _check_node_size(merged, world_size)
    return _nest(merged)


def preset_names() -> list[str]:
    """Names of the presets in `ds_configs/`."""
    return sorted(path.stem for path in presets_folder().glob("*.json"))


def presets_folder() -> Path:
    """`$MEGAMM_DS_CONFIGS`, else `ds_configs/` of the checkout, else where the wheel put it.

    Raises:
        ConfigError: None of them exists.
    """
    candidates = [Path(__file__).resolve().parents[2] / "ds_configs", Path(sysconfig.get_path("data")) / "share" / "megamm" / "ds_configs"]
    if "MEGAMM_DS_CONFIGS" in os.environ:
        candidates = [Path(os.environ["MEGAMM_DS_CONFIGS"])]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(f"no folder of DeepSpeed presets at {' or '.join(map(str, candidates))}; set MEGAMM_DS_CONFIGS to one")


def load_preset(name: str) -> dict[str, Any]:
    """Read `ds_configs/NAME.json`.

    Raises:
        ConfigError: There is no such preset, it is not JSON, or it sets what a recipe decides.
    """
    if name not in preset_names():
        hint = did_you_mean(name, preset_names())
        raise ConfigError(f"engine.preset={name!r} is not known{hint}; the presets are: {', '.join(preset_names())}")
    path = presets_folder() / f"{name}.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    foreign = table.keys() - set(_PRESET_KEYS) if isinstance(table, dict) else {type(table).__name__}
    if foreign:
        raise ConfigError(f"{path} sets {min(foreign)}; a preset holds {' and '.join(_PRESET_KEYS)} only, the rest belongs to the recipe")
    return table


def _recipe_settings(engine: Engine, batch: Batching, optim: Optimizer, *, world_size: int, accumulation: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": batch.micro_rows * accumulation * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.max_grad_norm,
        # DeepSpeed's own default accumulates and reduces in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Torch's fused AdamW: as fast as DeepSpeed's, needs no compiler, and resumes bit for bit.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    # Both are stated, so that an override cannot enable a second one.
    return settings | {name: {"enabled": engine.precision == name} for name in ("bf16", "fp16")}


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a dotted key inside a table counts as nested."""
    result: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, Mapping):
            leaves = _leaves(value, f"{key}.") or {key: {}}
        else:
            leaves = {key: value}
        for leaf, leaf_value in leaves.items():
            if leaf in result:
                raise ConfigError(f"{leaf} is set twice, to {result[leaf]!r} and {leaf_value!r}; remove one")
            result[leaf] = leaf_value
    return result


def _refuse_shared_key(key: str, value: Any, recipe: Mapping[str, Any]) -> None:
    for owned in recipe:
        if key == owned or key.startswith(f"{owned}.") or owned.startswith(f"{key}."):
            raise ConfigError(
                f"engine.overrides sets {key}={value!r} and the recipe sets {owned}={recipe[owned]!r}; remove the override: "
                "batch, precision and clipping belong to [batch], engine.precision and [optim]"
            )


def _refuse_what_cannot_be_saved(merged: Mapping[str, Any]) -> None:
    """Better before a run than at its first checkpoint."""
    stage = merged.get("zero_optimization.stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={stage!r} has no checkpoints, the run would be lost; use a preset with stage 1, 2 or 3")
    if merged.get("zero_optimization.offload_param.device") == "nvme":
        raise ConfigError(
            "zero_optimization.offload_param.device='nvme' has no checkpoints: weights must rest in memory; "
            "use 'cpu', and offload_optimizer.device='nvme' for the optimizer's state, which is six times as large"
        )
    if merged.get("zero_optimization.round_robin_gradients"):
        raise ConfigError("zero_optimization.round_robin_gradients=true deals slices in an order that checkpoints cannot tell; remove it")


def _check_node_size(merged: Mapping[str, Any], world_size: int) -> None:
    size = merged.get("zero_optimization.zero_hpz_partition_size", 1)
    if not isinstance(size, int) or size < 1 or world_size % size:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size={size!r} does not divide {world_size} ranks; override it with the ranks of a node"
        )


def _check_override(key: str) -> None:
    top, _, rest = key.partition(".")
    if top not in _OVERRIDABLE:
        raise ConfigError(f"engine.overrides: {key} is not a DeepSpeed key{did_you_mean(top, _OVERRIDABLE)}")
    if top == "zero_optimization":
        known = _zero_keys()
        name = rest.partition(".")[0]
        if name not in known:
            raise ConfigError(f"engine.overrides: {key} is not a DeepSpeed key{did_you_mean(name, known)}")


def _zero_keys() -> list[str]:
    from megamm.engine.distributed import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split(".")
        place = result
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key} leads through {name}, which is set to {place!r}; override it whole or not at all")
        if isinstance(place.get(last), dict):
            raise ConfigError(f"{key}={value!r} replaces a table of settings; override its keys one by one")
        place[last] = value
    return result
