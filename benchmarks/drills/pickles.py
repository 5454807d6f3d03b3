"""Code in a checkpoint: pickles under every name and in every field, which nothing may ever run."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import problem_with, save_alone, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.consolidate import consolidate
from megamm.checkpoint.manifest import DATA_STATE, LEDGER, MANIFEST, FileFacts, Manifest, rank_file, read_manifest
from megamm.checkpoint.operators import describe, entries
from megamm.checkpoint.reshard import reshard
from megamm.core.errors import CheckpointError
from megamm.core.files import digest_file
from megamm.engine.distributed import World

NUM_RANKS = 2
NAMES = (rank_file(0), rank_file(1), DATA_STATE, LEDGER, MANIFEST)
# What other programs would look for, and load.
EXTRAS = (
    "latest", "rank_00002.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "random_states_0.pkl", "scheduler.pt", "training_args.bin", "data.pkl", "__init__.py", "sitecustomize.py", "model.npy",
)  # fmt: skip


class Trap:
    """Its unpickling touches a file."""

    def __init__(self, canary: Path):
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._canary}'",)


def traps(canary: Path, folder: Path) -> dict[str, bytes]:
    """Pickles as they come: bare in the oldest and the newest protocol, in torch's archive, and as a module's source."""
    torch.save(Trap(canary), folder / "trap.pt")
    torch.save(Trap(canary), folder / "old.pt", _use_new_zipfile_serialization=False)
    source = f"import os; os.system(\"touch '{canary}'\")\n".encode()
    bare = {f"protocol {protocol}": pickle.dumps(Trap(canary), protocol) for protocol in (0, pickle.HIGHEST_PROTOCOL)}
    return {**bare, "torch.save": (folder / "trap.pt").read_bytes(), "old torch.save": (folder / "old.pt").read_bytes(), "source": source}


def plant(size: Size, folder: Path) -> Tally:
    """Plant each trap in each place, use the checkpoint in every way there is, and see whether the canary was touched."""
    canary = folder / "canary"
    found = traps(canary, folder)
    if size == "quick":
        found = {name: found[name] for name in ("protocol 0", "torch.save")}
    for name, trap in found.items():
        if not _works(trap, name, canary, folder):
            return Tally.of([f"the trap {name!r} does not work, so it proves nothing"])
    run = folder / "run"
    save_alone(run, state_at(10), NUM_RANKS)
    newest = save_alone(run, state_at(20), NUM_RANKS)
    whole = Path(shutil.copytree(newest, folder / "whole"))

    def judge(world: World) -> list[str]:
        problems = []
        for name, trap in found.items():
            for place, put, is_damage in _places(trap):
                put(newest)
                problem = _use(run, newest, world, is_damage)
                if canary.exists():
                    problem = "it was run"
                    canary.unlink()
                problems.append(problem and f"{name} {place}: {problem}")
                shutil.rmtree(newest)
                shutil.copytree(whole, newest)
        return problems

    return Tally.of(judged(judge), f"{', '.join(found)}; each touches a file where it is loaded")


def _works(trap: bytes, name: str, canary: Path, folder: Path) -> bool:
    """Whether what would load this kind of file runs it."""
    path = folder / "trap"
    path.write_bytes(trap)
    if name == "source":
        exec(compile(trap, "trap", "exec"), {})
    else:
        torch.load(path, weights_only=False) if "torch" in name else pickle.loads(trap)
    worked = canary.exists()
    canary.unlink(missing_ok=True)
    return worked


def _places(trap: bytes) -> Iterator[tuple[str, Callable[[Path], None], bool]]:
    """(where, what puts it there, whether the checkpoint is damaged by it and the older one has to be taken)."""
    text = base64.b64encode(trap).decode()
    for name in NAMES:
        yield f"in place of {name}", lambda folder, name=name: _write(folder / name, trap), True
        yield f"behind {name}", lambda folder, name=name: _write(folder / name, (folder / name).read_bytes() + trap), True
    for name in EXTRAS:
        yield f"as {name}", lambda folder, name=name: _write(folder / name, trap), False
    # By somebody who can also write a manifest: digests prove integrity, not origin.
    for name in NAMES[:-1]:
        yield f"in place of {name}, with a manifest of it", lambda folder, name=name: _sealed(folder, {name: trap}), False
    yield "in the metadata of a shard", lambda folder: _sealed(folder, {NAMES[0]: _with_metadata(folder / NAMES[0], text)}), False
    yield "as a header", lambda folder: _sealed(folder, {NAMES[0]: len(trap).to_bytes(8, "little") + trap}), False
    yield "in every field of the manifest", lambda folder: _sealed(folder, {}, text), False
    yield "as data state", lambda folder: _sealed(folder, {DATA_STATE: json.dumps({"py/reduce": text}).encode()}), False


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sealed(folder: Path, files: Mapping[str, bytes], text: str = "") -> None:
    """Replace files and write a manifest that says that they are right; `text` goes wherever a manifest holds free words."""
    manifest = read_manifest(folder)
    for name, content in files.items():
        _write(folder / name, content)
    facts = {name: FileFacts((folder / name).stat().st_size, digest_file(folder / name)) for name in manifest.files}
    changed: Manifest = replace(manifest, files=facts)
    if text:
        words = {"model": text, "__reduce__": text}
        changed = replace(changed, engine={"loss_scaler": text}, fingerprints=words, software=words)
    (folder / MANIFEST).write_text(changed.to_text())


def _with_metadata(path: Path, text: str) -> bytes:
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:size]) | {"__metadata__": {"format": "pickle", "code": text}}).encode()
    return len(header).to_bytes(8, "little") + header + content[size:]


def _use(run: Path, newest: Path, world: World, is_damage: bool) -> str:
    """Everything that reads a checkpoint; only one clear refusal may come of it."""
    choice = newest_good(run / "checkpoints", world)
    expected = "step_00000010" if is_damage else newest.name
    if choice.folder is None or choice.folder.name != expected:
        return f"{choice.folder} was chosen, not {expected}: {choice.damaged}"
    target = run.with_name("target")
    for use in (
        lambda: problem_with(newest, state_at(20)),
        lambda: list(consolidate(newest)),
        lambda: describe(newest),
        lambda: entries(run / "checkpoints", verified=True),
        lambda: reshard(newest, target / "checkpoints", 3),
    ):
        try:
            use()
        except CheckpointError:
            continue
        except (SafetensorError, ValueError, KeyError) as error:
            return f"no clear refusal: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(target, ignore_errors=True)
    return ""


DRILLS = (Drill("pickles in a checkpoint", plant),)
