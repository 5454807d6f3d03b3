"""Stock views: parts of an exported model as folders that transformers loads without any code of ours."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megamm.core.errors import ExportError
from megamm.export.parity import Expected, logits_of
from megamm.inference.load import Loaded, no_progress_bar
from megamm.models.views import VIEWS, View

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def possible_views(loaded: Loaded) -> tuple[str, ...]:
    """Names of the stock views that this model has."""
    return tuple(name for name, view in VIEWS.items() if view.is_possible(loaded.config))


def check_views(loaded: Loaded, names: Sequence[str]) -> None:
    """Refuse views that the model does not have.

    Raises:
        ExportError: A name is unknown, or the model's towers do not fit the stock class.
    """
    for name in names:
        if name not in possible_views(loaded):
            raise ExportError(f"view {name!r} cannot be made of this model; it has the views {', '.join(possible_views(loaded))}")


def export_views(loaded: Loaded, folder: Path, names: Sequence[str], *, references: Sequence[Expected], max_shard_size: str) -> None:
    """Write `folder/views/NAME` for each name, and prove each: it loads strictly and gives the very logits of the whole model.

    Args:
        loaded: The model.
        folder: The exported folder, its tokenizer files already there.
        names: Of `possible_views`.
        references: From `parity.expected`; a view answers the probe of its own name.
        max_shard_size: Bound on a weight file.

    Raises:
        ExportError: A view does not load strictly, or answers differently.
    """
    check_views(loaded, names)
    by_name = {reference.probe.name: reference for reference in references}
    for name in names:
        target = folder / "views" / name
        kind = _write(loaded, VIEWS[name], target, max_shard_size)
        for file in _TOKENIZER_FILES:
            shutil.copyfile(folder / file, target / file)
        gc.collect()
        _prove(name, kind, target, by_name[name])


def _write(loaded: Loaded, view: View, target: Path, max_shard_size: str) -> type[PreTrainedModel]:
    """Save the stock model and return its class."""
    config = view.config(loaded.config)
    with torch.device("meta"):
        kind = type(view.build(config))
    state = {new: value for old, value in loaded.model.state_dict().items() if (new := view.rename(old)) is not None}
    with no_progress_bar():
        stock, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=loaded.model.dtype, output_loading_info=True)
        _insist(target, info)
        stock.save_pretrained(target, max_shard_size=max_shard_size)
    return kind


def _prove(name: str, kind: type[PreTrainedModel], target: Path, reference: Expected) -> None:
    with no_progress_bar():
        stock, info = kind.from_pretrained(target, local_files_only=True, output_loading_info=True)
    _insist(target, info)
    # Our model casts pictures and sounds itself; stock classes want them in their own type.
    inputs = {key: value.to(stock.dtype) if value.is_floating_point() else value for key, value in reference.inputs.items()}
    logits = logits_of(stock.eval(), inputs)
    difference = float((logits - reference.logits).abs().max())
    if difference != 0:
        raise ExportError(
            f"view {name!r} ({kind.__name__}) differs from the whole model by {difference:.3g} in a logit; "
            "leave it out of the export and check the installed transformers"
        )


def _insist(target: Path, info: dict) -> None:
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise ExportError(f"view {target.name!r} does not fit its stock class: {problems}; leave it out of the export")
