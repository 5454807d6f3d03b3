"""What a model says of samples without looking at their answers, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.core.predictions import LIKELY
from megamm.core.types import Message, Part, Sample
from megamm.data.samples.encode import SampleEncoder
from megamm.evaluation.held_out import Place
from megamm.evaluation.records import SkippedSample
from megamm.inference import heads
from megamm.inference.generate import Answer, Sampling, generate
from megamm.inference.load import Loaded
from megamm.inference.prompt import make_prompt
from megamm.inference.score import token_losses
from megamm.tasks import TASKS, template
from megamm.tasks.reply import Reply, stored_reply


@dataclass(frozen=True, slots=True)
class Labelled:
    """One sample after the model was asked.

    Attributes:
        dataset: The pattern that named its shard.
        shard: File name of its shard.
        number: Its number in the shard.
        key: Its key.
        task: Name of its task; empty where the sample cannot be read.
        label: What the model says; empty where it says nothing that could be a label.
        confidence: Probability of exactly that answer.
        is_right: Whether it agrees with the sample's own answer, which the model did not see; None without one.
        reason: Why there is no label.
    """

    dataset: str
    shard: str
    number: int
    key: str
    task: str = ""
    label: str = ""
    confidence: float = 0.0
    is_right: bool | None = None
    reason: str = ""

    @property
    def identity(self) -> tuple[str, str, int]:
        """What tells it from every other sample."""
        return self.dataset, self.shard, self.number

    def to_json(self) -> dict[str, Any]:
        """A line of a file of answers."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Labelled:
        """Read what `to_json` wrote."""
        return cls(**value)


def check_asked(loaded: Loaded) -> None:
    """Refuse a model whose answers have no probability as a whole.

    Raises:
        ConfigError: It has a head whose answers are no labels.
    """
    head = loaded.model.head
    if head is not None and head.settings.kind != "linear":
        raise ConfigError(
            f"{loaded.source} answers by a {head.settings.kind} head, whose answers have no probability as a whole; "
            "pseudo-labels come from a linear head or from tokens"
        )


def ask(
    loaded: Loaded,
    samples: Iterable[tuple[Place, Sample | SkippedSample]],
    *,
    tasks: Sequence[str] = (),
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> Iterator[Labelled]:
    """Ask about each sample of some tasks once, in order; a sample that cannot be asked about comes with the reason.

    Args:
        loaded: The model, with a linear head or none.
        samples: From `evaluation.held_out.read_samples`.
        tasks: Names of the tasks that count; empty for all.
        batch_size: Samples that run at once.
        max_new_tokens: Bound on an answer in tokens; what is longer is no label.
    """
    waiting: list[_Question] = []
    for place, sample in samples:
        if isinstance(sample, SkippedSample):
            yield Labelled(place.dataset, place.tar.name, place.number, sample.key, reason=sample.reason)
            continue
        if tasks and sample.task not in tasks:
            continue
        try:
            waiting.append(_question(loaded, place, sample, max_new_tokens))
        except DataError as error:
            yield Labelled(place.dataset, place.tar.name, place.number, sample.key, sample.task, reason=str(error))
        if len(waiting) == batch_size:
            yield from _answered(loaded, waiting, max_new_tokens)
            waiting = []
    if waiting:
        yield from _answered(loaded, waiting, max_new_tokens)


@dataclass(frozen=True, slots=True)
class _Question:
    """A sample without its answer, ready for the model.

    Attributes:
        place: Where it lies.
        sample: Its messages end before the answer.
        answer: What it says itself; empty where it says nothing.
        asked: A head's `TokenSequence`, or a `Prompt`.
    """

    place: Place
    sample: Sample
    answer: tuple[Part, ...]
    asked: Any


def _question(loaded: Loaded, place: Place, sample: Sample, max_new_tokens: int) -> _Question:
    """Raises DataError for what cannot be asked about."""
    if template.is_document(sample.messages):
        raise DataError("a plain document asks nothing")
    messages, answer = sample.messages, ()
    if messages[-1].role == "assistant":
        messages, answer = template.split_answer(messages)
    alone = replace(sample, messages=messages)
    if loaded.model.head is not None:
        return _Question(place, alone, answer, heads.question(loaded, alone))
    if sample.task in TASKS and not {"text", "label"} & set(TASKS[sample.task].kinds):
        raise DataError(f"answers of {sample.task} are {' or '.join(TASKS[sample.task].kinds)}, and no labels")
    prompt = make_prompt(loaded, messages, sample.media)
    limit = loaded.config.text_config.max_position_embeddings
    if len(prompt.input_ids) + max_new_tokens > limit:
        raise DataError(f"the question takes {len(prompt.input_ids)} tokens, the answer up to {max_new_tokens}; the decoder has {limit}")
    return _Question(place, alone, answer, prompt)


def _answered(loaded: Loaded, questions: Sequence[_Question], max_new_tokens: int) -> Iterator[Labelled]:
    if loaded.model.head is not None:
        said = [
            _of_head(reply, loaded.model.head.settings.multi_label) for reply in heads.answers(loaded, [one.asked for one in questions])
        ]
    else:
        said = _of_tokens(loaded, questions, max_new_tokens)
    for question, (label, confidence, reason) in zip(questions, said, strict=True):
        if not math.isfinite(confidence):
            label, confidence, reason = "", 0.0, "the model gives no finite score; its weights or activations overflow"
        place, sample = question.place, question.sample
        is_right = _agrees(sample.task, label, question.answer) if label else None
        yield Labelled(
            place.dataset,
            place.tar.name,
            place.number,
            sample.key,
            sample.task,
            label=label,
            confidence=confidence,
            is_right=is_right,
            reason=reason,
        )


def _of_head(reply: Reply, is_multi_label: bool) -> tuple[str, float, str]:
    """Label, its probability, and why there is none."""
    if not is_multi_label:
        return reply.text, reply.labels[0].score, ""
    # Labels are independent there: the answer is as likely as all of its yeses and noes together.
    confidence = math.prod(one.score if one.score >= LIKELY else 1 - one.score for one in reply.labels)
    return (reply.text, confidence, "") if reply.text else ("", confidence, "no label is likely")


def _of_tokens(loaded: Loaded, questions: Sequence[_Question], max_new_tokens: int) -> list[tuple[str, float, str]]:
    """Label, its probability, and why there is none: greedy answers, scored once more as the tokens that they would be trained as."""
    answers = generate(loaded, [one.asked for one in questions], Sampling(max_new_tokens=max_new_tokens))
    problems = [_problem(loaded, answer) for answer in answers]
    encoder = SampleEncoder(loaded.tokenizer, loaded.media)
    sure = [number for number, problem in enumerate(problems) if not problem]
    completed = [encoder.encode("", with_label(questions[number].sample, answers[number].text.strip()))[0] for number in sure]
    nats = [float(losses.sum(dtype="float64")) for losses in token_losses(loaded, completed)] if completed else []
    found = {number: math.exp(-one) for number, one in zip(sure, nats, strict=True)}
    return [
        (answer.text.strip(), found[number], "") if number in found else ("", 0.0, problem)
        for number, (answer, problem) in enumerate(zip(answers, problems, strict=True))
    ]


def _problem(loaded: Loaded, answer: Answer) -> str:
    """Why an answer is no label; empty where it is one."""
    if not answer.is_finished:
        return "the answer does not end within the bound on its tokens"
    if any(loaded.tokenizer.vocabulary.describe(token_id)[0] != "text" for token_id in answer.token_ids):
        return "the answer holds more than text, which is no label"
    return "" if answer.text.strip() else "the answer is blank"


def with_label(sample: Sample, label: str) -> Sample:
    """A sample without an answer, answered."""
    return replace(sample, messages=(*sample.messages, Message("assistant", (Part(label_type(sample.task), text=label),))))


def label_type(task: str) -> str:
    """Type of the part that holds a label of a task."""
    return "label" if task in TASKS and TASKS[task].label is not None else "text"


def _agrees(task: str, label: str, answer: Sequence[Part]) -> bool | None:
    """Whether a label says what a stored answer does; None where that is no text."""
    if not answer or any(part.type not in ("text", "label") for part in answer):
        return None
    stored = stored_reply(answer, {})
    if task in TASKS:
        return TASKS[task].parse(Reply(label)) == TASKS[task].parse(stored)
    return label.strip() == stored.text.strip()
