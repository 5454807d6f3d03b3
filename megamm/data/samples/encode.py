"""From a sample to a token sequence: decode, lay out, shift the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.types import IGNORE_LABEL, MediaFacts, Message, Part, Sample, TokenSequence
from megamm.data.ledger import BadSample
from megamm.data.media.augment import Changes
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.features import Footprint, MediaRules
from megamm.data.media.files import MediaError
from megamm.data.samples.hidden import hide
from megamm.data.samples.shapes import planned_shapes, seen_shapes
from megamm.data.samples.targets import check_answer, head_target, question_and_answer
from megamm.tasks import TASKS, template
from megamm.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class SampleEncoder:
    """How samples become sequences. Stateless: equal samples give equal sequences, in any thread.

    Attributes:
        tokenizer: Of the run.
        rules: How media become tower inputs, and whether a head answers in place of tokens.
        task_weights: Task name -> loss weight of its tokens; 1 where not named.
    """

    tokenizer: TextTokenizer
    rules: MediaRules
    task_weights: Mapping[str, float] = field(default_factory=dict)

    def measure(self, sample: Sample, facts: Mapping[str, MediaFacts], speeds: Sequence[float] = (1.0,)) -> list[Footprint]:
        """What the sample will take of a row, without decoding its media.

        Args:
            sample: Parsed, without media.
            facts: Member suffix -> what its header says.
            speeds: At which its sounds may be played.

        Returns:
            For each speed what the sample takes.

        Raises:
            BadSample: The sample can never be encoded; says why.
        """
        try:
            messages, answer = self._seen(sample)
            pictures = [_facts_of(part, facts) for part in _parts(messages, "image")]
            images = [self.rules.footprint(one) for one in pictures]
            sounds = [_facts_of(part, facts) for part in _parts(messages, "audio")]
            variants = [[self.rules.footprint(one, speed) for one in sounds] for speed in speeds]
            input_ids, _ = self._laid_out(
                messages,
                image_tokens=[one.tokens for one in images],
                audio_tokens=[one.tokens for one in variants[0]],
                shapes=planned_shapes(messages, pictures, self.rules.outline_points),
            )
            if self.rules.head is not None:
                # For what it refuses alone: a head's boxes take no tokens.
                planned_shapes([Message("assistant", answer)], pictures, self.rules.outline_points)
                for each in variants:
                    check_answer(self.rules.head, answer, [one.tokens for one in each])
        except DataError as error:
            raise BadSample(str(error)) from error
        # Speeds change the placeholders of sounds alone.
        num_others = len(input_ids) - sum(one.tokens for one in variants[0])
        patches = sum(one.patches for one in images)
        return [Footprint(num_others + sum(one.tokens for one in each), patches, sum(one.frames for one in each)) for each in variants]

    def encode(
        self,
        dataset: str,
        sample: Sample,
        changes: Changes | None = None,
        *,
        speed: float = 1.0,
        random: np.random.Generator | None = None,
    ) -> tuple[TokenSequence, Footprint]:
        """Decode the media and lay the sample out.

        Args:
            dataset: Its dataset's name.
            sample: Parsed, with media.
            changes: Augmentation.
            speed: At which its sounds are played.
            random: Draws what a masked head is to fill in; the same for all samples by default.

        Returns:
            The sequence, and what it takes of a row.

        Raises:
            BadSample: Something in it cannot be decoded or laid out.
        """
        try:
            messages, answer = self._seen(sample)
            messages = messages if changes is None else changes.messages(messages)
            images = [
                image_input(_content_of(part, sample.media), _tower(self.rules.image, "vision"), limits=self.rules.limits, changes=changes)
                for part in _parts(messages, "image")
            ]
            audios = [
                audio_input(
                    _content_of(part, sample.media),
                    _tower(self.rules.audio, "audio"),
                    limits=self.rules.limits,
                    changes=changes,
                    speed=speed,
                )
                for part in _parts(messages, "audio")
            ]
            input_ids, labels = self._laid_out(
                messages,
                image_tokens=[one.num_tokens for one in images],
                audio_tokens=[one.num_tokens for one in audios],
                shapes=seen_shapes(messages, sample.media, [one.view for one in images], self.rules),
            )
            target = None
            if self.rules.head is not None and self.rules.head.kind == "masked":
                images, audios, target = hide(self.rules.head, images, audios, random or np.random.default_rng(0))
            elif self.rules.head is not None:
                target = head_target(self.rules.head, answer, media=sample.media, images=images, audios=audios, rules=self.rules)
        except DataError as error:
            raise BadSample(str(error)) from error
        is_weighted = labels != IGNORE_LABEL
        is_weighted[-1] |= target is not None
        weights = is_weighted * np.float32(self.task_weights.get(sample.task, 1.0))
        sequence = TokenSequence(dataset, sample.key, sample.task, input_ids, labels, weights, images, audios, target)
        patches = sum(len(one.pixels) if one.pixels.ndim == 2 else one.num_tokens for one in images)
        return sequence, Footprint(len(input_ids), patches, sum(one.mel.shape[1] for one in audios))

    def _seen(self, sample: Sample) -> tuple[tuple[Message, ...], tuple[Part, ...]]:
        """The messages that are laid out in tokens, and the answer that a head gives to them (nothing without a head)."""
        if self.rules.head is not None:
            return question_and_answer(self.rules.head, sample)
        if sample.task in TASKS and sample.messages[-1].role == "assistant" and not template.is_document(sample.messages):
            task, parts = TASKS[sample.task], sample.messages[-1].content
            task.check_question(sample.messages)
            # Other parts may stand beside those that the task asks for: a sentence beside boxes can be learnt, if not judged.
            task.check_answer([part for part in parts if part.type in task.kinds] or parts)
        return sample.messages, ()

    def _laid_out(self, messages: Sequence[Message], **lengths: Any) -> tuple[np.ndarray, np.ndarray]:
        """int32[T] twice: token ids, and the next token where it is supervised. A head's question has no supervised token."""
        if self.rules.head is not None:
            input_ids = template.prompt(messages, self.tokenizer, **lengths)
            return input_ids, np.full(len(input_ids), IGNORE_LABEL, dtype=np.int32)
        encoded = template.encode(messages, self.tokenizer, **lengths)
        labels = np.full(len(encoded.input_ids), IGNORE_LABEL, dtype=np.int32)
        labels[:-1] = np.where(encoded.supervised[1:], encoded.input_ids[1:], IGNORE_LABEL)
        return encoded.input_ids, labels


def _parts(messages: Sequence[Message], type_: str) -> list[Part]:
    return [part for message in messages for part in message.content if part.type == type_]


def _facts_of(part: Part, facts: Mapping[str, MediaFacts]) -> MediaFacts:
    found = facts.get(part.member)
    if found is None or found.type != part.type:
        raise MediaError(f"member {part.member} is missing or is no readable {part.type}")
    return found


def _content_of(part: Part, media: Mapping[str, bytes]) -> bytes:
    if part.member not in media:
        raise MediaError(f"member {part.member} is missing")
    return media[part.member]


def _tower(features, name: str):
    if features is None:
        raise MediaError(f"the model has no {name} tower; set model.{name} or leave the dataset out")
    return features
