"""From held-out samples to what the model did with each: an answer to compare, or the likelihood of a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.geometry import PictureView
from megamm.core.types import IGNORE_LABEL, Part, Sample, TokenSequence
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.shapes import read_masks
from megamm.evaluation.held_out import Place, skipped
from megamm.evaluation.records import Answered, Result, Scored, SkippedSample
from megamm.inference.generate import Sampling, generate
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, make_prompt
from megamm.inference.score import token_losses
from megamm.tasks import TASKS, template
from megamm.tasks.reply import Reply, read_reply, stored_reply


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
    encoder = SampleEncoder(loaded.tokenizer, loaded.media)
    questions: list[_Question] = []
    documents: list[_Document] = []
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
            item = _prepare(loaded, encoder, place, sample, max_new_tokens)
        except DataError as error:
            yield skipped(place, sample.key, error)
            continue
        if isinstance(item, _Question):
            questions.append(item)
        else:
            documents.append(item)
        if len(questions) == batch_size:
            yield from _answer(loaded, questions, max_new_tokens)
            questions = []
        if len(documents) == batch_size:
            yield from _score(loaded, documents)
            documents = []
    if questions:
        yield from _answer(loaded, questions, max_new_tokens)
    if documents:
        yield from _score(loaded, documents)


def _prepare(loaded: Loaded, encoder: SampleEncoder, place: Place, sample: Sample, max_new_tokens: int) -> _Question | _Document:
    limit = loaded.config.text_config.max_position_embeddings
    if template.is_document(sample.messages):
        sequence, _ = encoder.encode(place.dataset, sample)
        num_tokens = len(sequence.input_ids)
        item: _Question | _Document = _Document(place, sample, sequence)
    else:
        messages, parts = template.split_answer(sample.messages)
        if all(not part.text.strip() for part in parts if part.type in ("text", "label")) and not _holds_places(parts):
            raise DataError("the stored answer is blank, so nothing can be compared with it")
        prompt = make_prompt(loaded, messages, sample.media)
        num_tokens = len(prompt.input_ids) + max_new_tokens
        reference = stored_reply(parts, read_masks(parts, sample.media, loaded.media))
        item = _Question(place, sample, prompt, reference, _view_of(parts, prompt))
    if num_tokens > limit:
        raise DataError(f"the sample takes {num_tokens} tokens, answer included; the decoder has {limit} positions")
    return item


def _answer(loaded: Loaded, questions: list[_Question], max_new_tokens: int) -> Iterator[Answered]:
    answers = generate(loaded, [question.prompt for question in questions], Sampling(max_new_tokens=max_new_tokens))
    for question, answer in zip(questions, answers, strict=True):
        reply = read_reply(
            answer.token_ids,
            loaded.tokenizer,
            question.view,
            probabilities=answer.probabilities,
            is_finished=answer.is_finished,
        )
        yield Answered(**_identity(question.place, question.sample), reference=question.reference, answer=reply)


def _holds_places(parts: Sequence[Part]) -> bool:
    return any(part.type in ("boxes", "mask") for part in parts)


def _view_of(parts: Sequence[Part], prompt: Prompt) -> PictureView | None:
    """The picture that an answer is about: that of its boxes or masks, else the first."""
    number = next((part.data["image"] for part in parts if part.type in ("boxes", "mask")), 0)
    return prompt.images[number].view if number < len(prompt.images) else None


def _score(loaded: Loaded, documents: list[_Document]) -> Iterator[Scored]:
    losses = token_losses(loaded, [document.sequence for document in documents])
    for document, nats in zip(documents, losses, strict=True):
        labels = document.sequence.labels[document.sequence.labels != IGNORE_LABEL]
        num_bytes = sum(len(part.text.encode()) for part in document.sample.messages[0].content)
        counts = dict(Counter(labels.tolist()))
        yield Scored(
            **_identity(document.place, document.sample),
            nats=float(nats.sum(dtype=np.float64)),
            num_tokens=len(labels),
            num_bytes=num_bytes,
            token_counts=counts,
        )


def _identity(place: Place, sample: Sample) -> dict[str, Any]:
    return {
        "dataset": place.dataset,
        "shard": place.tar.name,
        "number": place.number,
        "key": sample.key,
        "task": sample.task,
        "metadata": sample.metadata,
    }
