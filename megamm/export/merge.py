"""Changes of low rank become part of the weights that they change, with the proof that the model stays the same."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from megamm.config import Adapter
from megamm.core.errors import ExportError
from megamm.export.parity import SMALLEST_SCALE, logits_of
from megamm.export.probes import make_probes
from megamm.inference.load import Loaded, no_progress_bar
from megamm.inference.prompt import left_padded, make_prompt
from megamm.models.adapters import low_rank_layers, merged_state
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration

MAX_SHARE = 5e-4
"""Share of the largest logit by which float32 logits may differ where a change is added to outputs on one side and to weights on the other.

Other operations than the order of sums alone, so more than parity allows; a change with a wrong factor is far beyond.
"""


def merged(loaded: Loaded, dtype: torch.dtype) -> tuple[Loaded, dict[str, Any]]:
    """The plain model that does what a model with changes of low rank does.

    Args:
        loaded: A run's model in float32, on the CPU.
        dtype: Of the result; changes are added in float32 and rounded once.

    Returns:
        The model, and the largest difference of logits that merging makes in float32 with its tolerance, a probe each.

    Raises:
        ExportError: The model has nothing to merge, or merging changes what it does.
    """
    require_low_rank(loaded, "merged")
    state = merged_state(loaded.model)
    exact = without_adapter(loaded, state, torch.float32)
    return without_adapter(loaded, state, dtype), _compare(loaded, exact)


def without_adapter(loaded: Loaded, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Loaded:
    """The plain model of `loaded` with the weights of `state`, rounded to `dtype`; buffers stay as they are, and so does its head."""
    assert loaded.recipe is not None, "only a run's model has an adapter to leave out"
    config = copy.deepcopy(loaded.config)
    config.adapter = None
    buffers = {name for name, _ in loaded.model.named_buffers()}
    core = {name: value for name, value in state.items() if not name.startswith("head.")}
    rounded = {name: value if name in buffers else value.to(dtype) for name, value in core.items()}
    with no_progress_bar():
        model, info = MegaMMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=rounded, dtype=dtype, output_loading_info=True
        )
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    assert not problems, f"the plain model has other weights: {problems}"
    if loaded.model.head is not None:
        model.head = copy.deepcopy(loaded.model.head).to(dtype)
    return dataclasses.replace(loaded, model=model.eval(), recipe=dataclasses.replace(loaded.recipe, adapter=Adapter()))


def require_low_rank(loaded: Loaded, what: str) -> None:
    """Refuse a model that has no changes of low rank.

    Raises:
        ExportError: Names the adapter that it has.
    """
    if not any(low_rank_layers(loaded.model)):
        method = loaded.config.adapter["method"] if loaded.config.adapter else "none"
        raise ExportError(f"adapter.method={method!r} cannot be {what}: it is no change of linear layers; export {loaded.source} as it is")


def largest_differences(loaded: Loaded, other: Loaded) -> dict[str, tuple[float, float]]:
    """Name of a probe -> the largest difference between two models' float32 logits, and how much is allowed (`MAX_SHARE`)."""
    found = {}
    for probe in make_probes(loaded.config):
        inputs = left_padded([make_prompt(loaded, [probe.message], probe.media)], loaded.config.pad_token_id, loaded.device)
        ours, theirs = logits_of(loaded.model, inputs), logits_of(other.model, inputs)
        found[probe.name] = (float((ours - theirs).abs().max()), MAX_SHARE * max(SMALLEST_SCALE, float(ours.abs().max())))
    return found


def _compare(loaded: Loaded, exact: Loaded) -> dict[str, Any]:
    rows = {}
    for name, (difference, tolerance) in largest_differences(loaded, exact).items():
        # Written so that a logit that is not a number fails too.
        if not difference <= tolerance:
            raise ExportError(
                f"the merged model differs from the trained one by {difference:.3g} in a float32 logit of probe {name!r}, "
                f"{tolerance:.3g} is allowed; export without --merge"
            )
        rows[name] = {"max_logit_difference": difference, "tolerance": tolerance}
    return rows
