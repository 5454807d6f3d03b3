"""The loader's promises: the same global batches at any scale and after any restart, nothing lost, every error heard."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset import WebDataset

from megamm.config import Augment, Batching, Dataset
from megamm.core.errors import ConfigError, DataError
from megamm.core.types import IGNORE_LABEL
from megamm.data.loading.loader import StepLoader
from megamm.data.loading.source import SampleSource
from megamm.data.planning.state import LoaderState
from megamm.data.shards.reader import LocalReader
from tests.data.conftest import BATCH
from tests.support.decoding import Failing

NUM_STEPS = 12


def global_steps(plan, num_steps, *, world_size=1, state=None):
    """Per step: the planned keys, the delivered documents by key (ids and weights), and the state after it."""
    loaders = [StepLoader(plan, rank=rank, world_size=world_size, state=state) for rank in range(world_size)]
    steps = []
    try:
        for _ in range(num_steps):
            parts = [next(loader) for loader in loaders]
            assert all(part.keys == parts[0].keys and part.state == parts[0].state for part in parts)
            assert len({len(part.micro_batches) for part in parts}) == 1
            documents = [document for part in parts for batch in part.micro_batches for document in documents_of(batch)]
            steps.append((parts[0].keys, sorted(documents), parts[0].state))
    finally:
        for loader in loaders:
            loader.close()
    return steps


def documents_of(batch):
    """(key, ids, labels, weights) of every document; checks the row's bookkeeping on the way."""
    for row, lengths in enumerate(batch.document_lengths):
        assert sum(lengths) == batch.input_ids.shape[1]
        starts = np.cumsum([0, *lengths])
        for start, length in zip(starts, lengths, strict=False):
            assert batch.position_ids[row, start : start + length].tolist() == list(range(length))
        keys = batch.keys[row]
        assert len(lengths) - len(keys) == (batch.num_padding[row] > 0)
        for key, start, length in zip(keys, starts, lengths, strict=False):
            place = row, slice(start, start + length)
            yield key, batch.input_ids[place].tolist(), batch.labels[place].tolist(), batch.weights[place].tolist()


@pytest.fixture(scope="module")
def reference(corpus, tokenizer):
    """Keys and documents of the first steps, on one rank, planned in one go."""
    from megamm.config import Data
    from megamm.data.planning.plan import DataPlan
    from tests.data.conftest import MODEL

    train = {name: Dataset(f"{name}/train-*.tar", weight) for name, weight in (("digits", 3.0), ("words", 1.0), ("text", 2.0))}
    data = Data(root=str(corpus), train=train, window=32, row_patches=48, row_frames=400, prefetch_steps=2, max_skipped_share=0.0)
    return global_steps(DataPlan.open(data, BATCH, model=MODEL, tokenizer=tokenizer, seed=5), NUM_STEPS)


@pytest.mark.parametrize(
    ("world_size", "micro_rows", "accumulation", "threads", "prefetch", "num_bytes"),
    [
        (1, 6, 0, 1, 1, 1 << 30),
        (1, 2, 3, 3, 4, 1 << 30),
        (2, 1, 0, 2, 2, 1 << 30),
        (2, 3, 1, 1, 3, 1),
        (3, 1, 2, 1, 1, 1 << 20),
        (4, 1, 0, 2, 2, 1 << 30),
        (5, 2, 0, 1, 2, 1 << 30),
    ],
)
def test_any_scale_gives_the_same_global_batches(
    corpus, open_plan, reference, world_size, micro_rows, accumulation, threads, prefetch, num_bytes
):
    batch = replace(BATCH, micro_rows=micro_rows, accumulation=accumulation)
    plan = open_plan(corpus, batch=batch, decode_workers=threads, prefetch_steps=prefetch, prefetch_bytes=num_bytes)
    assert global_steps(plan, NUM_STEPS, world_size=world_size) == reference


def test_resuming_at_every_step_equals_never_stopping(corpus, open_plan, reference):
    plan = open_plan(corpus)
    for done in range(NUM_STEPS):
        saved = json.dumps(reference[done][2].to_json())
        state = LoaderState.from_json(json.loads(saved))
        assert state == reference[done][2]
        assert global_steps(plan, min(2, NUM_STEPS - done - 1), world_size=done % 3 + 1, state=state) == reference[done + 1 : done + 3]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chains_of_scale_changes_equal_one_run(corpus, open_plan, reference, chain):
    state, steps = None, []
    for world_size, num_steps in chain:
        steps += global_steps(open_plan(corpus), num_steps, world_size=world_size, state=state)
        state = steps[-1][2]
    assert steps == reference[: len(steps)]


def test_twelve_shards_over_five_ranks_give_equal_steps_and_lose_nothing(corpus, open_plan):
    """Two passes over all samples of every dataset: each exactly twice, no step shorter than another."""
    plan = open_plan(corpus, batch=replace(BATCH, global_rows=5))
    sizes = {name: dataset.num_samples for name, dataset in plan.datasets.items()}
    seen: dict[str, int] = {}
    state = plan.start()
    while state.plan.position < 6 * 40:
        step = plan.next_step(state)
        assert len(step.rows) == 5
        for sample in itertools.chain(step.unfit, *(row.samples for row in step.rows)):
            key = f"{sample.dataset}/{sample.index}/{sample.epoch}"
            seen[key] = seen.get(key, 0) + 1
        state = step.state
    assert set(seen.values()) == {1}
    for name, size in sizes.items():
        assert all(f"{name}/{index}/0" in seen for index in range(size))


def test_labels_are_shifted_and_only_answers_are_learned(corpus, open_plan, tokenizer):
    plan = open_plan(corpus)
    with StepLoader(plan, task_weights={"classification": 0.25}) as loader:
        documents = [document for _ in range(4) for batch in next(loader).micro_batches for document in documents_of(batch)]
    end = tokenizer.vocabulary.control_id("end")
    for key, ids, labels, weights in documents:
        supervised = [place for place, label in enumerate(labels) if label != IGNORE_LABEL]
        assert all(labels[place] == ids[place + 1] for place in supervised)
        assert {weights[place] for place in supervised} == {0.25 if key.startswith("digits/") else 1.0}
        assert all(weight == 0 for place, weight in enumerate(weights) if place not in supervised)
        if key.startswith("words/"):
            assert labels[supervised[-1]] == end
            assert "seven" in tokenizer.decode([labels[place] for place in supervised])


def test_media_stand_in_the_order_of_their_placeholders(corpus, open_plan, tokenizer):
    image, audio = tokenizer.vocabulary.control_id("image"), tokenizer.vocabulary.control_id("audio")
    with StepLoader(open_plan(corpus, batch=replace(BATCH, micro_rows=3))) as loader:
        batches = [batch for _ in range(4) for batch in next(loader).micro_batches]
    assert any(batch.pixels is not None for batch in batches) and any(batch.mel is not None for batch in batches)
    for batch in batches:
        num_patches = 0 if batch.pixel_mask is None else batch.pixel_mask.sum()
        assert (batch.input_ids == image).sum() == num_patches
        if batch.mel is not None:
            assert batch.mel.shape[2] % 100 == 0 and batch.mel_mask.shape == (len(batch.mel), batch.mel.shape[2])
            assert not batch.mel[:, 0][batch.mel_mask == 0].any()
        assert ((batch.input_ids == audio).sum() > 0) == (batch.mel is not None)
        assert batch.num_tokens == (batch.task_ids >= 0).sum()


def test_a_vanilla_webdataset_reader_gets_the_same_samples(corpus, open_plan):
    plan = open_plan(corpus)
    loader = StepLoader(plan)
    loader.close()
    for dataset in plan.datasets.values():
        expected = [
            {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
            for tar in dataset.tars
            for sample in WebDataset(str(tar), shardshuffle=False)
        ]
        found = []
        for index in range(dataset.num_samples):
            tar, number = dataset.locate(index)
            shard = loader._source._pool.shard(tar)
            found.append({"__key__": shard.index.key(number), **shard.sample(number)})
        assert found == expected


def test_a_corrupt_sample_is_skipped_without_shifting_the_plan(tmp_path, corpus, open_plan, reference, tokenizer):
    root = copy_of(corpus, tmp_path)
    tar = root / "digits/train-00001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 200] ^= 4
    tar.write_bytes(content)
    plan = open_plan(root, max_skipped_share=0.01)
    for world_size in (1, 3):
        loaders = [StepLoader(plan, rank=rank, world_size=world_size) for rank in range(world_size)]
        skipped = []
        for keys, documents, state in reference:
            parts = [next(loader) for loader in loaders]
            assert parts[0].keys == keys and parts[-1].state == state
            bad = [entry for part in parts for entry in part.skipped]
            skipped += bad
            found = sorted(document for part in parts for batch in part.micro_batches for document in documents_of(batch))
            left_out = {f"{entry.dataset}/{entry.key}" for entry in bad}
            assert found == [document for document in documents if document[0] not in left_out]
            assert len(found) + len(bad) == len(keys)
        assert {entry.key for entry in skipped} == {"d1-0"}
        assert all(entry.shard == "train-00001.tar" and "changed since they were indexed" in entry.reason for entry in skipped)
        for loader in loaders:
            loader.close()


def test_the_budget_turns_a_rotten_dataset_into_an_error(tmp_path, corpus, open_plan):
    root = copy_of(corpus, tmp_path)
    for tar in root.glob("digits/*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1"))
    with (
        StepLoader(open_plan(root, max_skipped_share=0.01)) as loader,
        pytest.raises(DataError, match=r"samples were skipped, data\.max_skipped_share is 0\.01; the last is digits/d"),
    ):
        for _ in range(100):
            next(loader)


def test_excluded_samples_enter_the_ledger_and_nothing_shifts(corpus, open_plan, reference):
    plan = open_plan(corpus, max_skipped_share=1.0)
    victim = reference[3][0][0]
    state = reference[2][2].excluding([victim])
    assert LoaderState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with StepLoader(plan, state=state) as loader:
        step = next(loader)
    assert step.keys == reference[3][0]
    assert [(f"{entry.dataset}/{entry.key}", entry.reason) for entry in step.skipped] == [(victim, "excluded")]


def test_excluded_samples_are_not_even_read(corpus, open_plan, reference):
    """Where reading them would end the run, and with no budget at all."""
    words = {key for keys, _, _ in reference for key in keys if key.startswith("words/")}
    state = open_plan(corpus).start().excluding(words)
    with StepLoader(open_plan(corpus), state=state, reader=Failing("words")) as loader:
        steps = list(itertools.islice(loader, NUM_STEPS))
    skipped = [entry for step in steps for entry in step.skipped]
    assert {entry.reason for entry in skipped} == {"excluded"} and {f"{entry.dataset}/{entry.key}" for entry in skipped} == words
    delivered = sorted(document for step in steps for batch in step.micro_batches for document in documents_of(batch))
    assert delivered == sorted(one for _, documents, _ in reference for one in documents if one[0] not in words)


def test_planning_looks_up_no_key_but_of_what_is_skipped(corpus, open_plan, reference, monkeypatch):
    looked_up, key_of = set(), SampleSource.key

    def noted(source, sample):
        looked_up.add(key := key_of(source, sample))
        return key

    monkeypatch.setattr(SampleSource, "key", noted)
    victims = set(reference[0][0][:2])
    with StepLoader(open_plan(corpus), state=open_plan(corpus).start().excluding(victims)) as loader:
        skipped = [entry for step in itertools.islice(loader, NUM_STEPS) for entry in step.skipped]
    assert {f"{entry.dataset}/{entry.key}" for entry in skipped} == victims == looked_up


def test_a_resumed_run_goes_on_with_its_budget(tmp_path, corpus, open_plan, monkeypatch):
    """A share that a run of many parts must not exceed in all of them together."""
    monkeypatch.setattr("megamm.data.ledger.MIN_BUDGET_SAMPLES", 1)
    plan = small_rows(open_plan, corpus, max_skipped_share=1.0)
    with StepLoader(plan) as loader:
        steps = list(itertools.islice(loader, 12))
    ledger = [entry for step in steps for entry in step.skipped]
    num_planned = sum(step.num_samples for step in steps) + len(ledger)
    share = len(ledger) / num_planned
    for borne in (share * 0.5, 0.9):
        plan = small_rows(open_plan, corpus, max_skipped_share=borne)
        with StepLoader(plan, state=steps[-1].state, ledger=ledger) as loader:
            if borne > share:
                next(loader)
            else:
                with pytest.raises(DataError, match=r"samples were skipped, data\.max_skipped_share"):
                    next(loader)


def test_changed_weights_hold_from_the_next_window_on_and_are_recorded(corpus, open_plan, settings_of, reference):
    heavier = {**settings_of(corpus).train, "words": Dataset("words/train-*.tar", 6.0)}
    plan = open_plan(corpus, train=heavier)
    number, state = next((number, state) for number, (_, _, state) in enumerate(reference) if state.plan.row > 0)
    steps = global_steps(plan, 12, state=state)
    segments = steps[0][2].plan.segments
    assert len(segments) == 2 and segments[1].start == state.plan.position + 32
    # What is left of the window under the old weights comes unchanged.
    assert steps[0][0][:2] == reference[number + 1][0][:2]
    num_words = sum(key.startswith("words/") for keys, _, _ in steps for key in keys)
    assert num_words / sum(len(keys) for keys, _, _ in steps) > 0.4
    # Going on from there with the same recipe adds nothing to the history.
    assert plan.resume(steps[3][2]) == steps[3][2]
    assert global_steps(plan, 4, world_size=2, state=steps[3][2]) == steps[4:8]


def test_other_data_or_settings_are_refused(tmp_path, corpus, open_plan, reference):
    state = reference[0][2]
    with pytest.raises(DataError, match="seed was 5, is 6"):
        StepLoader(open_plan(corpus, seed=6), state=state)
    with pytest.raises(DataError, match=r"data\.window was 32, is 64"):
        StepLoader(open_plan(corpus, window=64), state=state)
    train = open_plan(corpus).data.train
    turned = {**train, "digits": replace(train["digits"], augment=Augment(image_flip=True))}
    with pytest.raises(DataError, match=r'augmentation of digits was \{\}, is \{"image_flip":true\}'):
        StepLoader(open_plan(corpus, train=turned), state=state)
    root = copy_of(corpus, tmp_path)
    (root / "text/train-00006.tar").unlink()
    with pytest.raises(DataError, match=r"train-00006\.tar does not exist, but its index does"):
        open_plan(root)
    (root / "text/train-00006.tar.index").unlink()
    with pytest.raises(DataError, match="samples of text was 28, is 21"):
        StepLoader(open_plan(root), state=state)


def test_a_shard_that_changes_while_it_is_read_ends_the_run(tmp_path, corpus, open_plan):
    root = copy_of(corpus, tmp_path)
    plan = open_plan(root)
    for tar in root.glob("words/*.tar"):
        tar.write_bytes(tar.read_bytes()[:2000])
    with StepLoader(plan) as loader, pytest.raises(DataError, match=r"words/train-0000\d\.tar changed since it was indexed"):
        for _ in range(100):
            next(loader)


def test_missing_lengths_and_damaged_lengths_say_what_to_do(tmp_path, corpus, open_plan):
    root = copy_of(corpus, tmp_path)
    path = next(root.glob("words/train-00000.tar.lengths-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="is damaged"):
        open_plan(root)
    path.unlink()
    with pytest.raises(DataError, match="is missing; run `megamm data plan-lengths`"):
        open_plan(root)


class Flaky(LocalReader):
    """Fails every other read with an error that passes."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self.error, self.left = error, times

    def read(self, tar, offset, size):
        if self.left > 0:
            self.left -= 1
            raise self.error
        return super().read(tar, offset, size)


def test_transient_errors_are_retried_and_lasting_ones_end_the_run(corpus, open_plan, reference, monkeypatch):
    monkeypatch.setattr("megamm.data.shards.reader._RETRY_DELAYS_SECONDS", (0.0, 0.0, 0.0))
    plan = open_plan(corpus)
    with StepLoader(plan, reader=Flaky(OSError(5, "Input/output error"), 3)) as loader:
        assert next(loader).keys == reference[0][0]
    with (
        StepLoader(plan, reader=Flaky(OSError(5, "Input/output error"), 10**9)) as loader,
        pytest.raises(DataError, match="again and again"),
    ):
        next(loader)


def test_errors_of_decoders_reach_the_consumer(corpus, open_plan):
    with StepLoader(open_plan(corpus), reader=Flaky(RuntimeError("broken reader"), 10**9)) as loader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken reader"):
                next(loader)


def test_prefetch_is_bounded_in_steps_and_bytes(corpus, open_plan):
    for changes, held in (({"prefetch_steps": 3}, 3), ({"prefetch_steps": 50, "prefetch_bytes": 1}, 1)):
        with StepLoader(open_plan(corpus, **changes)) as loader:
            settle(lambda loader=loader, held=held: len(loader._ready) == held)
            time.sleep(0.05)
            assert len(loader._ready) == loader._num_held == held
            assert loader._bytes_held == sum(step.num_bytes for step in loader._ready)
            next(loader)
            settle(lambda loader=loader, held=held: len(loader._ready) == held)


def test_planned_bytes_bound_the_batches(corpus, open_plan):
    with StepLoader(open_plan(corpus)) as loader:
        for step in itertools.islice(loader, 8):
            arrays = [value for batch in step.micro_batches for value in vars_of(batch) if isinstance(value, np.ndarray)]
            # Padding of media to the longest of a micro-batch may exceed what was planned, but not by much.
            assert sum(array.nbytes for array in arrays) <= 1.5 * step.num_bytes


def vars_of(batch):
    return [getattr(batch, name) for name in batch.__slots__]


def test_closing_leaves_no_threads(corpus, open_plan):
    before = set(threading.enumerate())
    loader = StepLoader(open_plan(corpus, decode_workers=3))
    next(loader)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(DataError, match="closed"):
        next(loader)


def test_impossible_settings_are_refused(corpus, open_plan):
    with pytest.raises(ConfigError, match="less than one row a rank"):
        StepLoader(open_plan(corpus), world_size=7)
    with pytest.raises(ConfigError, match="task_weights names 'detect'"):
        StepLoader(open_plan(corpus), task_weights={"detect": 2.0})
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        open_plan(corpus, train={})
    with pytest.raises(DataError, match="no shard matches"):
        open_plan(corpus, train={"x": Dataset("nothing-*.tar")})


def test_rows_of_another_size_leave_out_what_does_not_fit(corpus, open_plan):
    """Positions are consumed exactly: delivered and ledger together are all of them, in every window that was finished."""
    plan = open_plan(corpus, batch=Batching(row_tokens=24, global_rows=4), max_skipped_share=1.0)
    positions, skipped, state = [], [], None
    with StepLoader(plan) as loader:
        for step in itertools.islice(loader, 20):
            positions += [sample.position for row in step.rows for sample in row.samples]
            skipped += [entry.position for entry in step.skipped]
            state = step.state.plan
    assert skipped and not set(skipped) & set(positions)
    finished = [position for position in positions + skipped if position < state.position]
    assert sorted(finished) == list(range(state.position))


def small_rows(plan_of, corpus, **changes):
    """A plan whose rows are too short for many samples."""
    return plan_of(corpus, batch=Batching(row_tokens=24, global_rows=8), **changes)


def test_each_rank_answers_for_its_share_of_what_no_row_holds(corpus, open_plan, monkeypatch):
    monkeypatch.setattr("megamm.data.ledger.MIN_BUDGET_SAMPLES", 100)
    num_steps = 40
    with StepLoader(small_rows(open_plan, corpus, max_skipped_share=1.0)) as loader:
        steps = list(itertools.islice(loader, num_steps))
    alone = [{entry.position: entry for entry in step.skipped} for step in steps]
    num_skipped = sum(map(len, alone))
    share = num_skipped / (num_skipped + sum(step.num_samples for step in steps))
    assert num_skipped > 50
    # A little more than these data need, and far less than all of it held against one rank of four.
    plan = small_rows(open_plan, corpus, max_skipped_share=share * 1.3)
    loaders = [StepLoader(plan, rank=rank, world_size=4) for rank in range(4)]
    try:
        for expected in alone:
            parts = [next(loader).skipped for loader in loaders]
            entries = [entry for part in parts for entry in part]
            assert len(entries) == len(expected) and {entry.position: entry for entry in entries} == expected
            assert all(entry.position % 4 == rank for rank, part in enumerate(parts) for entry in part)
    finally:
        for loader in loaders:
            loader.close()


def test_what_no_row_holds_ends_every_rank_together(corpus, open_plan):
    """Also a rank whose positions all fit: its share of the budget is spent as well."""
    plan = small_rows(open_plan, corpus, max_skipped_share=0.0)
    for rank in range(8):
        with StepLoader(plan, rank=rank, world_size=8) as loader, pytest.raises(DataError, match=r"samples were skipped, data\.max"):
            next(loader)


def test_skipped_samples_are_logged_once_by_the_rank_that_answers_for_them(corpus, open_plan, caplog):
    plan = small_rows(open_plan, corpus, max_skipped_share=1.0)
    for rank in range(2):
        caplog.clear()
        with caplog.at_level("WARNING", logger="megamm.data"), StepLoader(plan, rank=rank, world_size=2) as loader:
            steps = [step.skipped for step in itertools.islice(loader, 60)]
        wanted, named = [], set()
        for skipped in steps:
            lines = [f"skipped {entry.dataset}/{entry.key} in {entry.shard}: {entry.reason}" for entry in skipped]
            new = [line for line in dict.fromkeys(lines) if line not in named]
            named.update(new)
            wanted += new[:3]
            if len(new) > 3:
                wanted.append(f"and {len(new) - 3} more samples of this step; `megamm data report` lists them")
        assert len(named) < sum(map(len, steps)), "no epoch came twice"
        # Decoding runs ahead of the consumer, so later lines may follow.
        assert [record.getMessage() for record in caplog.records][: len(wanted)] == wanted


def settle(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def copy_of(corpus, folder):
    import shutil

    return shutil.copytree(corpus, folder / "corpus")
