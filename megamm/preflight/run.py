"""The checks from beginning to end, as every task goes through them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.core.env import RankInfo
from megamm.core.errors import MegaMMError
from megamm.core.files import write_json
from megamm.core.tables import aligned
from megamm.preflight.clocks import measure_clocks
from megamm.preflight.disks import NAMES, check_writable, disk, folders_of, forget, measure_disks, sign, tried
from megamm.preflight.facts import node_facts
from megamm.preflight.judge import Verdict, judge, merged_links
from megamm.preflight.links import measure_links
from megamm.preflight.meeting import Meeting, Unreachable, absent_nodes, node_name, planned_nodes

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
        (first, *_) = planned_nodes() or [os.environ.get("MASTER_ADDR", "")]
        if not report.exists():
            write_json(report, _report(Verdict({first: [str(error)]}), {}, {}, {}))
        raise MegaMMError(f"{first}: {error}; {report} says so too") from None


def _check(meeting: Meeting, recipe: Recipe, run: Path, report: Path) -> Verdict:
    info = meeting.info
    present = _meet(meeting)
    facts: dict[int, Any] = {}
    if info.rank in present.nodes:
        facts = _measure_nodes(meeting, recipe, run, present)
    if info.rank == 0:
        meeting.put("is_whole", len(facts) == info.world_size)
    if meeting.follow("is_whole"):
        ranks_of: dict[str, list[int]] = {}
        for rank, node in present.nodes.items():
            ranks_of.setdefault(node, []).append(rank)
        measure_clocks(meeting, [ranks[0] for ranks in ranks_of.values()])
        measure_links(meeting, ranks_of, recipe.preflight.link_mib * _MIB)
    if info.rank == 0:
        meeting.put("verdict", _conclude(meeting, recipe, present, facts, report))
    told = meeting.follow("verdict")
    meeting.post("left", True)
    if info.rank == 0:
        # The store ends with this task.
        meeting.gather("left", facts)
    return Verdict(**told)


@dataclass(frozen=True, slots=True)
class _Present:
    """Who came: rank -> node, and a word that no other start of these checks has."""

    nodes: dict[int, str]
    token: str


def _meet(meeting: Meeting) -> _Present:
    """Who is here in time. Before anything is measured, so that only machines that cannot start are late."""
    meeting.post("here", node_name())
    if meeting.info.rank == 0:
        come = meeting.gather("here", range(meeting.info.world_size))
        meeting.put("present", {"nodes": dict(sorted(come.items())), "token": secrets.token_hex(8)})
    present = meeting.follow("present")
    return _Present({int(rank): node for rank, node in present["nodes"].items()}, present["token"])


def _measure_nodes(meeting: Meeting, recipe: Recipe, run: Path, present: _Present) -> dict[int, Any]:
    """Do this task's part of what nodes measure by themselves; on rank 0 the facts of all tasks that came to the end of it."""
    info = meeting.info
    own = node_facts(recipe, info, meeting.beat)
    folders = folders_of(run) if info.local_rank == 0 else {}
    own["shared"] = {name: tried(own["problems"], "", _sign, name, folder, present.token) for name, folder in folders.items()}
    meeting.post("facts", own)
    facts = meeting.gather("facts", present.nodes) if info.rank == 0 else {}
    writers = {rank: {name: who for name, who in one["shared"].items() if who} for rank, one in facts.items() if one["local_rank"] == 0}

    def measure(name: str) -> dict[str, Any]:
        problems: list[str] = []
        size = recipe.preflight.write_mib * _MIB
        return {"disk": tried(problems, f"{folders[name]}", disk, folders[name], size, meeting.beat), "problems": problems}

    written = measure_disks(meeting, writers, measure)
    for folder in folders.values():
        # Where it cannot be reached that is a problem of this node already.
        with contextlib.suppress(OSError):
            forget(folder, present.token)
    for rank, expected in writers.items():
        for name in NAMES:
            said = written.get(rank, {}).get(name, {"disk": None, "problems": []})
            facts[rank][name] = said["disk"]
            facts[rank]["problems"] += said["problems"]
        if len(written.get(rank, {})) < len(expected):
            facts.pop(rank)
    return facts


def _sign(name: str, folder: Path, token: str) -> str:
    check_writable(name, folder)
    return sign(folder, token, node_name())


def _conclude(meeting: Meeting, recipe: Recipe, present: _Present, facts: dict[int, Any], report: Path) -> dict[str, Any]:
    world_size, seconds = meeting.info.world_size, recipe.preflight.timeout_seconds
    posts: dict[int, Any] = {}
    clocks: dict[str, float] = {}
    if len(facts) == world_size:
        posts = meeting.gather("links", range(world_size))
        firsts = {rank: one["node"] for rank, one in facts.items() if one["local_rank"] == 0 and rank in posts}
        clocks = {firsts[rank]: value for rank, value in meeting.gather("clock", firsts).items() if value is not None}
    late = absent_nodes(present.nodes, world_size, planned_nodes() if len(present.nodes) < world_size else [])
    missing = {node: f"{num} of its tasks did not come within {seconds:g} s" for node, num in late.items()}
    gone = Counter(node for rank, node in present.nodes.items() if rank not in (posts or facts))
    missing |= {node: f"{num} of its tasks went away during the checks, or showed no work for {seconds:g} s" for node, num in gone.items()}
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
