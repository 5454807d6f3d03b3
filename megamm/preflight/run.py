"""The checks from beginning to end, as every task goes through them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.core.env import RankInfo
from megamm.core.errors import MegaMMError
from megamm.core.files import write_json
from megamm.core.tables import aligned
from megamm.preflight.clocks import measure_clocks
from megamm.preflight.facts import node_facts
from megamm.preflight.judge import Verdict, judge, merged_links
from megamm.preflight.links import measure_links
from megamm.preflight.meeting import Meeting, Unreachable, node_of, planned_nodes

_MIB = 1 << 20


def preflight(recipe: Recipe, run: Path, info: RankInfo, report: Path) -> Verdict:
    """Check the nodes of all tasks, one of which this is. Rank 0 writes the report and prints it.

    Args:
        recipe: What is to be trained; `[preflight]` says what is wanted.
        run: The run folder; it need not exist.
        info: This task.
        report: JSON file: `bad_nodes`, `problems`, and below `nodes`, `clocks`, `links` what was measured.

    Returns:
        The same verdict on every task.

    Raises:
        ConfigError: Tasks cannot meet as the environment says.
        MegaMMError: The first node does not answer; the report names it as bad.
    """
    try:
        meeting = Meeting.join(info, recipe.preflight.timeout_seconds)
        return _check(meeting, recipe, run, report)
    except Unreachable as error:
        # Rank 0 cannot tell, so whoever misses it does; all of them write the same.
        first = node_of(0, info.world_size, planned_nodes() or [os.environ.get("MASTER_ADDR", "")])
        if not report.exists():
            write_json(report, _report(Verdict({first: [str(error)]}), {}, {}, {}))
        raise MegaMMError(f"{first}: {error}; {report} says so too") from None


def _check(meeting: Meeting, recipe: Recipe, run: Path, report: Path) -> Verdict:
    info, settings = meeting.info, recipe.preflight
    meeting.post("facts", node_facts(recipe, run, info))
    facts: dict[int, Any] = {}
    if info.rank == 0:
        facts = meeting.gather("facts", range(info.world_size), settings.timeout_seconds)
        meeting.put("present", {rank: one["node"] for rank, one in sorted(facts.items())})
    # Twice as long as rank 0 waits itself.
    present = meeting.ask("present", 2 * settings.timeout_seconds)
    if present is None:
        raise Unreachable("the first node does not go on")
    if len(present) == info.world_size:
        # From one task: each of some thousands that asks for the facts of all would keep the store busy for longer than anybody waits.
        ranks_of: dict[str, list[int]] = {}
        for rank, node in present.items():
            ranks_of.setdefault(node, []).append(int(rank))
        measure_clocks(meeting, [ranks[0] for ranks in ranks_of.values()])
        measure_links(meeting, ranks_of, settings.link_mib * _MIB)
    if info.rank == 0:
        meeting.put("verdict", _conclude(meeting, recipe, facts, report))
    told = meeting.ask("verdict", 2 * settings.timeout_seconds)
    if told is None:
        raise Unreachable("the first node does not come to an end")
    meeting.post("left", True)
    if info.rank == 0:
        # The store ends with this task.
        meeting.gather("left", [int(rank) for rank in present], settings.timeout_seconds)
    return Verdict(**told)


def _conclude(meeting: Meeting, recipe: Recipe, facts: dict[int, Any], report: Path) -> dict[str, Any]:
    world_size, seconds = meeting.info.world_size, recipe.preflight.timeout_seconds
    posts: dict[int, Any] = {}
    clocks: dict[str, float] = {}
    if len(facts) == world_size:
        posts = meeting.gather("links", range(world_size), seconds)
        firsts = {rank: one["node"] for rank, one in facts.items() if one["local_rank"] == 0}
        clocks = {firsts[rank]: value for rank, value in meeting.gather("clock", list(firsts), 1.0).items()}
    gone = [rank for rank in range(world_size) if rank not in (posts or facts)]
    planned = planned_nodes() if gone else []
    # A task that came and went is of a node whose name is known.
    names = {rank: facts[rank]["node"] if rank in facts else node_of(rank, world_size, planned) for rank in gone}
    when = "went away during the checks" if posts else f"did not come within {seconds:g} s"
    missing = {node: f"{num} of its tasks {when}" for node, num in Counter(names.values()).items()}
    links = merged_links(posts)
    verdict = judge(recipe.preflight, facts, clocks=clocks, links=links, missing=missing)
    write_json(report, _report(verdict, facts, clocks, links))
    print("\n".join(table(verdict, facts, clocks, links)), flush=True)
    return {"bad_nodes": verdict.bad_nodes, "problems": verdict.problems}


def _report(verdict: Verdict, facts: dict[int, Any], clocks: dict[str, float], links: dict[str, Any]) -> dict[str, Any]:
    ranks = {str(rank): one for rank, one in sorted(facts.items())}
    measured = {"ranks": ranks, "clocks": clocks, "links": links}
    return json.loads(json.dumps({"bad_nodes": verdict.bad_nodes, "problems": verdict.problems, **measured}))


def table(verdict: Verdict, facts: dict[int, Any], clocks: dict[str, float], links: dict[str, Any]) -> list[str]:
    """What was measured, a line a node, and what is wrong."""
    rows = []
    for one in facts.values():
        if one["local_rank"]:
            continue
        node = one["node"]
        speeds = [other["gflops"] or 0.0 for other in facts.values() if other["node"] == node]
        mine = [result.get("bytes_per_second", 0.0) / _MIB for group, result in links.items() if node in group.split("+") and group != node]
        run_disk, scratch = one["run_disk"] or {}, one["scratch_disk"] or {}
        rows.append(
            [
                node,
                one["num_devices"],
                f"{run_disk.get('free_gib', 0):g}",
                f"{run_disk.get('write_mib_per_second', 0):.0f}",
                f"{scratch.get('write_mib_per_second', 0):.0f}",
                f"{1000 * clocks[node]:+.1f}" if node in clocks else "-",
                f"{min(speeds):.0f}",
                f"{min(mine):.0f}" if mine else "-",
                "bad" if node in verdict.bad_nodes else "well",
            ]
        )
    header = ("node", "GPUs", "free GiB", "write MiB/s", "scratch MiB/s", "clock ms", "GFLOP/s", "slowest link MiB/s", "is")
    lines = aligned(header, rows)
    if "bytes_per_second" in links.get("all", {}):
        lines.append(f"all nodes together: {links['all']['bytes_per_second'] / _MIB:.0f} MiB/s")
    lines += [f"bad: {node}: {reason}" for node, reasons in verdict.bad_nodes.items() for reason in reasons]
    return lines + [f"no node's own fault: {problem}" for problem in verdict.problems]


def raise_if_bad(verdict: Verdict, report: Path) -> None:
    """End the command where somebody has to look.

    Raises:
        MegaMMError: Some node is bad, or the checks found what is no node's fault.
    """
    if verdict.may_train:
        return
    bad = ", ".join(verdict.bad_nodes) or "no node by itself"
    error = MegaMMError(f"these nodes should not train ({bad}); {report} says why")
    error.on_all_ranks = True
    raise error
