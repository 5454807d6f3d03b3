"""Where a fine-tuning run starts from: another run's checkpoint, or an exported folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megamm.checkpoint.base import Base
from megamm.checkpoint.choose import base_at, newest_good
from megamm.checkpoint.manifest import MANIFEST, read_manifest
from megamm.checkpoint.slices import open_weights
from megamm.config import Recipe, load_resolved
from megamm.core.errors import ConfigError
from megamm.core.files import read_json
from megamm.core.logging import get_logger
from megamm.engine import weights
from megamm.engine.distributed import World, fail_together
from megamm.inference.load import run_config
from megamm.models.adapters import is_adapter
from megamm.models.build import owner_of
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.saved import PREFIX
from megamm.models.weights import pretrained_folders
from megamm.tokenizers.text import TextTokenizer
from megamm.train.run_folder import RunFolder, differences

# What may differ between a model and the one that it starts from: adapters, bounds on media, and what transformers notes.
_MAY_DIFFER = {
    "adapter",
    "architectures",
    "auto_map",
    "dtype",
    "max_patches",
    "max_scale",
    "max_seconds",
    "min_samples",
    "transformers_version",
}

# What tells heads of equal shapes apart.
_NOT_SHAPES = ("kind", "labels", "states", "multi_label", "pool", "queries", "num_heads")
_log = get_logger("train")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run started from.

    Attributes:
        source: What the command named, absolute.
        base: The weights that were found there.
        is_needed: Whether this start reads them: a run that saves all of its weights needs them at its first start alone.
        towers: Towers that start from the folders that the recipe names for them, and not from these weights.
    """

    source: str
    base: Base
    is_needed: bool
    towers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the run folder."""
        towers = {"towers": list(self.towers)} if self.towers else {}
        return {"source": self.source, **asdict(self.base), **towers}


def find_origin(source: Path | None, run: RunFolder, recipe: Recipe, tokenizer: TextTokenizer, world: World) -> Origin | None:
    """Find the weights that a run starts from, or that it started from; every rank calls it.

    A run that was started goes on with the checkpoint that it found then, whatever its source has trained since.

    Args:
        source: A run, a checkpoint or an exported folder; None for a run that starts by itself.
        run: The run folder.
        recipe: What is trained.
        tokenizer: The run's.
        world: The ranks.

    Raises:
        ConfigError: The run started otherwise, `source` is nothing to start from, has another tokenizer or model, or leaves open which
            towers are to start from folders of their own.
        CheckpointError: The weights are missing, damaged, or not those that the run started from.
    """
    with fail_together():
        recorded = _recorded(source, run)
    if source is None:
        return None
    absolute = str(source.resolve())
    if recorded is not None and recorded.source == absolute:
        if not recipe.adapter.freezes_base:
            return recorded
        folder = Path(recorded.base.path)
    else:
        folder = _weights_folder(source, world)
    base = base_at(folder, world)
    if recorded is not None and base.digest != recorded.base.digest:
        error = ConfigError(
            f"{run.path} started from {recorded.base.path} ({recorded.base.digest}), {folder} holds other weights ({base.digest}); "
            "name what it started from, or a new --run"
        )
        error.on_all_ranks = True
        raise error
    with fail_together():
        _check_tokenizer(folder, tokenizer)
        _check_model(folder, recipe, tokenizer)
        towers = _replaced_towers(folder, recipe)
    return Origin(absolute, base, is_needed=True, towers=towers)


def load_origin(model: nn.Module, origin: Origin) -> set[str]:
    """Fill a partitioned model from where the run starts, each rank its own slices.

    What only the new model has stays as it is, and so do towers that start from folders of their own, adapters in them included.

    Returns:
        Names that were filled.

    Raises:
        ConfigError: The weights lack something that is no adapter, or hold an adapter that the recipe has not (on every rank).
    """
    with fail_together(), open_weights(Path(origin.base.path)) as source:
        shapes = source.shapes()
        own = set(_names(model))
        missing = [name for name in own - shapes.keys() if not _is_added(name)]
        foreign = [name for name in shapes.keys() - own if is_adapter(name)]
        same_head = _is_same_head(model, shapes, Path(origin.base.path))
        shapes = {name: shape for name, shape in shapes.items() if (same_head if _is_head(name) else name in own or not _is_added(name))}
        shapes = {name: shape for name, shape in shapes.items() if owner_of(name) not in origin.towers}
        if missing:
            raise ConfigError(f"{origin.base.path} lacks {min(missing)}; start from a model with the towers of the recipe")
        if foreign:
            raise ConfigError(
                f"{origin.base.path} holds an adapter that the recipe's [adapter] does not have ({min(foreign)}); "
                "set the same one, or start from `megamm export RUN --merge`"
            )
        return weights.load_slices(model, shapes, source.read)


def _recorded(source: Path | None, run: RunFolder) -> Origin | None:
    """What the run folder says, once there is anything to go on with."""
    if not run.has_checkpoints():
        return None
    if not run.origin.is_file():
        if source is not None:
            raise ConfigError(f"{run.path} holds a run that did not start from {source}; name an empty folder with --run")
        return None
    values = read_json(run.origin)
    if source is None:
        named = values["source"]
        raise ConfigError(f"{run.path} holds a run that started from {named}; resume it with `megamm finetune {named} RECIPE`")
    return Origin(values.pop("source"), is_needed=False, towers=tuple(values.pop("towers", ())), base=Base(**values))


def _weights_folder(source: Path, world: World) -> Path:
    """The newest good checkpoint of a run; a checkpoint or an exported folder itself."""
    if (source / MANIFEST).is_file():
        return source
    if (source / "checkpoints").is_dir():
        choice = newest_good(source / "checkpoints", world)
        if choice.folder is not None:
            return choice.folder
        problem = "its checkpoints are damaged" if choice.damaged else "it has committed no checkpoint yet"
    else:
        problem = "" if _is_exported(source) else "it is no run, no checkpoint and no folder that `megamm export` wrote"
    if problem:
        error = ConfigError(f"{source} is nothing to start from: {problem}")
        error.on_all_ranks = True
        raise error
    return source


def _is_exported(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") == MegaMMConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False


def _check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    is_checkpoint = (folder / MANIFEST).is_file()
    theirs = read_manifest(folder).fingerprints.get("tokenizer") if is_checkpoint else TextTokenizer.load(folder).fingerprint
    if theirs != tokenizer.fingerprint:
        fix = folder.parents[1] / "tokenizer" if is_checkpoint else folder
        raise ConfigError(
            f"{folder} was trained with tokenizer {theirs}, the recipe has {tokenizer.fingerprint}; set tokenizer.folder to {fix}"
        )


def _check_model(folder: Path, recipe: Recipe, tokenizer: TextTokenizer) -> None:
    """Compare what shapes of weights do not show: heads, rotations, activations, how media become inputs."""
    if (folder / MANIFEST).is_file():
        archived = _archived(folder)
        if archived is None:
            return
        theirs = run_config(archived, tokenizer.vocabulary)
    else:
        theirs = MegaMMConfig.from_pretrained(folder)
    found = differences(theirs.to_dict(), run_config(recipe, tokenizer.vocabulary).to_dict())
    changed = [key for key in found if not any(word in _MAY_DIFFER or word.startswith("_") for word in key.split("."))]
    ours, given = (config.adapter or {} for config in (run_config(recipe, tokenizer.vocabulary), theirs))
    if ours and (other := sorted(key for key in given if key != "dropout" and given[key] != ours.get(key))):
        raise ConfigError(
            f"{folder} holds an adapter with another {other[0]} than the recipe's; take its [adapter], "
            "or start from `megamm export RUN --merge`"
        )
    if changed:
        raise ConfigError(
            f"{folder} is of another model than the recipe's: {', '.join(changed[:4])}{' …' if len(changed) > 4 else ''} differ; "
            "take the [model] of its recipe"
        )


def _replaced_towers(folder: Path, recipe: Recipe) -> tuple[str, ...]:
    """Towers that start from folders of their own: those that the recipe names another folder for than the recipe behind `folder` did.

    What that one named as well is where the tower began, and it was trained since then.
    """
    named = {name: path for name, path in pretrained_folders(recipe.model).items() if not _is_same_folder(path, folder)}
    if not named:
        return ()
    name, path = next(iter(named.items()))
    archived = _archived(folder)
    if archived is None:
        is_checkpoint = (folder / MANIFEST).is_file()
        fix = (
            "start from where it lay in its run"
            if is_checkpoint
            else f"set that to {folder} to go on with its tower, or start from its run"
        )
        raise ConfigError(f"{folder} does not say whether its {name} tower began as model.{name}.pretrained={str(path)!r} does; {fix}")
    before = pretrained_folders(archived.model)
    replaced = tuple(name for name, path in named.items() if name not in before or not _is_same_folder(path, before[name]))
    if replaced and recipe.adapter.freezes_base:
        name = replaced[0]
        raise ConfigError(
            f"model.{name}.pretrained={str(named[name])!r} is not the {name} tower of {folder}, and a run that trains an adapter alone "
            "keeps none of its own; leave it out, or set adapter.train_base=true"
        )
    for name in replaced:
        _log.warning("the %s tower starts from %s, all else from %s", name, named[name], folder)
    return replaced


def _is_same_folder(one: Path, other: Path) -> bool:
    return one == other or one.resolve() == other.resolve()


def _archived(folder: Path) -> Recipe | None:
    """The recipe that trained a checkpoint; None for an exported folder, and for a checkpoint that was copied out of its run."""
    path = folder.resolve()
    config = path.parents[1] / "config.json"
    is_in_run = (path / MANIFEST).is_file() and path.parent.name == "checkpoints" and config.is_file()
    return load_resolved(config) if is_in_run else None


def _is_added(name: str) -> bool:
    """Whether a parameter is none of the towers' and projectors', which every model has."""
    return is_adapter(name) or _is_head(name)


def _is_head(name: str) -> bool:
    return name.startswith(PREFIX)


def _is_same_head(model: nn.Module, shapes: Mapping[str, Sequence[int]], folder: Path) -> bool:
    """Whether a model goes on with the head of what it starts from: one that answers something else would only be in its way."""
    head, theirs = getattr(model, "head", None), _head_shapes(shapes)
    if head is None or not theirs:
        return False
    own = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in model.named_parameters()}
    archived = _archived(folder)
    before = None if archived is None else archived.model.head
    other = [name for name in _NOT_SHAPES if before is not None and getattr(before, name) != getattr(head.settings, name)]
    if theirs != _head_shapes(own):
        other.append("form")
    if other:
        _log.warning("the head of %s has another %s than the recipe's, which begins anew", folder, other[0])
    return not other


def _head_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items() if _is_head(name)}


def _names(model: nn.Module) -> Iterator[str]:
    """Parameters, tied ones once, and persistent buffers."""
    yield from (name for name, _ in model.named_parameters())
    stored = model.state_dict().keys()
    yield from (name for name, _ in model.named_buffers() if name in stored)
