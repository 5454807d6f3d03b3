"""What a model's head says of samples, in source coordinates and in the same type as what tokens say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megamm.config import Head
from megamm.core.errors import ConfigError
from megamm.core.predictions import LIKELY
from megamm.core.types import IGNORE_LABEL, Message, PackedRow, Sample, TokenSequence
from megamm.data.loading.collate import collate
from megamm.data.samples.targets import check_question
from megamm.inference.load import Loaded
from megamm.inference.prompt import make_prompt
from megamm.models.heads.head import BackboneHead
from megamm.models.inputs import batch_inputs
from megamm.tasks.reply import Reply


def predict(loaded: Loaded, samples: Sequence[Sample], *, batch_size: int = 16) -> list[Reply]:
    """Ask the head about samples, one a row; an answer that a sample already has is not looked at.

    Args:
        loaded: A model with a head.
        samples: With their media.
        batch_size: Samples that run at once.

    Raises:
        ConfigError: The model has no head.
        DataError: A medium is missing or cannot be decoded, or a sample lacks the one picture or sound that the head looks at.
    """
    found = []
    for start in range(0, len(samples), batch_size):
        found += answers(loaded, [question(loaded, sample) for sample in samples[start : start + batch_size]])
    return found


def question(loaded: Loaded, sample: Sample) -> TokenSequence:
    """What the head is to answer of a sample: its chat up to where the assistant's answer begins.

    Raises:
        ConfigError: The model has no head.
        DataError: As `predict`.
    """
    messages: Sequence[Message] = sample.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    check_question(_head(loaded).settings, messages)
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
def answers(loaded: Loaded, questions: Sequence[TokenSequence]) -> list[Reply]:
    """What the head says of questions.

    Args:
        loaded: A model with a head.
        questions: From `question`, run as one batch; of none the model runs on an empty row, as ranks in step must.

    Returns:
        A reply each, as `megamm.tasks` judge it: the likeliest label, or all likely ones between commas, with the score of every label;
        boxes; instances; or the text.

    Raises:
        ConfigError: The model has no head.
    """
    head = _head(loaded)
    row_tokens = max((len(one.input_ids) for one in questions), default=1)
    tasks = tuple({one.task for one in questions})
    batch = collate([PackedRow([one]) for one in questions] or [PackedRow()], row_tokens, loaded.config.pad_token_id, tasks)
    inputs = batch_inputs(batch, loaded.device, loaded.model.dtype)
    # The head's logits alone are wanted: those of one token are the fewest that the model gives.
    logits = loaded.model(**inputs | {"labels": None, "weights": None, "logits_to_keep": 1, "run_head": True}).head_logits
    views = [one.images[0].view if one.images else None for one in questions]
    if not questions:
        return []
    typed = [_typed(head.settings, said) for said in head.decode(logits, views)]
    # What is made of logits, such as the likeliest character, may not show that they are no numbers.
    is_finite = [all(bool(values[row].isfinite().all()) for values in logits.values()) for row in range(len(questions))]
    return [replace(reply, is_finite=known) for reply, known in zip(typed, is_finite, strict=True)]


def _head(loaded: Loaded) -> BackboneHead:
    head = loaded.model.head
    if head is None:
        raise ConfigError(f"{loaded.source} has no head; ask it in tokens (`generate`), or train one with model.head")
    return head


def _typed(settings: Head, said: Any) -> Reply:
    if settings.kind == "ctc":
        return Reply(said)
    if settings.kind == "detector":
        return Reply(boxes=tuple(said))
    if settings.kind == "segmenter":
        return Reply(instances=tuple(said))
    likely = {one.label for one in said if one.score >= LIKELY} if settings.multi_label else {said[0].label}
    return Reply(", ".join(label for label in settings.labels if label in likely), labels=tuple(said))
