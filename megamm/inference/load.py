"""A trained model and what its inputs need, from a run folder, one of its checkpoints or an exported Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from megamm.checkpoint.consolidate import consolidate
from megamm.checkpoint.manifest import MANIFEST, committed, read_manifest, verify
from megamm.config import AudioFeatures, Head, ImageFeatures, Recipe, load_resolved
from megamm.core.errors import CheckpointError, ConfigError
from megamm.core.files import read_json
from megamm.core.logging import get_logger
from megamm.data.media.features import MediaRules
from megamm.models.build import config_from_recipe
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.saved import PREFIX, filled_head, read_head
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.tokenizers.text import TextTokenizer
from megamm.tokenizers.vocabulary import CONTROL_NAMES, Vocabulary

_log = get_logger("inference")
CHECKPOINTS = "checkpoints"
_FIX = "name a run folder, one of its checkpoints or a folder that `megamm export` wrote"

TRAINED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What the training forward computes in, by `engine.precision`."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        model: In evaluation mode, on its device; with its head where it was trained with one.
        tokenizer: The run's.
        media: How pictures and sounds become tower inputs, and what is refused.
        recipe: What trained it; None for an exported folder.
        step: Optimizer steps of the checkpoint; None for an exported folder.
        source: The checkpoint folder or the exported folder that the weights come from.
    """

    model: MegaMMForConditionalGeneration
    tokenizer: TextTokenizer
    media: MediaRules
    recipe: Recipe | None
    step: int | None
    source: Path

    @property
    def config(self) -> MegaMMConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device


def load_model(source: Path, *, dtype: torch.dtype | None = None, device: str | None = None) -> Loaded:
    """Load the newest good checkpoint of a run, one checkpoint that is named, or an exported folder.

    Args:
        source: Folder that `megamm pretrain` or `megamm export` wrote, or a checkpoint in its run.
        dtype: Type of the weights; None takes what the training forward, or the export, computes in.
        device: Where the model goes; None takes the GPU where there is one.

    Raises:
        ConfigError: `source` is none of them, or its tokenizer or configuration is missing or damaged.
        CheckpointError: No checkpoint verifies, or not the one that is named, or it holds another model.
    """
    loaded = _from_described(source, dtype) if (source / "config.json").is_file() else _from_checkpoint(source, dtype)
    loaded.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run whose every byte verifies; damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: The run has none.
    """
    folder = run / CHECKPOINTS
    problems = []
    for _, path in reversed(committed(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("passed over: %s", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise CheckpointError(f"{folder} holds no good checkpoint; the newest: {problems[0]}")
    raise CheckpointError(f"{folder} holds no checkpoint; train the run until its first commit (checkpoint.every)")


def is_checkpoint(source: Path) -> bool:
    """Whether a folder is a checkpoint, or should be one by its place, whatever became of it."""
    is_other = (source / "config.json").is_file()
    return not is_other and ((source / MANIFEST).is_file() or source.resolve().parent.name == CHECKPOINTS)


def run_config(recipe: Recipe, vocabulary: Vocabulary) -> MegaMMConfig:
    """Configuration of the model that a recipe trains over a vocabulary."""
    ids = {name: vocabulary.control_id(name) for name in CONTROL_NAMES}
    return config_from_recipe(recipe.model, vocab_size=vocabulary.size, control_ids=ids, adapter=recipe.adapter)


def checkpoint_state(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint in `dtype`, and its persistent buffers as they are.

    In memory are the whole model in `dtype` and one tensor in float32.
    """
    buffers = {entry.name for entry in read_manifest(checkpoint).parameters if entry.kind == "buffer"}
    # A copy, so that no tensor is a view of a file that a later retention removes.
    return {name: tensor.clone() if name in buffers else tensor.to(dtype, copy=True) for name, tensor in consolidate(checkpoint)}


def _from_described(source: Path, dtype: torch.dtype | None) -> Loaded:
    """From a folder whose config.json says what it is: a run or an exported folder."""
    path = source / "config.json"
    try:
        table = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); {_FIX}") from None
    if not isinstance(table, dict) or "model_type" not in table:
        return _from_run(source, dtype)
    if table["model_type"] != MegaMMConfig.model_type:
        raise ConfigError(
            f"{path} is a {table['model_type']!r} model, not {MegaMMConfig.model_type!r}; name a folder that `megamm export` wrote"
        )
    return _from_export(source, dtype)


def _from_checkpoint(source: Path, dtype: torch.dtype | None) -> Loaded:
    """Once its every byte verified: what is named is not passed over."""
    if not is_checkpoint(source):
        raise ConfigError(f"{source} has no config.json; {_FIX}")
    # Also of `latest`, which leads to one.
    checkpoint = source.resolve()
    run = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (run / "config.json").is_file():
        raise ConfigError(f"{source} lies outside its run, which holds the recipe and the tokenizer; put it back into RUN/{CHECKPOINTS}")
    verify(checkpoint)
    return _from_run(run, dtype, checkpoint)


def _from_run(run: Path, dtype: torch.dtype | None, checkpoint: Path | None = None) -> Loaded:
    """From one checkpoint, or from the newest good one."""
    recipe = load_resolved(run / "config.json")
    tokenizer = TextTokenizer.load(run / "tokenizer")
    checkpoint = newest_checkpoint(run) if checkpoint is None else checkpoint
    dtype = TRAINED_DTYPES[recipe.engine.precision] if dtype is None else dtype
    config, state = run_config(recipe, tokenizer.vocabulary), checkpoint_state(checkpoint, dtype)
    head = None
    if recipe.model.head is not None:
        own = {name.removeprefix(PREFIX): state.pop(name) for name in list(state) if name.startswith(PREFIX)}
        head = filled_head(recipe.model.head, config, own, dtype=dtype, where=checkpoint)
    model = _assemble(checkpoint, config, state_dict=state, dtype=dtype)
    model.head = head
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        media=MediaRules.of(recipe.model, recipe.data),
        recipe=recipe,
        step=read_manifest(checkpoint).step,
        source=checkpoint,
    )


def _from_export(folder: Path, dtype: torch.dtype | None) -> Loaded:
    try:
        config = MegaMMConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} is not a usable configuration ({error}); export the run again") from None
    tokenizer = TextTokenizer.load(folder)
    try:
        # Our own classes, so that no code of the folder runs.
        model = _assemble(folder, config, path=folder, dtype="auto" if dtype is None else dtype)
        model.head = read_head(folder, config, dtype)
    except OSError as error:
        raise CheckpointError(f"{folder} lacks its weights ({error}); export the run again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder} holds damaged weights ({error}); export the run again") from None
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        media=_media_rules(config, None if model.head is None else model.head.settings),
        recipe=None,
        step=None,
        source=folder,
    )


def _media_rules(config: MegaMMConfig, head: Head | None) -> MediaRules:
    image = {name: tuple(value) if isinstance(value, list) else value for name, value in config.image_features.items()}
    return MediaRules(
        image=None if config.vision_config is None else ImageFeatures(**image),
        audio=None if config.audio_config is None else AudioFeatures(**config.audio_features),
        head=head,
    )


def _assemble(source: Path, config: MegaMMConfig, *, path: Path | None = None, **arguments: Any) -> MegaMMForConditionalGeneration:
    """Build the model on no device, hand it its weights, and insist that every name fits.

    Through transformers, because only its loader makes what is computed and not stored (rotary frequencies, sinusoids).
    """
    with no_progress_bar():
        # Shapes that differ are then named in `info` like names that differ, instead of raising in words of transformers.
        model, info = MegaMMForConditionalGeneration.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        name, keys = next(iter(problems.items()))
        raise CheckpointError(
            f"{source} does not hold the model that its config.json describes: {name.replace('_', ' ')} {', '.join(keys[:3])}"
            f"{' …' if len(keys) > 3 else ''}; use the config.json that was written with it"
        )
    return model.eval()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing bars of its own on standard error."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
