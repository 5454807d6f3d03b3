"""Drills with the engine: runs of the ordinary command on gloo ranks, broken on purpose and held against an unbroken one."""

from benchmarks.drills.engine import chains, full_disk, kills, owners, preemptions, races, storm

DRILLS = (*kills.DRILLS, *preemptions.DRILLS, *chains.DRILLS, *races.DRILLS, *owners.DRILLS, *full_disk.DRILLS, *storm.DRILLS)
