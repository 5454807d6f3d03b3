"""What a model's head says of samples, in source coordinates and in the same type as what tokens say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamm.config import Head
from megamm.core.errors import ConfigError
from megamm.core.predictions import LabelScore
from megamm.core.types import IGNORE_LABEL, Message, PackedRow, Sample, TokenSequence
from megamm.data.loading.collate import collate
from megamm.data.samples.targets import check_question
from megamm.inference.load import Loaded
from megamm.inference.prompt import make_prompt
from megamm.models.heads.head import BackboneHead
from megamm.models.inputs import batch_inputs
from megamm.tasks.reply import Reply

_LIKELY = 0.5


@dataclass(frozen=True, slots=True)
class HeadAnswer:
    """What a head says of a sample.

    Attributes:
        reply: As `megamm.tasks` judge it: the likeliest label, or all likely ones between commas; boxes; instances; or the text.
        labels: Of a `linear` head every label with its score, the likeliest first.
    """

    reply: Reply
    labels: tuple[LabelScore, ...] = ()


def predict(loaded: Loaded, samples: Sequence[Sample], *, batch_size: int = 16) -> list[HeadAnswer]:
    """Ask the head about samples, one a row; an answer that a sample already has is not looked at.

    Args:
        loaded: A model with a head.
        samples: With their media.
        batch_size: Samples that run at once.

    Raises:
        ConfigError: The model has no head.
        DataError: A medium is missing or cannot be decoded, or a sample lacks the one picture or sound that the head looks at.
    """
    head = loaded.model.head
    if head is None:
        raise ConfigError(f"{loaded.source} has no head; ask it in tokens (`generate`), or train one with model.head")
    answers = []
    for start in range(0, len(samples), batch_size):
        answers += _answer(loaded, head, [_sequence(loaded, head.settings, sample) for sample in samples[start : start + batch_size]])
    return answers


def _sequence(loaded: Loaded, settings: Head, sample: Sample) -> TokenSequence:
    messages: Sequence[Message] = sample.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    check_question(settings, messages)
    prompt = make_prompt(loaded, messages, sample.media)
    num_tokens = len(prompt.input_ids)
    return TokenSequence(
        dataset="",
        key=sample.key,
        task=sample.task,
        input_ids=prompt.input_ids,
        labels=np.full(num_tokens, IGNORE_LABEL, dtype=np.int32),
        weights=np.zeros(num_tokens, dtype=np.float32),
        images=list(prompt.images),
        audios=list(prompt.audios),
    )


@torch.no_grad()
def _answer(loaded: Loaded, head: BackboneHead, sequences: Sequence[TokenSequence]) -> list[HeadAnswer]:
    row_tokens = max(len(sequence.input_ids) for sequence in sequences)
    tasks = tuple({sequence.task for sequence in sequences})
    batch = collate([PackedRow([sequence]) for sequence in sequences], row_tokens, loaded.config.pad_token_id, tasks)
    inputs = batch_inputs(batch, loaded.device, loaded.model.dtype)
    # The head's logits alone are wanted: those of one token are the fewest that the model gives.
    logits = loaded.model(**inputs | {"labels": None, "weights": None, "logits_to_keep": 1, "run_head": True}).head_logits
    views = [sequence.images[0].view if sequence.images else None for sequence in sequences]
    return [_typed(head.settings, answer) for answer in head.decode(logits, views)]


def _typed(settings: Head, answer: Any) -> HeadAnswer:
    if settings.kind == "ctc":
        return HeadAnswer(Reply(answer))
    if settings.kind == "detector":
        return HeadAnswer(Reply(boxes=answer))
    if settings.kind == "segmenter":
        return HeadAnswer(Reply(instances=answer))
    likely = [one.label for one in answer if one.score >= _LIKELY] if settings.multi_label else [answer[0].label]
    return HeadAnswer(Reply(", ".join(likely)), answer)
