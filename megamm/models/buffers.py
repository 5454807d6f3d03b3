"""Buffers that are computed, not stored: made again in full precision after the model was built under `zero.Init`."""

from __future__ import annotations

from torch import nn

_MAKERS = {
    "RotaryEmbedding": lambda module: type(module)(config=module.config),
    "SinusoidsPositionEmbedding": lambda module: type(module)(module.length, module.channels, module.max_timescale),
}


def restore_buffers(model: nn.Module) -> list[str]:
    """Recompute rotary frequencies and sinusoids, which `zero.Init` rounds to the engine's precision.

    Call it outside `zero.Init`, after the model is built and whenever it was cast as a whole. A second call changes nothing.

    Args:
        model: The composed model.

    Returns:
        Names of the restored buffers.

    Raises:
        RuntimeError: A tower computes a buffer in a way that this function does not know.
    """
    restored: list[str] = []
    for prefix, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        stale = [name for name in names if module._buffers[name] is not None and module._buffers[name].is_floating_point()]
        if not stale:
            continue
        make = next((maker for ending, maker in _MAKERS.items() if type(module).__name__.endswith(ending)), None)
        if make is None:
            raise RuntimeError(
                f"{prefix} ({type(module).__name__}) computes {', '.join(stale)} in a way that is not known; "
                "add it to megamm/models/buffers.py"
            )
        fresh = make(module)
        for name in stale:
            module._buffers[name] = fresh._buffers[name].to(module._buffers[name].device)
            restored.append(f"{prefix}.{name}")
    return restored
