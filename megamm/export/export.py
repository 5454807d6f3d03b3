"""A run becomes a Hugging Face folder that loads where megamm is not installed, with the proof that it is the same model."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, GenerationConfig

from megamm.core.errors import ExportError
from megamm.core.files import read_json, sync_folder, write_json, write_text
from megamm.core.logging import get_logger
from megamm.export.card import model_card
from megamm.export.merge import merged
from megamm.export.modelling_code import AUTO_MAP, copy_modelling_code
from megamm.export.parity import Expected, expected, prove, rounding
from megamm.export.peft_folder import write_peft_folder
from megamm.export.views import check_views, export_views
from megamm.inference.generate import stop_ids
from megamm.inference.load import Loaded, load_model, no_progress_bar
from megamm.models.build import num_parameters
from megamm.models.heads.saved import PREFIX, save_head
from megamm.models.processing_megamm import MegaMMProcessor

_log = get_logger("export")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(
    run: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "4GB",
    views: Sequence[str] = (),
    parity: bool = True,
    merge: bool = False,
) -> Path:
    """Write the newest good checkpoint of a run, or the one that is named, as a Hugging Face folder.

    The folder appears whole or not at all: it is written beside `output`, proven, and renamed.

    Args:
        run: Folder that `megamm pretrain` wrote, or one of its checkpoints.
        output: New or empty folder.
        dtype: Type of the exported weights: `bfloat16`, `float16` or `float32`. Training computes in a cast of its float32
            master weights, so the training precision loses nothing that training computed with.
        max_shard_size: Bound on a weight file: a number with KB, MB, GB or TB, such as `4GB`.
        views: Stock views to write as well, into `views/NAME` (see `models.views`); each repeats its part of the weights.
        parity: Prove the folder in a fresh process and write `parity.json`.
        merge: Make an adapter's changes of low rank part of the weights that they change, which is proven as well; else an adapter of
            whatever kind stays beside them in the folder.

    Returns:
        `output`.

    Raises:
        ConfigError: `run` is not a run folder.
        CheckpointError: The run has no good checkpoint.
        ExportError: `output` is not empty or cannot be written, `dtype`, `max_shard_size` or a view is unknown, there is nothing to
            merge, or the folder does not answer as the trained model does.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype} cannot be exported; use one of {', '.join(DTYPES)}")
    if not _is_size(max_shard_size):
        raise ExportError(f"max_shard_size={max_shard_size} is no size of a file; write a number with KB, MB, GB or TB, such as 4GB")
    refuse_used_folder(output)
    loaded = _load_run(run, torch.float32 if merge else DTYPES[dtype])
    merging = {}
    if merge:
        loaded, merging["merge"] = merged(loaded, DTYPES[dtype])
    check_views(loaded, views)
    with _whole_folder(output) as folder:
        write_folder(loaded, folder, max_shard_size=max_shard_size)
        references = expected(loaded) if parity or views else []
        export_views(loaded, folder, views, references=references, max_shard_size=max_shard_size)
        if parity:
            # A run that still trains may have a newer one by then.
            source, facts = loaded.source, {"checkpoint": loaded.source.name, "step": loaded.step, **merging}
            num_elements = sum(parameter.numel() for parameter in loaded.model.parameters())
            # The fresh process holds the model once more.
            del loaded
            gc.collect()
            report = prove(folder, references, facts | {"rounding": _rounding(source, references, dtype, num_elements)})
            _log.info("exported logits equal the checkpoint's: %s", {row["probe"]: row["max_logit_difference"] for row in report["probes"]})
    return output


def export_peft(run: Path, output: Path) -> Path:
    """Write the changes of low rank of a run's newest good checkpoint as a folder of the peft library, proven with peft itself.

    Args:
        run: Folder that `megamm finetune` wrote, or one of its checkpoints.
        output: New or empty folder; peft loads it onto the exported base.

    Returns:
        `output`.

    Raises:
        ConfigError: `run` is not a run folder.
        CheckpointError: The run has no good checkpoint.
        ExportError: `output` is not empty or cannot be written, the run's adapter is none that peft has so, or peft answers differently.
    """
    refuse_used_folder(output)
    loaded = _load_run(run, torch.float32)
    with _whole_folder(output) as folder:
        write_peft_folder(loaded, folder)
    return output


def _load_run(run: Path, dtype: torch.dtype) -> Loaded:
    loaded = load_model(run, dtype=dtype, device="cpu")
    if loaded.recipe is None:
        raise ExportError(f"{run} is an exported folder already; name the run folder that it came from")
    return loaded


def refuse_used_folder(output: Path) -> None:
    """Refuse an output that would overwrite something.

    Raises:
        ExportError: `output` is a file or a folder with something in it, or cannot be looked into.
    """
    with _naming(output):
        used = os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))
    if used:
        raise ExportError(f"{output} is not an empty folder; name a new one, or remove what is there")


def write_folder(loaded: Loaded, folder: Path, *, max_shard_size: str) -> None:
    """Write weights, configuration, tokenizer, processor, modelling code and model card into an existing folder."""
    # Never a raw dump: transformers stores tied weights once and in the layout that its loaders read.
    head, core = loaded.model.head, None
    if head is not None:
        # Beside the core, which loads and answers in tokens without it.
        save_head(head, folder)
        core = {name: value for name, value in loaded.model.state_dict().items() if not name.startswith(PREFIX)}
    with no_progress_bar():
        loaded.model.save_pretrained(folder, state_dict=core, max_shard_size=max_shard_size)
    ids = {"bos_token_id": loaded.config.bos_token_id, "eos_token_id": list(stop_ids(loaded)), "pad_token_id": loaded.config.pad_token_id}
    GenerationConfig(**ids).save_pretrained(folder)
    assert loaded.recipe is not None, "only a run is exported"
    archived = loaded.source.parents[1] / "tokenizer"
    MegaMMProcessor.from_config(loaded.config, AutoTokenizer.from_pretrained(archived)).save_pretrained(folder)
    # Over what the processor wrote, which is equal but for its formatting: the tokenizer keeps its fingerprint.
    for path in sorted(archived.iterdir()):
        shutil.copyfile(path, folder / path.name)
    copy_modelling_code(folder)
    for name in ("config.json", "processor_config.json"):
        _add_auto_map(folder / name)
    write_text(folder / "README.md", model_card(loaded, num_parameters(loaded.config)))


def _is_size(text: str) -> bool:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", text.strip(), re.IGNORECASE)
    return found is not None and float(found[1]) > 0


def _add_auto_map(path: Path) -> None:
    table: dict[str, Any] = read_json(path)
    write_json(path, table | {"auto_map": AUTO_MAP})


def _rounding(source: Path, references: list[Expected], dtype: str, num_elements: int) -> dict[str, Any] | str:
    """How far the exported type is from the float32 master weights; information, not a condition."""
    if dtype == "float32":
        return "none: float32 is the type of the master weights"
    # Loading holds a second copy for a moment.
    if 8 * num_elements > psutil.virtual_memory().available:
        return "not measured: the float32 model does not fit into memory"
    return rounding(load_model(source, dtype=torch.float32, device="cpu"), references)


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A temporary neighbour of `output` that takes its name on success and is removed on an error."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _naming(output):
        temporary.mkdir(parents=True)
    try:
        with _naming(output):
            yield temporary
            _sync(temporary)
        # Replaces an empty folder; fails, as it should, when something was put there meanwhile.
        try:
            temporary.rename(output)
        except OSError as error:
            raise ExportError(f"{output} cannot take its place ({error.strerror}); name a new folder") from None
        sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line that names `output`."""
    try:
        yield
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExportError(f"{output} cannot be written: {reason}; name a folder that you may write, with room for the model") from error


def _sync(folder: Path) -> None:
    usual = next(folder.glob("*.json"))
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors makes files that only their owner may read.
            shutil.copymode(usual, path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
