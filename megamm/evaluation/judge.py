"""From held-out samples to what the model did with each: an answer to compare, or the likelihood of a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.geometry import PictureView
from megamm.core.types import IGNORE_LABEL, Part, Sample, TokenSequence
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.shapes import read_masks
from megamm.evaluation.held_out import Place, skipped
from megamm.evaluation.records import Answered, Result, Scored, SkippedSample
from megamm.inference import replies
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, make_prompt
from megamm.inference.score import token_losses
from megamm.tasks import TASKS, recommendation, template
from megamm.tasks.reply import Reply, stored_reply


@dataclass(frozen=True, slots=True)
class _Question:
    place: Place
    sample: Sample
    prompt: Prompt
    reference: Reply
    view: PictureView | None


@dataclass(frozen=True, slots=True)
class _Document:
    place: Place
    sample: Sample
    sequence: TokenSequence


def judge(
    loaded: Loaded,
    samples: Iterable[tuple[Place, Sample | SkippedSample]],
    *,
    tasks: Collection[str],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[Result]:
    """Answer or score each sample once; of every sample of `tasks` comes one record or one reason to skip it.

    The order is that of full batches. Samples of other tasks are left out; a sample that cannot be read, or whose task nobody
    knows while none are asked for, is reported.

    Args:
        loaded: The model.
        samples: From `read_samples`.
        tasks: Names of the tasks that count; empty for all.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer.
    """
    judge = _Judge(loaded, max_new_tokens)
    waiting: dict[str, list[Any]] = {"answer": [], "rank": [], "score": []}
    for place, sample in samples:
        if isinstance(sample, SkippedSample):
            yield sample
            continue
        if tasks and sample.task not in tasks:
            continue
        if sample.task not in TASKS:
            yield skipped(place, sample.key, f"task {sample.task!r} is not known; the tasks are {', '.join(TASKS)}")
            continue
        try:
            way, item = judge.prepare(place, sample)
        except DataError as error:
            yield skipped(place, sample.key, error)
            continue
        waiting[way].append(item)
        if len(waiting[way]) == batch_size:
            yield from getattr(judge, way)(waiting[way])
            waiting[way] = []
    for way, rest in waiting.items():
        if rest:
            yield from getattr(judge, way)(rest)


class _Judge:
    """The three ways to judge a batch of samples. State: the trie of the model's items, made when it is first needed."""

    def __init__(self, loaded: Loaded, max_new_tokens: int):
        self._loaded, self._max_new_tokens = loaded, max_new_tokens
        self._encoder = SampleEncoder(loaded.tokenizer, loaded.media)

    def prepare(self, place: Place, sample: Sample) -> tuple[str, _Question | _Document]:
        """How a sample is judged, and what that takes.

        Raises:
            DataError: It cannot be judged.
        """
        if template.is_document(sample.messages):
            sequence, _ = self._encoder.encode(place.dataset, sample)
            self._check(len(sequence.input_ids))
            return "score", _Document(place, sample, sequence)
        messages, parts = template.split_answer(sample.messages)
        if all(part.type in ("text", "label") and not part.text.strip() for part in parts):
            raise DataError("the stored answer is blank, so nothing can be compared with it")
        prompt = make_prompt(self._loaded, messages, sample.media)
        reference = stored_reply(parts, read_masks(parts, sample.media, self._loaded.media))
        question = _Question(place, sample, prompt, reference, _view_of(parts, prompt))
        if sample.task == recommendation.TASK.name:
            self._check(len(prompt.input_ids) + self._trie.num_levels)
            return "rank", question
        self._check(len(prompt.input_ids) + self._max_new_tokens)
        return "answer", question

    def answer(self, questions: Sequence[_Question]) -> Iterator[Answered]:
        """Greedy answers."""
        prompts, views = [one.prompt for one in questions], [one.view for one in questions]
        return _answered(questions, replies.answers(self._loaded, prompts, views, max_new_tokens=self._max_new_tokens))

    def rank(self, questions: Sequence[_Question]) -> Iterator[Answered]:
        """All items of the catalogue, of which the best are kept."""
        prompts = [one.prompt for one in questions]
        return _answered(questions, replies.rankings(self._loaded, self._trie, prompts, num_items=max(recommendation.CUTOFFS)))

    def score(self, documents: Sequence[_Document]) -> Iterator[Scored]:
        """How likely each token of a document was."""
        losses = token_losses(self._loaded, [document.sequence for document in documents])
        for document, nats in zip(documents, losses, strict=True):
            labels = document.sequence.labels[document.sequence.labels != IGNORE_LABEL]
            yield Scored(
                **_identity(document.place, document.sample),
                nats=float(nats.sum(dtype=np.float64)),
                num_tokens=len(labels),
                num_bytes=sum(len(part.text.encode()) for part in document.sample.messages[0].content),
                token_counts=dict(Counter(labels.tolist())),
            )

    @cached_property
    def _trie(self) -> ItemTrie:
        return ItemTrie.of(self._loaded)

    def _check(self, num_tokens: int) -> None:
        limit = self._loaded.config.text_config.max_position_embeddings
        if num_tokens > limit:
            raise DataError(f"the sample takes {num_tokens} tokens, answer included; the decoder has {limit} positions")


def _answered(questions: Sequence[_Question], said: Sequence[Reply]) -> Iterator[Answered]:
    for question, reply in zip(questions, said, strict=True):
        yield Answered(**_identity(question.place, question.sample), reference=question.reference, answer=reply)


def _view_of(parts: Sequence[Part], prompt: Prompt) -> PictureView | None:
    """The picture that an answer is about: that of its boxes or masks, else the first."""
    number = next((part.data["image"] for part in parts if part.type in ("boxes", "mask")), 0)
    return prompt.images[number].view if number < len(prompt.images) else None


def _identity(place: Place, sample: Sample) -> dict[str, Any]:
    return {
        "dataset": place.dataset,
        "shard": place.tar.name,
        "number": place.number,
        "key": sample.key,
        "task": sample.task,
        "metadata": sample.metadata,
    }
