"""Answers of a model to prompts of a task, typed and in source coordinates."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.errors import ConfigError
from megamm.core.geometry import PictureView
from megamm.inference.constrained import beam_rank
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


def rankings(
    loaded: Loaded,
    trie: ItemTrie,
    prompts: Sequence[Prompt],
    *,
    num_items: int,
    num_beams: int | None = None,
    excluded: Sequence[Sequence[str]] = (),
    least_tokens: int = 0,
) -> list[Reply]:
    """The likeliest items, best first: of all, or of those that a search with beams finds.

    Args:
        loaded: The model.
        trie: Of its items.
        prompts: Run as one batch.
        num_items: How many are kept.
        num_beams: As `beam_rank`; None ranks every item exactly.
        excluded: For each prompt items that are left out; empty for none.
        least_tokens: As `rank_items`; beams take none.

    Raises:
        ConfigError: As `check_beams`, `rank_items` and `beam_rank`.
        DataError: An excluded item is unknown.
    """
    check_beams(num_beams, num_items)
    if num_beams is None:
        ranked = rank_items(loaded, trie, prompts, excluded=excluded, max_items=num_items, least_tokens=least_tokens)
    else:
        ranked = beam_rank(loaded, trie, prompts, num_beams=num_beams, excluded=excluded)
    return [Reply(items=tuple(ranking[:num_items])) for ranking in ranked]


def check_beams(num_beams: int | None, num_items: int) -> None:
    """Refuse a search that finds fewer items than are looked at.

    Raises:
        ConfigError: It does.
    """
    if num_beams is not None and num_beams < num_items:
        raise ConfigError(
            f"{num_beams} beams find {num_beams} items at most, and {num_items} are looked at; give {num_items} beams or more"
        )
