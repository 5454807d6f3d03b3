"""Random chains of world sizes: at every hop the same samples and the same state as a run that was never stopped.

A chain is a pure function of its number, so that a lost one can be run again. Training is integer arithmetic on what was
delivered: every element of the state depends on its place and on all samples before it, and on nothing else.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import State, in_memory, problem_with, save_alone, state_at
from megamm.checkpoint.load import Slices
from megamm.checkpoint.manifest import read_data_state, read_ledger, verify
from megamm.checkpoint.reshard import reshard
from megamm.checkpoint.slicing import slice_bounds
from megamm.config import Data, Tokenizer
from megamm.core.env import num_cores
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.data.samples.lengths import ensure_lengths
from megamm.engine.distributed import World
from megamm.tokenizers.text import TextTokenizer, train
from tests.data.conftest import MODEL, build_corpus
from tests.support.chains import Chain, Leg, key_of, read_by_ranks, restarted
from tests.support.read_chains import draw_read_legs, open_rotten, read_steps, read_unbroken, rotten_copy

Tensors: TypeAlias = Mapping[str, torch.Tensor]
_FACTORS = {"weight": 3, "exp_avg": 5, "exp_avg_sq": 7}
_NUM_ELEMENTS = {key: tensor.numel() for key, tensor in state_at(0).tensors.items()}
# All numbers stay whole in float32.
_MODULUS = 65521
_PLANNED: dict[Size, int] = {"quick": 12, "normal": 1000, "full": 10_000}
_READ: dict[Size, int] = {"quick": 1, "normal": 20, "full": 200}


@dataclass(frozen=True)
class Step:
    """What a step gave: planned and delivered samples in order, what was skipped of them, and where the plan stands after it."""

    planned: list[str]
    delivered: list[str]
    skipped: list[dict[str, Any]]
    after: LoaderState


@dataclass(frozen=True)
class Stretch:
    """A leg of a chain and what runs it, from the data state of the checkpoint before it (None at the beginning)."""

    leg: Leg
    steps: Callable[[str | None], list[Step]]


def planned_chains(size: Size, folder: Path) -> Tally:
    """Plans alone, over drawn datasets, with weights that change, excluded and corrupt samples; ranks share out every row."""
    tokenizer = _tokenizer(folder)

    def judge(world: World) -> list[str]:
        return [_planned_problem(number, tokenizer) for number in range(world.rank, _PLANNED[size], world.size)]

    return Tally.of(
        judged(judge, num_cores()), "mixing, packing, exclusions, corrupt samples; 1 to 5 ranks a leg, one hop in four through a re-shard"
    )


def read_chains(size: Size, folder: Path) -> Tally:
    """Real loaders over real shards of which some bytes have rotted."""
    tokenizer = _tokenizer(folder)
    build_corpus(folder / "corpus")
    ensure_lengths(sorted((folder / "corpus").glob("*/*.tar")), tokenizer, MediaRules.of(MODEL, Data()))
    root = rotten_copy(folder / "corpus", folder / "rotten")
    unbroken = [_step_of(*step) for step in read_unbroken(root, tokenizer)]

    def read(saved: str | None, leg: Leg, changes: dict[str, Any]) -> list[Step]:
        plan = open_rotten(root, tokenizer, leg.batch, **changes)
        return [_step_of(*step) for step in read_steps(plan, restarted(plan, saved, leg), leg)]

    problems = []
    for number in range(_READ[size]):
        legs = draw_read_legs(number)
        stretches = [Stretch(leg, lambda saved, leg=leg, changes=changes: read(saved, leg, changes)) for leg, changes in legs]
        problems.append(_problem_of(stretches, unbroken, number))
    return Tally.of(problems, f"{len(unbroken)} steps each, of pictures, sounds and text")


def _planned_problem(number: int, tokenizer: TextTokenizer) -> str:
    chain = Chain.draw(number)
    stretches = [Stretch(leg, lambda saved, leg=leg: _planned(chain, tokenizer, saved, leg)) for leg in chain.legs]
    return _problem_of(stretches, _planned_unbroken(chain, tokenizer), number)


def _planned(chain: Chain, tokenizer: TextTokenizer, saved: str | None, leg: Leg) -> list[Step]:
    """A leg of a plan that is opened anew, its rows shared out to the leg's ranks."""
    plan = chain.plan(tokenizer)
    state = restarted(plan, saved, leg)
    steps = []
    for _ in range(leg.num_steps):
        planned = plan.next_step(state)
        read = read_by_ranks(planned.rows, leg)
        assert Counter(read) == Counter(sample for row in planned.rows for sample in row.samples), "ranks read other samples"
        step, state = _delivered(plan, chain, state)
        steps.append(step)
    return steps


def _planned_unbroken(chain: Chain, tokenizer: TextTokenizer) -> list[Step]:
    """The run that was stopped only to exclude samples."""
    plan = chain.plan(tokenizer)
    state, steps = plan.start(), []
    for leg in chain.legs:
        state = state.excluding(leg.excluded) if leg.excluded else state
        for _ in range(leg.num_steps):
            step, state = _delivered(plan, chain, state)
            steps.append(step)
    return steps


def _delivered(plan: DataPlan, chain: Chain, state: LoaderState) -> tuple[Step, LoaderState]:
    step = plan.next_step(state)
    bad = chain.corrupt | {key for exclusion in state.exclusions for key in exclusion.keys}
    planned = [key_of(sample) for row in step.rows for sample in row.samples]
    skipped = [key for key in planned if key in bad] + [key_of(sample) for sample in step.unfit]
    return Step(planned, sorted(key for key in planned if key not in bad), [{"key": key} for key in skipped], step.state), step.state


def _step_of(planned: list[str], delivered: list[str], skipped: list[tuple[int, str, str]], after: LoaderState) -> Step:
    entries = [{"position": position, "key": key, "reason": reason} for position, key, reason in skipped]
    return Step(planned, delivered, entries, after)


def _problem_of(stretches: Sequence[Stretch], unbroken: Sequence[Step], number: int) -> str:
    """What is wrong with a chain, empty for nothing."""
    with in_memory() as folder:
        try:
            problem = _run(stretches, unbroken, folder, random.Random(number))
        except AssertionError as error:
            problem = f"{error or 'ranks disagree'}"
    return problem and f"chain {number}: {problem}"


def _run(stretches: Sequence[Stretch], unbroken: Sequence[Step], folder: Path, rng: random.Random) -> str:
    whole: Tensors = {key: torch.zeros_like(tensor) for key, tensor in state_at(0).tensors.items()}
    saved: Path | None = None
    done = 0
    for stretch, following in itertools.zip_longest(stretches, stretches[1:]):
        num_ranks = stretch.leg.world_size
        ranks, ledger = _resume(saved, whole, num_ranks)
        expected_steps = unbroken[done : done + stretch.leg.num_steps]
        steps = stretch.steps(None if saved is None else json.dumps(read_data_state(saved)))
        if steps != expected_steps:
            return f"steps {done + 1} to {done + len(expected_steps)} on {num_ranks} ranks are not those of the unbroken run"
        for step in steps:
            ranks = [_updated(own, step.delivered, rank, num_ranks) for rank, own in enumerate(ranks)]
            ledger += step.skipped
        for step in expected_steps:
            whole = _updated(whole, step.delivered, 0, 1)
        done += len(steps)
        joined = {key: torch.cat([own[key] for own in ranks if key in own]) for key in whole}
        saved = save_alone(folder / "run", State(done, joined, steps[-1].after.to_json(), ledger), num_ranks)
        if rng.random() < 0.25:
            saved = reshard(saved, folder / f"resharded-{done}" / "checkpoints", rng.randint(1, 5))
        truth = State(done, whole, unbroken[done - 1].after.to_json(), [entry for step in unbroken[:done] for entry in step.skipped])
        if problem := problem_with(saved, truth, num_ranks=num_ranks if following is None else following.leg.world_size):
            return problem
    return "" if done == len(unbroken) else f"it ended after {done} of {len(unbroken)} steps"


def _resume(saved: Path | None, zeros: Tensors, num_ranks: int) -> tuple[list[Tensors], list[dict[str, Any]]]:
    """Every rank's slices, out of the checkpoint; buffers on rank 0."""

    def bounds(key: str, rank: int) -> tuple[int, int]:
        num_elements = zeros[key].numel()
        return (0, num_elements) if key.startswith("buffer/") else slice_bounds(num_elements, num_ranks, rank)

    keys = [[key for key in zeros if rank == 0 or not key.startswith("buffer/")] for rank in range(num_ranks)]
    if saved is None:
        return [{key: zeros[key][slice(*bounds(key, rank))] for key in keys[rank]} for rank in range(num_ranks)], []
    with Slices(saved, verify(saved)) as slices:
        return [{key: slices.read(key, *bounds(key, rank)) for key in keys[rank]} for rank in range(num_ranks)], read_ledger(saved)


def _updated(tensors: Tensors, delivered: Sequence[str], rank: int, num_ranks: int) -> Tensors:
    """One optimizer step on a rank's slices; what all ranks agree on is the sum over the samples of the global batch."""
    total = sum(xxhash.xxh32_intdigest(key.encode()) for key in delivered) % _MODULUS
    changed = {}
    for key, tensor in tensors.items():
        kind = key.partition("/")[0]
        if kind == "buffer":
            changed[key] = tensor + len(delivered)
            continue
        start = slice_bounds(_NUM_ELEMENTS[key], num_ranks, rank)[0]
        places = torch.arange(start, start + tensor.numel())
        changed[key] = (tensor * _FACTORS[kind] + places + total) % _MODULUS
    return changed


def _tokenizer(folder: Path) -> TextTokenizer:
    texts = [f"the {word} is number {number}" for number in range(100) for word in ("cat", "dog", "ship", "seven", "plain words")]
    return train(texts, Tokenizer(text_size=320, location_bins=0), folder / "tokenizer")


DRILLS = (
    Drill("chains of world sizes, planned", planned_chains),
    Drill("chains of world sizes, read from rotten shards", read_chains),
)
