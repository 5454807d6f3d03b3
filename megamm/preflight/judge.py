"""Which nodes are bad, and why: pure functions of what the tasks said."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from megamm.config import Preflight

Facts = Mapping[str, Any]
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks found.

    Attributes:
        bad_nodes: Node -> what is wrong with it.
        problems: What is wrong and no node's own fault.
    """

    bad_nodes: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def may_train(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_nodes and not self.problems


def judge(
    settings: Preflight, facts: Mapping[int, Facts], *, clocks: Mapping[str, float], links: Mapping[str, Any], missing: Mapping[str, str]
) -> Verdict:
    """Compare nodes with the floors of the recipe and with each other.

    Args:
        settings: Of the recipe.
        facts: Rank -> `facts.node_facts`.
        clocks: Node -> seconds by which the first node's clock is ahead.
        links: Group -> `bytes_per_second` or `error`, from `merged_links`.
        missing: Node -> why nothing is known of it.
    """
    reasons: dict[str, list[str]] = {node: [why] for node, why in missing.items()}

    def blame(node: str, reason: str) -> None:
        if reason not in reasons.setdefault(node, []):
            reasons[node].append(reason)

    for one in facts.values():
        for problem in one["problems"]:
            blame(one["node"], problem)
    nodes = {one["node"]: one for one in facts.values() if one["local_rank"] == 0}
    _judge_devices(nodes, facts, blame)
    _judge_floors(settings, nodes, blame)
    # Not the first node's own time: where its clock is the wrong one, all others would be blamed.
    usual = statistics.median_low(clocks.values()) if clocks else 0.0
    for node, seconds in clocks.items():
        if abs(seconds - usual) > settings.max_clock_skew_seconds:
            blame(node, f"its clock is {usual - seconds:+.2f} s off the usual one, {settings.max_clock_skew_seconds:g} s are borne")
    _judge_run_folder({node: one["shared"].get("run_disk") for node, one in nodes.items()}, blame)
    for what in ("software", "recipe", "data"):
        _judge_equal(what, {node: one[what] for node, one in nodes.items()}, blame)
    _judge_equal(
        "GPU", {node: {"kinds": ", ".join(one["gpus"]["names"]), "driver": one["gpus"]["driver"]} for node, one in nodes.items()}, blame
    )
    _judge_speed(settings, facts, blame)
    known = {node for node, found in reasons.items() if found}
    for node, why in blamed_for_links(settings, list(nodes), links, known=known).items():
        blame(node, why)
    return _of_reasons(reasons, {*nodes, *missing})


def _of_reasons(reasons: Mapping[str, list[str]], nodes: set[str]) -> Verdict:
    """Where more than half of the nodes are bad, what they have in common is to blame, and leaving them out would not help."""
    bad = {node: found for node, found in sorted(reasons.items()) if found}
    if len(bad) <= len(nodes) / 2:
        return Verdict(bad)
    counts = Counter(reason for found in bad.values() for reason in found)
    return Verdict({}, [f"{reason} ({num} of {len(nodes)} node{'s' * (len(nodes) > 1)})" for reason, num in counts.most_common()])


def _judge_devices(nodes: Mapping[str, Facts], facts: Mapping[int, Facts], blame: Callable[[str, str], None]) -> None:
    have_some = any(one["num_devices"] for one in facts.values())
    tasks = Counter(one["node"] for one in facts.values())
    listed = Counter(one["gpus"]["num_gpus"] for one in nodes.values()).most_common(1)
    for node, one in nodes.items():
        if have_some and one["num_devices"] < tasks[node]:
            blame(node, f"{one['num_devices']} GPUs for {tasks[node]} tasks")
        if one["gpus"]["num_gpus"] != listed[0][0]:
            blame(node, f"nvidia-smi lists {one['gpus']['num_gpus']} GPUs, on most nodes {listed[0][0]}")
        for fault in one["gpus"]["faults"]:
            blame(node, fault)


def _judge_floors(settings: Preflight, nodes: Mapping[str, Facts], blame: Callable[[str, str], None]) -> None:
    for node, one in nodes.items():
        for name, what in (("run_disk", "the run folder's disk"), ("scratch_disk", "the disk of temporary files")):
            disk = one[name]
            floors = {"free_gib": settings.min_free_gib, "write_mib_per_second": settings.min_write_mib_per_second}
            for fact, floor in floors.items():
                if disk is not None and disk[fact] < floor:
                    blame(node, f"{what} has {fact} {disk[fact]:g}, at least {floor:g} is wanted")
        for fact, floor in (("shared_memory_gib", settings.min_shared_memory_gib), ("open_files", settings.min_open_files)):
            if 0 <= one[fact] < floor:
                blame(node, f"{fact} is {one[fact]:g}, at least {floor:g} is wanted")


def _judge_run_folder(shared: Mapping[str, str | None], blame: Callable[[str, str], None]) -> None:
    """All nodes must write into one folder; where it is not mounted a node would train into one of its own."""
    firsts = {node: first for node, first in shared.items() if first is not None}
    if not firsts:
        return
    usual, num = Counter(firsts.values()).most_common(1)[0]
    for node, first in firsts.items():
        if first != usual:
            doubt = "; which of them is right cannot be told" if 2 * num == len(firsts) else ""
            blame(node, f"its run folder is not the one that {num} of {len(firsts)} nodes see ({usual} and others): check its mount{doubt}")


def _judge_equal(what: str, said: Mapping[str, Any], blame: Callable[[str, str], None]) -> None:
    """All nodes must say the same; who says something else than most is wrong."""
    values = {node: _flat(value) for node, value in said.items() if value is not None}
    if not values:
        return
    names = {name for value in values.values() for name in value}
    for name in sorted(names):
        usual, num = Counter(value.get(name) for value in values.values()).most_common(1)[0]
        for node, value in values.items():
            if value.get(name) != usual:
                label = f"{what} {name}".strip()
                doubt = "; which is right cannot be told" if 2 * num == len(values) else ""
                blame(node, f"{label} is {value.get(name)}, on {num} of {len(values)} nodes {usual}{doubt}")


def _flat(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _judge_speed(settings: Preflight, facts: Mapping[int, Facts], blame: Callable[[str, str], None]) -> None:
    speeds = {rank: one["gflops"] for rank, one in facts.items() if one["gflops"] is not None}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    for rank, speed in speeds.items():
        if speed < settings.min_speed_share * usual:
            blame(facts[rank]["node"], f"rank {rank} multiplies matrices at {speed:g} GFLOP/s, the median is {usual:g}")


def merged_links(posts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Group -> its slowest task's bandwidth, or the first error of one of its tasks."""
    merged: dict[str, Any] = {}
    for _, seen in sorted(posts.items()):
        for group, result in seen.items():
            merged[group] = min(merged.get(group, result), result, key=_speed)
    return merged


def _speed(result: Mapping[str, Any]) -> float:
    """Of one group as one task saw it; an error is slower than anything."""
    return result.get("bytes_per_second", -1.0)


def blamed_for_links(settings: Preflight, nodes: list[str], links: Mapping[str, Any], *, known: Set[str] = frozenset()) -> dict[str, str]:
    """The fewest nodes that explain all bad links, found greedily: a bad node is bad with every partner, its partners with it alone.

    Args:
        settings: Floors of the bandwidth.
        nodes: All nodes.
        links: From `merged_links`.
        known: Nodes that are bad anyway, and explain their links before any other does.
    """
    speeds = {group: result["bytes_per_second"] for group, result in links.items() if "bytes_per_second" in result}
    usual_pair = _usual([speed for group, speed in speeds.items() if "+" in group])
    usual_alone = _usual([speed for group, speed in speeds.items() if group in nodes])
    bad: dict[str, str] = {}
    for group, result in links.items():
        usual = 0.0 if group == "all" else usual_alone if group in nodes else usual_pair
        floor = max(settings.min_link_mib_per_second * _MIB, settings.min_link_share * usual)
        if "error" in result:
            bad[group] = f"fails: {result['error']}"
        elif result["bytes_per_second"] < floor:
            bad[group] = f"carries {result['bytes_per_second'] / _MIB:.1f} MiB/s, at least {floor / _MIB:.1f} is wanted"
    blamed: dict[str, str] = {}
    open_links = {group: set(group.split("+")) for group in bad if group != "all"}
    while open_links:
        counts = Counter(node for members in open_links.values() for node in members)
        most = max(counts.values())
        worst = known & counts.keys() or {node for node in counts if counts[node] == most}
        node = min(worst, key=lambda node: (_speed_elsewhere(node, speeds), nodes.index(node)))
        mine = sorted(group for group, members in open_links.items() if node in members)
        in_doubt = most == 1 and len(open_links[mine[0]]) == 2 and node not in known
        doubt = "; which of the two is to blame cannot be told" if in_doubt else ""
        blamed[node] = f"all-reduce of {mine[0]} {bad[mine[0]]}" + (f", and {len(mine) - 1} more" if len(mine) > 1 else "") + doubt
        open_links = {group: members for group, members in open_links.items() if node not in members}
    if "all" in bad and not blamed and not known:
        # Every pair is well: nobody is to blame by himself.
        blamed = {node: f"all-reduce of all nodes {bad['all']}" for node in nodes}
    return blamed


def _usual(speeds: list[float]) -> float:
    """The upper quartile: of three nodes, one bad one spoils two pairs of three, and with them the median."""
    return statistics.quantiles(speeds, n=4, method="inclusive")[2] if len(speeds) > 1 else sum(speeds)


def _speed_elsewhere(node: str, speeds: Mapping[str, float]) -> float:
    mine = [speed for group, speed in speeds.items() if node in group.split("+")]
    return statistics.mean(mine) if mine else 0.0
