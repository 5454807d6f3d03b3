"""An adapter alone, as the peft library keeps it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from megamm.checkpoint.manifest import read_manifest
from megamm.config import Adapter, Recipe
from megamm.core.errors import ExportError
from megamm.core.logging import get_logger
from megamm.export.merge import largest_differences, require_low_rank, without_adapter
from megamm.inference.load import Loaded
from megamm.models.adapters import is_adapter, low_rank_layers, triplet_layers

if TYPE_CHECKING:
    from peft import LoraConfig

_log = get_logger("export")
# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


def write_peft_folder(loaded: Loaded, folder: Path) -> None:
    """Write a model's changes of low rank into an existing folder, and prove that peft makes the same model of them and the base.

    Args:
        loaded: A run's model in float32, on the CPU.
        folder: Gets the two files.

    Raises:
        ExportError: peft is not installed, the model has no changes of low rank, its base trained as well, it has a head, or peft's model
            differs.
    """
    assert loaded.recipe is not None, "only a run's model is exported"
    require_low_rank(loaded, "a peft folder")
    if loaded.recipe.adapter.train_base:
        raise ExportError("adapter.train_base=true changed the base as well, which a peft folder does not hold; export with --merge")
    if loaded.model.head is not None:
        raise ExportError(f"a peft folder holds no {loaded.model.head.settings.kind} head; export with --merge, which keeps it")
    base = read_manifest(loaded.source).base
    kept = {name: (layer.lora_E != 0).flatten() for name, layer in triplet_layers(loaded.model)}
    _config_class(loaded.recipe.adapter)(
        lora_alpha=loaded.recipe.adapter.alpha,
        lora_dropout=loaded.recipe.adapter.dropout,
        target_modules=[name for name, _ in low_rank_layers(loaded.model)],
        base_model_name_or_path=base.path if base is not None and base.step is None else None,
        inference_mode=True,
        **_own_settings(loaded.recipe, kept),
    ).save_pretrained(folder)
    save_file(dict(_tensors(loaded, kept)), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _prove(loaded, folder)


def _config_class(adapter: Adapter) -> type[LoraConfig]:
    try:
        import peft
    except ImportError:
        raise ExportError("a peft folder needs peft; pip install 'megamm[adapters]'") from None
    return peft.AdaLoraConfig if adapter.method == "adalora" else peft.LoraConfig


def _own_settings(recipe: Recipe, kept: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What only one of peft's methods has."""
    adapter, budget = recipe.adapter, recipe.adapter.budget
    if adapter.method != "adalora":
        return {"r": adapter.rank, "use_dora": adapter.method == "dora"}
    return {
        "init_r": budget.initial_rank,
        "target_r": adapter.rank,
        "tinit": budget.warmup_steps,
        "tfinal": budget.final_steps,
        "deltaT": budget.every,
        "beta1": budget.sensitivity_decay,
        "beta2": budget.uncertainty_decay,
        "orth_reg_weight": budget.orthogonality,
        "total_step": recipe.train.steps,
        "rank_pattern": {f"{name}.lora_E": one.tolist() for name, one in kept.items()},
    }


def _tensors(loaded: Loaded, kept: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as peft stores them; of a sum of triplets those whose number is not zero, which is all that acts."""
    for name, value in loaded.model.named_parameters():
        if not is_adapter(name):
            continue
        layer, _, kind = name.rpartition(".")
        if layer in kept:
            yield _PREFIX + name, (value[:, kept[layer]] if kind == "lora_B" else value[kept[layer]]).detach().contiguous()
        else:
            # peft keeps DoRA's lengths as they are, and factors as layers of their own.
            yield _PREFIX + (name if kind == "lora_magnitude_vector" else f"{name}.weight"), value.detach().contiguous()


def _prove(loaded: Loaded, folder: Path) -> None:
    from peft import PeftModel

    state = {name: value for name, value in loaded.model.state_dict().items() if not is_adapter(name)}
    base = without_adapter(loaded, state, torch.float32)
    theirs = dataclasses.replace(base, model=PeftModel.from_pretrained(base.model, folder).eval())
    for name, (difference, tolerance) in largest_differences(loaded, theirs).items():
        _log.info("peft's logits on probe %s differ by %.3g, %.3g is allowed", name, difference, tolerance)
        if not difference <= tolerance:
            raise ExportError(
                f"peft makes another model of {folder.name} and the base: a logit of probe {name!r} differs by {difference:.3g}, "
                f"{tolerance:.3g} is allowed; check the installed peft, or export with --merge"
            )
