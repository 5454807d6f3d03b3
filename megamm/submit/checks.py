"""What is looked at before a job goes into the queue, where a mistake would cost hours of waiting."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from megamm.checkpoint.manifest import MANIFEST
from megamm.core.errors import MegaMMError
from megamm.data.planning.deal import resolve_accumulation
from megamm.status.facts import is_run
from megamm.status.run_status import RunStatus, read_status
from megamm.status.units import several
from megamm.submit.data import check_data, check_shards
from megamm.submit.finding import Finding, good, note, problem
from megamm.submit.job import SCRIPTS, Plan
from megamm.submit.script import directive_problems, syntax_problems
from megamm.submit.space import check_space, existing
from megamm.train.run_folder import RunFolder

Check = Callable[[Plan], Iterator[Finding]]
_SBATCH_SECONDS = 60.0
_IN_USE = ("running", "starting", "stalled", "queued")


def check(plan: Plan) -> Iterator[tuple[str, Finding]]:
    """Run all checks of a script, and tell each finding under the name of its check."""
    for name in SCRIPTS[plan.request.command].checks:
        for finding in findings(CHECKS[name], plan):
            yield name, finding


def findings(one: Check, plan: Plan) -> Iterator[Finding]:
    """What one check finds; where it fails itself that is a problem, and the others still have their say."""
    try:
        yield from one(plan)
    except MegaMMError as error:
        yield problem(str(error))
    except OSError as error:
        yield problem(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _check_scripts(plan: Plan) -> Iterator[Finding]:
    scripts = sorted([*plan.home.glob("slurm/*.sh"), *plan.home.glob("launchers/*.sh")])
    problems = [*syntax_problems(scripts), *directive_problems(plan.script)]
    yield from map(problem, problems)
    if not problems:
        yield good(f"bash reads all {len(scripts)}; sbatch sees every directive of {plan.script.name}")


def _check_ranks(plan: Plan) -> Iterator[Finding]:
    assert plan.recipe is not None, "ranks are counted for a recipe"
    options, batch = plan.options, plan.recipe.batch
    gpus, tasks = options.num_gpus_a_node, options.num_tasks_a_node
    if gpus and gpus != tasks:
        yield problem(f"{tasks} tasks on {gpus} GPUs a node: a task is a rank and takes one GPU; give both the same number")
        return
    # Of a range Slurm picks any number of nodes: each has to work, the ends are told.
    accumulations = {world_size: resolve_accumulation(batch, world_size) for world_size in plan.world_sizes}
    for world_size in dict.fromkeys((min(accumulations), max(accumulations))):
        num_empty = world_size * accumulations[world_size] * batch.micro_rows - batch.global_rows
        empty = f", {num_empty} of them empty" if num_empty else ""
        micro_steps = f"{several(accumulations[world_size], 'micro-step')} × {several(batch.micro_rows, 'row')} a rank{empty}"
        ranks = f"{several(world_size // tasks, 'node')} × {tasks} = {several(world_size, 'rank')}"
        yield good(f"{ranks}; {several(batch.global_rows, 'row')} a step in {micro_steps}")


def _check_run(plan: Plan) -> Iterator[Finding]:
    (recipe, run), request = plan.trained, plan.request
    if not os.access(existing(run), os.W_OK):
        yield problem(f"{existing(run)} cannot be written to; name another --run")
    RunFolder(run).check(recipe, resume=request.resume, data_may_change=request.data_may_change)
    if (run / "STOP").exists():
        yield problem(f"{run / 'STOP'} is there, and would end the job after its first step; remove it")
    if not is_run(run):
        yield good(f"{run} is new")
        return
    (status,) = read_status([run])
    yield _fit_to_go_on(plan, run, status)


def _fit_to_go_on(plan: Plan, run: Path, status: RunStatus) -> Finding:
    state = f"{status.state} ({status.why})" if status.why else status.state
    if status.state == "done":
        return problem(f"{run} is done; name another --run")
    after = plan.options.get("dependency") or ""
    if status.state in _IN_USE and not any(number in after for number in status.facts.job_ids):
        waits = f", or wait for it: --sbatch=--dependency=afterany:{status.facts.job_ids[0]}" if status.facts.job_ids else ""
        return problem(f"{run} is {state}; name another --run{waits}")
    saved = status.facts.saved
    return good(f"{run} was {state} and goes on {f'from step {saved.step}' if saved else 'from the beginning'}")


def _check_parts(plan: Plan) -> Iterator[Finding]:
    """As slurm/prepare.sh takes its array: a part of the shards in each task."""
    array, parts = plan.options.get("array") or "", plan.options.environment.get("MEGAMM_PARTS")
    span = re.fullmatch(r"0(?:-(\d+))?(?:%\d+)?", array)
    if parts:
        yield good(f"tasks {array} of {parts} parts (MEGAMM_PARTS)")
    elif span:
        yield good(several(int(span[1] or 0) + 1, "part"))
    else:
        yield problem(f"--array={array} does not say how many parts there are; give 0-N, or set MEGAMM_PARTS")


def _check_model(plan: Plan) -> Iterator[Finding]:
    """What is evaluated or exported: a run with a checkpoint, one of its checkpoints, or an exported folder."""
    source = plan.run
    assert source is not None, f"{plan.request.command} names a model"
    if (
        plan.request.command == "evaluate"
        and (source / "model.safetensors.index.json").is_file() | (source / "model.safetensors").is_file()
    ):
        yield good(f"{source} is an exported folder")
        return
    if (source / MANIFEST).is_file() and is_run(source.parent.parent):
        yield good(f"{source} is a checkpoint of {source.parent.parent}")
        return
    if not is_run(source):
        yield problem(f"{source} is no run folder; name one that was trained")
        return
    (status,) = read_status([source])
    if status.facts.saved is None:
        yield problem(f"{source} has no checkpoint yet; it is {status.state}")
    elif status.state == "done":
        yield good(f"{source} is done, step {status.facts.saved.step}")
    else:
        yield note(
            f"{source} is {status.state}, its newest checkpoint is of step {status.facts.saved.step}: later ones may be there by then"
        )


def _check_output(plan: Plan) -> Iterator[Finding]:
    output = plan.request.output
    assert output is not None, f"{plan.request.command} names its output"
    output = output.absolute()
    if not os.access(existing(output), os.W_OK):
        yield problem(f"{existing(output)} cannot be written to; name another --output")
    elif plan.request.command == "export" and output.exists() and any(output.iterdir()):
        yield problem(f"{output} is in use; name a new --output")
    else:
        yield good(f"{output} {'goes on' if output.exists() else 'is new'}")


def _check_sbatch(plan: Plan) -> Iterator[Finding]:
    command = plan.command(plan.home, plan.request.recipe, test=True)
    environment = {**os.environ, **plan.environment(plan.home)}
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_SBATCH_SECONDS)
    except FileNotFoundError:
        yield problem("sbatch is not on PATH; submit from a node of the cluster")
    except subprocess.TimeoutExpired:
        yield problem(f"sbatch did not answer within {_SBATCH_SECONDS:.0f} s; ask `scontrol ping` how the controller is")
    else:
        said = "; ".join(line.removeprefix("sbatch: ") for line in answer.stderr.splitlines() if line.strip())
        yield problem(f"sbatch would refuse it: {said}") if answer.returncode else good(said)


CHECKS: dict[str, Check] = {
    "scripts": _check_scripts,
    "ranks": _check_ranks,
    "run": _check_run,
    "data": check_data,
    "shards": check_shards,
    "parts": _check_parts,
    "model": _check_model,
    "output": _check_output,
    "space": check_space,
    "slurm": _check_sbatch,
}
"""Name -> check; `job.SCRIPTS` says which of them a script goes through."""
