"""One case through the whole way of a run: index, planned lengths, plan, loader; what comes out is compared with what went in."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from benchmarks.faults.case import Case, Verdict
from benchmarks.faults.reading import faulty_reader
from benchmarks.faults.serving import serving
from benchmarks.faults.truth import BATCH, DATASET, MODEL, RULES, delivered, expected_all, load_tokenizer, settings
from megamm.config import Data
from megamm.core.errors import MegaMMError
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.lengths import ensure_lengths
from megamm.data.shards.index import read_shard_facts, write_index
from megamm.data.shards.remote import open_reader

_MAX_SAVED = 4


@dataclass
class Delivery:
    """What one pass gave: key -> digest of each time it came, and key -> reason of the ledger."""

    documents: dict[str, list[str]] = field(default_factory=dict)
    ledger: dict[str, str] = field(default_factory=dict)


class OurRun:
    """Runs cases in a folder; index and lengths are made once for cases that start from the same shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: dict[tuple[str, str, bool], dict[str, bytes]] = {}

    def run(self, case: Case) -> tuple[Verdict, str]:
        """What became of a case, and the message that says so."""
        delivery, refused = Delivery(), ""
        try:
            tar = self._prepare(case)
            if case.found is not None:
                tar.write_bytes(case.found)
            if case.spoil is not None:
                case.spoil(tar)
            self._one_pass(case, tar, delivery)
        except MegaMMError as error:
            refused = str(error)
        except OSError as error:
            # The command line says which file, and why, in one line; an error without a file would say nothing.
            if error.filename is None:
                return "crashed", f"{type(error).__name__}: {error}"
            refused = str(error)
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"
        return _judge(case, delivery, refused)

    def _prepare(self, case: Case) -> Path:
        """The shard as it was when it was indexed, with its sidecars; made once, brought back for every further case."""
        state = (case.file_name, xxhash.xxh3_128_hexdigest(case.indexed), case.planned)
        tar = self._folder / case.file_name
        shutil.rmtree(self._folder, ignore_errors=True)
        tar.parent.mkdir(parents=True)
        if state in self._saved:
            for name, content in self._saved[state].items():
                (self._folder / name).write_bytes(content)
            return tar
        tar.write_bytes(case.indexed)
        write_index(tar)
        if case.planned:
            ensure_lengths([tar], load_tokenizer(), RULES)
        if len(self._saved) == _MAX_SAVED:
            self._saved.clear()
        self._saved[state] = {path.name: path.read_bytes() for path in self._folder.iterdir() if path.is_file()}
        return tar

    def _one_pass(self, case: Case, tar: Path, delivery: Delivery) -> None:
        if case.server is None:
            self._load(case, tar, settings(self._folder, case.shards or case.file_name, **case.settings), delivery)
            return
        # Sidecars of remote shards lie below the run's own root, which begins empty each time.
        with serving(self._folder, case.server) as url, tempfile.TemporaryDirectory(dir=self._folder.parent) as root:
            self._load(case, tar, settings(Path(root), f"{url}/{tar.name}", **case.settings), delivery)

    def _load(self, case: Case, tar: Path, data: Data, delivery: Delivery) -> None:
        tars = find_shards(DATASET, data.train[DATASET], Path(data.root), reading=data.reading)
        num_samples = sum(read_shard_facts(each).num_samples for each in tars)
        # One pass is one window, so that its end can be seen in the loader's state.
        data = replace(data, window=max(1, num_samples))
        with closing(open_reader(data.reading)) as reader:
            ensure_lengths(tars, load_tokenizer(), RULES, reader=reader)
        plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=load_tokenizer(), seed=0)
        if case.during is not None:
            case.during(tar)
        with case.around(), StepLoader(plan, reader=faulty_reader(case.trouble)) as loader:
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
    missing = sorted(expected.keys() - delivery.documents.keys() - delivery.ledger.keys())
    # Under a wrong index samples are reported by the keys that it knows, one entry each.
    if len(missing) > len(delivery.ledger.keys() - expected.keys()):
        return "lost silently", f"{missing[0]!r} is missing"
    if delivery.ledger:
        return "in ledger", next(f"{key}: {reason}" for key, reason in delivery.ledger.items())
    return ("recovered" if case.passes else "unharmed"), ""
