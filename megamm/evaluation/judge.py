"""From held-out samples to what the model did with each: an answer to compare, or the likelihood of a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from megamm.config import Head
from megamm.core.errors import ConfigError, DataError
from megamm.core.geometry import PictureView
from megamm.core.types import IGNORE_LABEL, MEDIA_TYPES, ImageInput, Message, Part, Sample, TokenSequence
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.shapes import check_boxes, read_masks
from megamm.data.samples.targets import check_labels, question_and_answer
from megamm.engine import distributed
from megamm.evaluation.held_out import Place, skipped
from megamm.evaluation.records import Answered, Result, Scored, SkippedSample
from megamm.inference import heads, replies
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, make_prompt
from megamm.inference.score import token_losses
from megamm.tasks import TASKS, detection, recommendation, template
from megamm.tasks.reply import Reply, stored_reply

WAYS = ("answer", "rank", "score", "ask_head")
"""How samples are judged: methods of `Judge`."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A chat whose last answer is asked for anew, in tokens (`prompt`) or of the head (`sequence`)."""

    place: Place
    sample: Sample
    reference: Reply
    prompt: Prompt | None = None
    view: PictureView | None = None
    sequence: TokenSequence | None = None


@dataclass(frozen=True, slots=True)
class _Document:
    place: Place
    sample: Sample
    sequence: TokenSequence


Item = _Question | _Document


def check_head(head: Head | None) -> None:
    """Refuse a model whose head answers nothing that could be judged.

    Raises:
        ConfigError: Its head fills hidden media in.
    """
    if head is not None and head.kind == "masked":
        raise ConfigError("a masked head fills in what is hidden and answers nothing; evaluate a run that was tuned from this one")


def judge(
    loaded: Loaded,
    samples: Iterable[tuple[Place, Sample | SkippedSample]],
    *,
    tasks: Collection[str],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int | None = None,
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
        num_beams: Finds recommended items by a search with so many beams; None ranks all items.
    """
    judge = Judge(loaded, max_new_tokens, num_beams=num_beams)
    waiting: dict[str, list[Item]] = {way: [] for way in WAYS}
    for found in prepared(judge, samples, tasks):
        if isinstance(found, SkippedSample):
            yield found
            continue
        way, item = found
        waiting[way].append(item)
        if len(waiting[way]) == batch_size:
            yield from judge.run(way, waiting[way])
            waiting[way] = []
    for way, rest in waiting.items():
        if rest:
            yield from judge.run(way, rest)


def prepared(
    judge: Judge, samples: Iterable[tuple[Place, Sample | SkippedSample]], tasks: Collection[str]
) -> Iterator[SkippedSample | tuple[str, Item]]:
    """The way in which each sample of `tasks` is judged and what that takes, or why it cannot be."""
    for place, sample in samples:
        if isinstance(sample, SkippedSample):
            yield sample
        elif tasks and sample.task not in tasks:
            continue
        elif sample.task not in TASKS:
            yield skipped(place, sample.key, f"task {sample.task!r} is not known; the tasks are {', '.join(TASKS)}")
        else:
            try:
                yield judge.prepare(place, sample)
            except DataError as error:
                yield skipped(place, sample.key, error)


class Judge:
    """The ways to judge a batch of samples. State: the trie of the model's items, made when it is first needed.

    Args:
        loaded: The model.
        max_new_tokens: Bound on an answer.
        num_beams: Of a search for recommended items; None ranks all of them, which alone is done in step.
        in_step: Its weights are split over ranks, so that all of them must run the same forwards: every rank then calls the same ways
            in the same order, one that has nothing left with nothing.
    """

    def __init__(self, loaded: Loaded, max_new_tokens: int, *, num_beams: int | None = None, in_step: bool = False):
        self._loaded, self._max_new_tokens, self._num_beams, self._in_step = loaded, max_new_tokens, num_beams, in_step
        self._encoder = SampleEncoder(loaded.tokenizer, loaded.media)

    def prepare(self, place: Place, sample: Sample) -> tuple[str, Item]:
        """How a sample is judged, and what that takes.

        Raises:
            DataError: It cannot be judged.
        """
        head = self._loaded.model.head
        if head is not None:
            _, parts = question_and_answer(head.settings, sample)
            sequence = heads.question(self._loaded, sample)
            self._check(len(sequence.input_ids))
            check_labels(head.settings, parts)
            return "ask_head", _Question(place, sample, self._reference(sample, parts, sequence.images), sequence=sequence)
        if template.is_document(sample.messages):
            sequence, _ = self._encoder.encode(place.dataset, sample)
            self._check(len(sequence.input_ids))
            return "score", _Document(place, sample, sequence)
        messages, parts = template.split_answer(sample.messages)
        TASKS[sample.task].check_question(messages)
        self._check_kinds(sample.task, parts)
        prompt = make_prompt(self._loaded, messages, sample.media)
        reference = self._reference(sample, parts, prompt.images)
        question = _Question(place, sample, reference, prompt, _view_of(parts, prompt))
        if sample.task == recommendation.TASK.name:
            self._check(len(prompt.input_ids), self._trie.num_levels, "an item")
            return "rank", question
        self._check(len(prompt.input_ids), self._max_new_tokens, "its answer up to --max-new-tokens")
        return "answer", question

    def run(self, way: str, items: Sequence[Any]) -> Iterator[Result]:
        """Judge a batch of items that were prepared for one of `WAYS`."""
        return getattr(self, way)(items)

    def answer(self, questions: Sequence[_Question]) -> Iterator[Result]:
        """Greedy answers."""
        prompts, views = [one.prompt for one in questions], [one.view for one in questions]
        if self._in_step and not questions:
            prompts, views = [self._nothing], [None]
        return _answered(
            questions, replies.answers(self._loaded, prompts, views, max_new_tokens=self._max_new_tokens, in_step=self._in_step)
        )

    def rank(self, questions: Sequence[_Question]) -> Iterator[Result]:
        """The best of all items of the catalogue, or of those that a search finds."""
        prompts, num_tokens = [one.prompt for one in questions], 0
        if self._in_step:
            # The size of the batch decides how many forwards it takes.
            own = [len(prompts), max((len(one.input_ids) for one in prompts), default=0)]
            num_rows, num_tokens = map(max, zip(*distributed.gather_json(own), strict=True))
            prompts += [self._nothing] * (num_rows - len(prompts))
        sizes = {"num_items": max(recommendation.CUTOFFS), "num_beams": self._num_beams, "least_tokens": num_tokens}
        return _answered(questions, replies.rankings(self._loaded, self._trie, prompts, **sizes))

    def score(self, documents: Sequence[_Document]) -> Iterator[Scored]:
        """How likely each token of a document was."""
        sequences = [document.sequence for document in documents]
        if self._in_step and not documents:
            sequences = [_unsupervised(self._nothing)]
        losses = token_losses(self._loaded, sequences)
        for document, nats in zip(documents, losses, strict=False):
            labels = document.sequence.labels[document.sequence.labels != IGNORE_LABEL]
            yield Scored(
                **_identity(document.place, document.sample),
                nats=float(nats.sum(dtype=np.float64)),
                num_tokens=len(labels),
                num_bytes=sum(len(part.text.encode()) for part in document.sample.messages[0].content),
                token_counts=dict(Counter(labels.tolist())),
            )

    def ask_head(self, questions: Sequence[_Question]) -> Iterator[Result]:
        """What the model's head says."""
        return _answered(questions, heads.answers(self._loaded, [one.sequence for one in questions]))

    @cached_property
    def _trie(self) -> ItemTrie:
        return ItemTrie.of(self._loaded)

    @cached_property
    def _nothing(self) -> Prompt:
        """The shortest prompt, for a rank that only keeps step."""
        vocabulary = self._loaded.tokenizer.vocabulary
        return Prompt(np.array([vocabulary.control_id("bos"), vocabulary.control_id("assistant")], dtype=np.int32))

    def _reference(self, sample: Sample, parts: Sequence[Part], images: Sequence[ImageInput]) -> Reply:
        """The stored answer. What is wrong with it would look as if the model were."""
        head = self._loaded.model.head
        if head is not None and head.settings.multi_label:
            # Any number of labels, none as well, in parts of their own or between commas; in the order in which the head names them.
            named = {label.strip() for part in parts for label in part.text.split(",")}
            return Reply(", ".join(label for label in head.settings.labels if label in named))
        views = [image.view for image in images]
        check_boxes(parts, views)
        reference = stored_reply(parts, read_masks(parts, sample.media, views, self._loaded.media))
        if sample.task == detection.TASK.name:
            reference = replace(reference, boxes=(*reference.boxes, *detection.crowds_of(sample.metadata)))
        # A picture may have no box and no instance, which `parse` gives as an empty tuple.
        if TASKS[sample.task].parse(reference) in ("", frozenset()):
            raise DataError("the stored answer is blank or names nothing, so nothing can be compared with it")
        return reference

    def _check_kinds(self, task: str, parts: Sequence[Part]) -> None:
        """Refuse an answer that is none of the task's, or that names unknown items."""
        TASKS[task].check_answer(parts)
        for part in parts:
            if part.type == "item":
                items = self._loaded.tokenizer.items
                if items is None:
                    raise DataError(f"item {part.data['id']!r} cannot be recommended: the model's tokenizer knows no items")
                items.row_of(part.data["id"])

    def _check(self, num_asked: int, num_more: int = 0, what: str = "") -> None:
        limit = self._loaded.config.text_config.max_position_embeddings
        if num_asked + num_more > limit:
            more = f" and {what} {num_more}" if num_more else ""
            raise DataError(f"what is asked takes {num_asked} tokens{more}; the decoder has {limit} positions")


def _answered(questions: Sequence[_Question], said: Sequence[Reply]) -> Iterator[Result]:
    """One result a question; a rank that only kept step was told more than it asked."""
    for question, reply in zip(questions, said[: len(questions)], strict=True):
        if reply.has_finite_scores:
            yield Answered(**_identity(question.place, question.sample), reference=question.reference, answer=reply)
        else:
            yield skipped(question.place, question.sample.key, "the model gives no finite score; its weights or activations overflow")


def _unsupervised(prompt: Prompt) -> TokenSequence:
    num_tokens = len(prompt.input_ids)
    labels, weights = np.full(num_tokens, IGNORE_LABEL, dtype=np.int32), np.zeros(num_tokens, dtype=np.float32)
    return TokenSequence(dataset="", key="", task="text", input_ids=prompt.input_ids, labels=labels, weights=weights)


def _view_of(parts: Sequence[Part], prompt: Prompt) -> PictureView | None:
    """The picture that an answer is about: that of its boxes or masks, else the first."""
    number = next((part.data["image"] for part in parts if part.type in ("boxes", "mask")), 0)
    return prompt.images[number].view if number < len(prompt.images) else None


def _identity(place: Place, sample: Sample) -> dict[str, Any]:
    return {
        "dataset": place.dataset,
        "shard": place.tar.name,
        "number": place.number,
        "change": place.change,
        "key": sample.key,
        "task": sample.task,
        "metadata": sample.metadata,
        "media": _media_of(sample.messages),
    }


def _media_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The kinds of media that a chat shows, each once."""
    shown = {part.type for message in messages for part in message.content}
    return tuple(kind for kind in MEDIA_TYPES if kind in shown)
