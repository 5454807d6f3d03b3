"""Answers of a model to prompts of a task, typed and in source coordinates."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.geometry import PictureView
from megamm.inference.generate import Sampling, generate
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt
from megamm.inference.ranking import rank_items
from megamm.tasks.reply import Reply, read_reply


def answers(
    loaded: Loaded, prompts: Sequence[Prompt], views: Sequence[PictureView | None], *, max_new_tokens: int, in_step: bool = False
) -> list[Reply]:
    """Greedy answers.

    Args:
        loaded: The model.
        prompts: Run as one batch.
        views: Of each prompt the picture that its answer is about.
        max_new_tokens: Bound on an answer.
        in_step: As `generate`.
    """
    said = generate(loaded, prompts, Sampling(max_new_tokens=max_new_tokens), in_step=in_step)
    return [
        read_reply(answer.token_ids, loaded.tokenizer, view, probabilities=answer.probabilities, is_finished=answer.is_finished)
        for answer, view in zip(said, views, strict=True)
    ]


def rankings(loaded: Loaded, trie: ItemTrie, prompts: Sequence[Prompt], *, num_items: int, least_tokens: int = 0) -> list[Reply]:
    """The likeliest items of all, best first.

    Args:
        loaded: The model.
        trie: Of its items.
        prompts: Run as one batch.
        num_items: How many are kept.
        least_tokens: As `rank_items`.
    """
    ranked = rank_items(loaded, trie, prompts, max_items=num_items, least_tokens=least_tokens)
    return [Reply(items=tuple(ranking)) for ranking in ranked]
