"""One case through the whole way of a run: index, planned lengths, plan, loader; what comes out is compared with what went in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from benchmarks.faults.case import Case, Verdict
from benchmarks.faults.reading import faulty_reader
from benchmarks.faults.truth import BATCH, MODEL, RULES, delivered, expected_all, load_tokenizer, settings
from megamm.core.errors import MegaMMError
from megamm.data.index import read_shard_facts, write_index
from megamm.data.lengths import ensure_lengths
from megamm.data.loader import StepLoader
from megamm.data.plan import DataPlan


@dataclass
class Delivery:
    """What one pass gave: key -> digest of each time it came, and key -> reason of the ledger."""

    documents: dict[str, list[str]] = field(default_factory=dict)
    ledger: dict[str, str] = field(default_factory=dict)


class OurRun:
    """Runs cases in a folder; index and lengths are made once for cases that start from the same shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prepared: tuple[str, str] | None = None

    def run(self, case: Case) -> tuple[Verdict, str]:
        """What became of a case, and the message that says so."""
        delivery, refused = Delivery(), ""
        try:
            tar = self._prepare(case)
            if case.found is not None:
                tar.write_bytes(case.found)
            if case.spoil is not None:
                self._prepared = None
                case.spoil(tar)
            self._one_pass(case, tar, delivery)
        except MegaMMError as error:
            refused = str(error)
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"
        return _judge(case, delivery, refused)

    def _prepare(self, case: Case) -> Path:
        """The shard as it was when it was indexed, with its sidecars."""
        tar, state = self._folder / case.file_name, (case.file_name, xxhash.xxh3_128_hexdigest(case.indexed))
        if state == self._prepared:
            tar.write_bytes(case.indexed)
            return tar
        self._prepared = None
        shutil.rmtree(self._folder, ignore_errors=True)
        tar.parent.mkdir(parents=True)
        tar.write_bytes(case.indexed)
        write_index(tar)
        if case.planned:
            ensure_lengths([tar], load_tokenizer(), RULES)
            self._prepared = state
        return tar

    def _one_pass(self, case: Case, tar: Path, delivery: Delivery) -> None:
        data = settings(self._folder, case.shards or case.file_name, read_shard_facts(tar).num_samples)
        ensure_lengths([tar], load_tokenizer(), RULES)
        plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=load_tokenizer(), seed=0)
        if case.during is not None:
            self._prepared = None
            case.during(tar)
        with StepLoader(plan, reader=faulty_reader(case.trouble)) as loader:
            for step in loader:
                delivery.ledger.update({entry.key: entry.reason for entry in step.skipped})
                for batch in step.micro_batches:
                    for key, digest in delivered(batch):
                        delivery.documents.setdefault(key, []).append(digest)
                if step.state.plan.position:
                    return


def _judge(case: Case, delivery: Delivery, refused: str) -> tuple[Verdict, str]:
    expected = expected_all(case.truth)
    for key, digests in delivery.documents.items():
        if key not in expected:
            return "lost silently", f"delivered {key!r}, which nobody wrote"
        if len(digests) > 1:
            return "lost silently", f"delivered {key!r} {len(digests)} times"
        if key in case.rotten:
            return "lost silently", f"delivered {key!r}, which no reader can use"
        if key not in case.loose and digests[0] != expected[key]:
            return "lost silently", f"delivered {key!r} changed"
    if refused:
        return "refused", refused
    for key in expected.keys() - delivery.documents.keys() - delivery.ledger.keys():
        return "lost silently", f"{key!r} is missing"
    if delivery.ledger:
        return "in ledger", next(f"{key}: {reason}" for key, reason in delivery.ledger.items())
    return ("recovered" if case.passes else "unharmed"), ""
