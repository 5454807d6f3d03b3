"""The fault table: its judges notice what is lost, and the quick table loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.data_faults import OURS, PEER, markdown, rows_of, run_table
from benchmarks.faults.case import Case, Tally
from benchmarks.faults.classes import FAULTS
from benchmarks.faults.corpus import beside, document, flipped, healthy, media_sample, pack, picture
from benchmarks.faults.ours import OurRun
from benchmarks.faults.peer import PeerRun
from benchmarks.faults.texts import pickles

WHOLE = Case("whole", pack(healthy()), healthy())


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> OurRun:
    return OurRun(tmp_path_factory.mktemp("ours") / "shards")


@pytest.fixture
def peer(tmp_path) -> PeerRun:
    return PeerRun(tmp_path)


def test_a_healthy_shard_is_delivered_by_both(ours, peer):
    assert ours.run(WHOLE) == peer.run(WHOLE) == ("unharmed", "")
    assert ours.run(replace(WHOLE, passes=True))[0] == "recovered"


OTHER_TRUTHS = {
    "a sample more": {**healthy(), "t2": {"json": document("never written")}},
    "another text": {**healthy(), "t0": {"json": document("another text")}},
    "another picture": {**healthy(), "p0": media_sample("0.jpg", picture(seed=9))},
    "a sample less": {key: files for key, files in healthy().items() if key != "t1"},
}


@pytest.mark.parametrize("name", OTHER_TRUTHS)
def test_what_is_not_as_it_was_written_is_lost(ours, peer, name):
    """The shard is whole, but the truth is another one: exactly what a silent loss looks like."""
    case = replace(WHOLE, truth=OTHER_TRUTHS[name])
    assert ours.run(case)[0] == peer.run(case)[0] == "lost silently"


def test_useless_samples_must_not_be_delivered(ours, peer):
    case = replace(WHOLE, rotten=frozenset({"s0"}))
    assert ours.run(case)[0] == peer.run(case)[0] == "lost silently"


def test_reports_are_no_loss(ours):
    content = pack(healthy())
    verdict, message = ours.run(replace(WHOLE, found=flipped(content, (content.index(b"the last text") + 3) * 8)))
    assert verdict == "in ledger" and "changed since they were indexed" in message
    verdict, message = ours.run(replace(WHOLE, found=content[:-1]))
    assert verdict == "refused" and "train-00000.tar changed since it was indexed" in message
    samples = beside({"p": {"json": b"[]"}})
    assert ours.run(Case("rotten", pack(samples), samples, rotten=frozenset({"p"})))[0] == "in ledger"


def test_errors_without_a_name_are_crashes(ours):
    def fail(tar: Path) -> None:
        raise KeyError("planted")

    assert ours.run(replace(WHOLE, spoil=fail)) == ("crashed", "KeyError: 'planted'")
    assert ours.run(WHOLE)[0] == "unharmed"


def test_pickles_run_in_webdataset_and_never_here(ours, peer, tmp_path):
    canary = tmp_path / "canary"
    for case in pickles(canary):
        verdict, message = ours.run(case)
        assert verdict in ("unharmed", "in ledger", "refused"), message
        assert not canary.exists(), case.name
    peer.run(next(iter(pickles(canary))))
    assert canary.exists(), "the trap does not work, so it proves nothing"


def test_rows_and_table_show_what_was_lost():
    ours, peer = Tally(executed=1, peak_bytes=3 << 20), Tally()
    for verdict in ("refused", "in ledger", "recovered", "lost silently", "crashed"):
        ours.add("case", verdict, "why")
    peer.add("case", "lost silently", "why")
    rows = rows_of({"a fault": {OURS: ours, PEER: peer}})
    assert [(row.row, row.value, row.holds, row.peer) for row in rows] == [
        ("a fault", 2, False, "webdataset 1 of 1"),
        ("code out of data that ran", 1, False, "webdataset 0"),
        ("highest memory of any try", 3.0, None, "webdataset 0"),
    ]
    assert "| a fault | 5 | 2 | 1 | 0 | 2 | 3 | 0 | **1** | 0 | 0 |" in markdown({"a fault": {OURS: ours, PEER: peer}})
    assert "| a fault | 5 | 2 | 1 | 0 | 2 | 3 | – | – | – | – |" in markdown({"a fault": {OURS: ours}})


def test_classes_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_table_loses_nothing_and_runs_nothing():
    table = run_table([fault for fault in FAULTS if fault.every], quick=True)
    for name, sides in table.items():
        tally = sides[OURS]
        assert tally.tries, name
        assert not tally.counts.get("lost silently") and not tally.counts.get("crashed"), f"{name}: {tally.examples}"
        assert not tally.executed, f"{name}: {tally.examples}"
    assert sum(sides[PEER].executed for sides in table.values() if PEER in sides), "no trap worked, so nothing is proven"
