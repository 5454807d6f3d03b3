"""Stock views: parts of an exported model as folders that transformers loads without any code of ours."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megamm.core.errors import ExportError
from megamm.export.parity import Expected, logits_of, tolerance_of
from megamm.inference.load import Loaded, no_progress_bar
from megamm.models.views import VIEWS, View

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def possible_views(loaded: Loaded) -> tuple[str, ...]:
    """Names of the stock views that this model has."""
    return tuple(name for name, view in VIEWS.items() if view.is_possible(loaded.config))


def check_views(loaded: Loaded, names: Sequence[str]) -> None:
    """Refuse views that the model does not have.

    Raises:
        ExportError: A name is unknown, the model's towers do not fit the stock class, or there is an adapter that it does not know.
    """
    for name in names:
        if loaded.config.adapter is not None:
            raise ExportError(f"view {name!r} cannot hold the adapter {loaded.config.adapter['method']!r}; export with --merge, or no view")
        if name not in possible_views(loaded):
            raise ExportError(f"view {name!r} cannot be made of this model; it has the views {', '.join(possible_views(loaded))}")


def export_views(loaded: Loaded, folder: Path, names: Sequence[str], *, references: Sequence[Expected], max_shard_size: str) -> None:
    """Write `folder/views/NAME` for each name, and prove each: it loads strictly, its weights are the whole model's
    bit for bit, and its logits are the whole model's but for the order of sums inside kernels (`parity.tolerance_of`).

    Args:
        loaded: The model.
        folder: The exported folder, its tokenizer files already there.
        names: Of `possible_views`.
        references: From `parity.expected`; a view answers the probe of its own name.
        max_shard_size: Bound on a weight file.

    Raises:
        ExportError: A view does not load strictly, has other weights, or answers differently.
    """
    check_views(loaded, names)
    by_name = {reference.probe.name: reference for reference in references}
    for name in names:
        target = folder / "views" / name
        state = _state(loaded, VIEWS[name])
        kind = _write(loaded, VIEWS[name], state, target, max_shard_size=max_shard_size)
        for file in _TOKENIZER_FILES:
            shutil.copyfile(folder / file, target / file)
        gc.collect()
        _prove(kind, state, target, by_name[name])


def _state(loaded: Loaded, view: View) -> dict[str, torch.Tensor]:
    """The view's weights, which are the model's own tensors under stock names."""
    return {new: value for old, value in loaded.model.state_dict().items() if (new := view.rename(old)) is not None}


def _write(loaded: Loaded, view: View, state: dict[str, torch.Tensor], target: Path, *, max_shard_size: str) -> type[PreTrainedModel]:
    """Save the stock model and return its class."""
    config = view.config(loaded.config)
    with torch.device("meta"):
        kind = type(view.build(config))
    with no_progress_bar():
        stock, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=loaded.model.dtype, output_loading_info=True)
        _insist(target, info)
        stock.save_pretrained(target, max_shard_size=max_shard_size)
    return kind


def _prove(kind: type[PreTrainedModel], state: dict[str, torch.Tensor], target: Path, reference: Expected) -> None:
    with no_progress_bar():
        stock, info = kind.from_pretrained(target, local_files_only=True, output_loading_info=True)
    _insist(target, info)
    what = f"view {target.name!r} ({kind.__name__}) differs from the whole model"
    fix = "leave it out of the export and check the installed transformers"
    stored = stock.state_dict()
    other = [name for name, value in state.items() if not torch.equal(stored[name], value.cpu())]
    if other:
        raise ExportError(f"{what} in {len(other)} of {len(state)} weights, {other[0]!r} first; {fix}")
    # Our model casts pictures and sounds itself; stock classes want them in their own type.
    inputs = {key: value.to(stock.dtype) if value.is_floating_point() else value for key, value in reference.inputs.items()}
    difference = float((logits_of(stock.eval(), inputs) - reference.logits).abs().max())
    tolerance = tolerance_of(reference.logits, stock.dtype)
    # Written so that a logit that is not a number fails too.
    if not difference <= tolerance:
        raise ExportError(f"{what} by {difference:.3g} in a logit, {tolerance:.3g} is allowed; {fix}")


def _insist(target: Path, info: dict) -> None:
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise ExportError(f"view {target.name!r} does not fit its stock class: {problems}; leave it out of the export")
