"""What is looked at before a job goes into the queue, where a mistake would cost hours of waiting."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

from megamm.core.errors import MegaMMError
from megamm.data.planning.deal import resolve_accumulation
from megamm.status.facts import is_run
from megamm.status.run_status import RunStatus, read_status
from megamm.status.units import several
from megamm.submit.data import check_data
from megamm.submit.finding import Finding, good, problem
from megamm.submit.job import Plan
from megamm.submit.script import directive_problems, syntax_problems
from megamm.submit.space import check_space, existing
from megamm.train.run_folder import RunFolder

Check = Callable[[Plan], Iterator[Finding]]
_SBATCH_SECONDS = 60.0
_IN_USE = ("running", "starting", "stalled", "queued")


def check(plan: Plan) -> Iterator[tuple[str, Finding]]:
    """Run all checks, and tell each finding under the name of its check."""
    for name, one in CHECKS.items():
        for finding in findings(one, plan):
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
    run, request = plan.run, plan.request
    if not os.access(existing(run), os.W_OK):
        yield problem(f"{existing(run)} cannot be written to; name another --run")
    RunFolder(run).check(plan.recipe, resume=request.resume, data_may_change=request.data_may_change)
    if (run / "STOP").exists():
        yield problem(f"{run / 'STOP'} is there, and would end the job after its first step; remove it")
    if not is_run(run):
        yield good(f"{run} is new")
        return
    (status,) = read_status([run])
    yield _fit_to_go_on(plan, status)


def _fit_to_go_on(plan: Plan, status: RunStatus) -> Finding:
    state = f"{status.state} ({status.why})" if status.why else status.state
    if status.state == "done":
        return problem(f"{plan.run} is done; name another --run")
    after = plan.options.get("dependency") or ""
    if status.state in _IN_USE and not any(number in after for number in status.facts.job_ids):
        waits = f", or wait for it: --sbatch=--dependency=afterany:{status.facts.job_ids[0]}" if status.facts.job_ids else ""
        return problem(f"{plan.run} is {state}; name another --run{waits}")
    saved = status.facts.saved
    return good(f"{plan.run} was {state} and goes on {f'from step {saved.step}' if saved else 'from the beginning'}")


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
    "space": check_space,
    "slurm": _check_sbatch,
}
"""Name -> check, in the order in which they are told."""
