"""Which answer is explained: what the model says, what its head says, or what somebody gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from megamm.core.errors import ConfigError
from megamm.core.names import did_you_mean
from megamm.inference.explain.log_odds import LogOdds, alone
from megamm.inference.explain.question import Answer, Question
from megamm.inference.generate import Sampling, generate
from megamm.inference.load import Loaded
from megamm.models.heads.linear import LinearHead
from megamm.tokenizers.text import TextTokenizer


def find_answer(loaded: Loaded, question: Question, given: str | None, *, max_new_tokens: int) -> Answer:
    """The answer that is explained: what the model says greedily, or its head's likeliest label, or what is given.

    Raises:
        ConfigError: The answer is empty or no label of the head, the head is not linear or has nothing to look at, or all is longer
            than the decoder's positions.
    """
    if loaded.model.head is not None:
        return _find_label(loaded, question, given)
    if given is None:
        said = generate(loaded, [question.prompt], Sampling(max_new_tokens=max_new_tokens))[0]
        if not said.token_ids:
            raise ConfigError("the model answers with nothing, which cannot be explained; name an answer with --answer")
        return Answer(_words(said.token_ids, loaded.tokenizer), said.token_ids, is_finished=said.is_finished)
    ids = tuple(loaded.tokenizer.encode(given))
    if not ids:
        raise ConfigError("--answer '' holds no token; name an answer, or leave it out for the model's own")
    limit, num_tokens = loaded.config.text_config.max_position_embeddings, len(question.prompt.input_ids) + len(ids)
    if num_tokens > limit:
        raise ConfigError(f"the question and --answer take {num_tokens} tokens, more than the decoder's {limit} positions; shorten them")
    return Answer(given, ids, is_given=True)


def _words(token_ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """Tokens as they can be read: texts as they are, all others, such as locations, by the names of their kinds."""
    vocabulary = tokenizer.vocabulary
    runs = groupby(token_ids, key=lambda one: vocabulary.describe(one)[0] == "text")
    return "".join(tokenizer.decode(run) if is_text else "".join(map(vocabulary.token_string, run)) for is_text, run in runs)


def _find_label(loaded: Loaded, question: Question, given: str | None) -> Answer:
    head = loaded.model.head.kind
    if not isinstance(head, LinearHead):
        kind = loaded.model.head.settings.kind
        raise ConfigError(f"a {kind} head gives no label that could be explained; explain a run with a linear head or without a head")
    if given is not None and given not in head.labels:
        raise ConfigError(f"--answer {given!r} is no label of the head{did_you_mean(given, head.labels)}")
    if given is not None:
        return Answer(given, label=head.labels.index(given), is_given=True)
    any_label = LogOdds(loaded, question, Answer("", label=0))
    with torch.no_grad():
        logits, _ = any_label.logits(alone(any_label.values))
    label = int(logits.argmax())
    return Answer(head.labels[label], label=label)
