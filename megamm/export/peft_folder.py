"""An adapter alone, as the peft library keeps it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from megamm.checkpoint.manifest import read_manifest
from megamm.core.errors import ExportError
from megamm.core.logging import get_logger
from megamm.export.merge import largest_differences, require_low_rank, without_adapter
from megamm.inference.load import Loaded
from megamm.models.adapters import is_adapter, low_rank_layers

_log = get_logger("export")
# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


def write_peft_folder(loaded: Loaded, folder: Path) -> None:
    """Write a model's changes of low rank into an existing folder, and prove that peft makes the same model of them and the base.

    Args:
        loaded: A run's model in float32, on the CPU.
        folder: Gets the two files.

    Raises:
        ExportError: peft is not installed, the model has no changes of low rank, its base trained as well, or peft's model differs.
    """
    assert loaded.recipe is not None, "only a run's model is exported"
    require_low_rank(loaded, "a peft folder")
    if loaded.recipe.adapter.train_base:
        raise ExportError("adapter.train_base=true changed the base as well, which a peft folder does not hold; export with --merge")
    settings = loaded.recipe.adapter
    base = read_manifest(loaded.source).base
    _lora_config(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        target_modules=[name for name, _ in low_rank_layers(loaded.model)],
        base_model_name_or_path=base.path if base is not None and base.step is None else None,
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {_peft_name(name): value.detach().contiguous() for name, value in loaded.model.named_parameters() if is_adapter(name)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _prove(loaded, folder)


def _lora_config(**values):
    try:
        from peft import LoraConfig
    except ImportError:
        raise ExportError("a peft folder needs peft; pip install 'megamm[adapters]'") from None
    return LoraConfig(**values)


def _peft_name(name: str) -> str:
    # peft keeps DoRA's lengths as they are, and factors as layers of their own.
    return _PREFIX + (name if name.endswith("lora_magnitude_vector") else f"{name}.weight")


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
