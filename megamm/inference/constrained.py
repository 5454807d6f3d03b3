"""Answers that hold existing items only: a filter of next tokens for transformers' `generate`, alone or with beams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from megamm.core.errors import ConfigError
from megamm.core.predictions import RankedItem
from megamm.inference.generate import stop_ids
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, left_padded

_NEVER = -1e8
"""Scores below are of beams that had nowhere to go: transformers gives these -1e9."""


class OnlyItems(LogitsProcessor):
    """Leaves of the next tokens those that go on with an existing item that is not there yet, or end the answer. Holds no state.

    With beams it runs on log probabilities and does not scale them up, so that a score stays what the model gives the item.
    """

    def __init__(
        self,
        trie: ItemTrie,
        *,
        num_prompt_tokens: int,
        end_id: int,
        num_items: int,
        min_items: int,
        excluded: Sequence[np.ndarray],
    ) -> None:
        """Say what may come out.

        Args:
            trie: Of the items.
            num_prompt_tokens: Length of the padded prompts.
            end_id: `<|end|>`.
            num_items: Most items of an answer.
            min_items: Fewest items of an answer.
            excluded: For each prompt ascending places of items that must not come out.
        """
        self._trie, self._start, self._end_id = trie, num_prompt_tokens, end_id
        self._num_items, self._min_items, self._excluded = num_items, min_items, excluded

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token, minus infinity where it leads to no item."""
        rows = input_ids[:, self._start :].tolist()
        # Beams of a prompt stand together.
        num_beams = len(rows) // len(self._excluded)
        left = torch.full_like(scores, -torch.inf)
        for row, written in enumerate(rows):
            allowed = torch.from_numpy(self._allowed(written, self._excluded[row // num_beams])).to(scores.device)
            left[row, allowed] = scores[row, allowed]
        return left

    def _allowed(self, written: list[int], excluded: np.ndarray) -> np.ndarray:
        """int64: what may follow `written`."""
        end, levels = np.array([self._end_id]), self._trie.num_levels
        whole = len(written) // levels
        nodes = [self._trie.walk(written[index * levels : (index + 1) * levels]) for index in range(whole)]
        node = self._trie.walk(written[whole * levels :])
        # An answer that ended, or a beam that had nowhere to go.
        if node is None or None in nodes or whole >= self._num_items:
            return end
        without = np.union1d(excluded, [found.start for found in nodes if found is not None])
        tokens = self._trie.next_tokens(node, without.astype(np.int64))
        if node.depth == 0 and (whole >= self._min_items or not tokens.size):
            return np.concatenate([tokens, end])
        return tokens


def answer_items(
    loaded: Loaded,
    trie: ItemTrie,
    prompts: Sequence[Prompt],
    *,
    num_items: int,
    min_items: int = 1,
    num_beams: int = 1,
    excluded: Sequence[Sequence[str]] = (),
) -> list[list[str]]:
    """The likeliest answer to each prompt, as different existing items in the order they are written.

    Args:
        loaded: The model.
        trie: Of its items, `ItemTrie.of(loaded)`.
        prompts: Run as one batch.
        num_items: Most items of an answer.
        min_items: Fewest items of an answer, where there are so many.
        num_beams: 1 for greedy answers.
        excluded: For each prompt items that must not come out, such as those already bought; empty for none.

    Raises:
        ConfigError: Numbers that contradict each other, or a prompt with its answer is longer than the decoder's positions.
        DataError: An excluded item is unknown.
    """
    if not 0 <= min_items <= num_items or num_items < 1 or num_beams < 1:
        raise ConfigError(
            f"min_items={min_items}, num_items={num_items}, num_beams={num_beams} give no answer; take 1 or more "
            "items and beams, and a min_items from 0 to num_items"
        )
    output = _generate(
        loaded, trie, prompts, num_items=num_items, min_items=min_items, num_beams=num_beams, num_answers=1, excluded=excluded, is_open=True
    )
    return [_items(trie, written) for written, _ in output]


def beam_rank(
    loaded: Loaded, trie: ItemTrie, prompts: Sequence[Prompt], *, num_beams: int, excluded: Sequence[Sequence[str]] = ()
) -> list[list[RankedItem]]:
    """The items that a search with beams finds likeliest to come first in the answer, best first.

    For catalogues of any size; `ranking.rank_items` is exact. As many beams as items make this exact as well.

    Args:
        loaded: The model.
        trie: Of its items.
        prompts: Run as one batch.
        num_beams: Beginnings of items that are kept at each level, and items returned at most.
        excluded: For each prompt items that must not come out; empty for none.

    Raises:
        ConfigError: No beam, or a prompt with an item is longer than the decoder's positions.
        DataError: An excluded item is unknown.
    """
    if num_beams < 1:
        raise ConfigError(f"num_beams={num_beams} finds nothing; give 1 or more")
    output = _generate(
        loaded, trie, prompts, num_items=1, min_items=1, num_beams=num_beams, num_answers=num_beams, excluded=excluded, is_open=False
    )
    rankings = []
    for start in range(0, len(output), num_beams):
        found: dict[str, float] = {}
        for written, score in output[start : start + num_beams]:
            # What is no number is no less: whoever asked shall see that the model overflows.
            if not score <= _NEVER and (node := trie.walk(written[: trie.num_levels])) is not None:
                found.setdefault(trie.item_at(node.start), score)
        rankings.append([RankedItem(item, score) for item, score in found.items()])
    return rankings


@torch.inference_mode()
def _generate(
    loaded: Loaded,
    trie: ItemTrie,
    prompts: Sequence[Prompt],
    *,
    num_items: int,
    min_items: int,
    num_beams: int,
    num_answers: int,
    excluded: Sequence[Sequence[str]],
    is_open: bool,
) -> list[tuple[list[int], float]]:
    """Written tokens and summed log probability of `num_answers` answers a prompt; `is_open` answers end with `<|end|>`."""
    if not prompts:
        return []
    if excluded and len(excluded) != len(prompts):
        raise ConfigError(f"{len(excluded)} lists of excluded items for {len(prompts)} prompts; give one for each")
    inputs = left_padded(prompts, loaded.config.pad_token_id, loaded.device)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    num_new = num_items * trie.num_levels + is_open
    limit = loaded.config.text_config.max_position_embeddings
    if num_prompt_tokens + num_new > limit:
        raise ConfigError(
            f"a prompt of {num_prompt_tokens} tokens and {num_items} items of {trie.num_levels} exceed the decoder's {limit} positions; "
            "show a shorter history or ask for fewer items"
        )
    only = OnlyItems(
        trie,
        num_prompt_tokens=num_prompt_tokens,
        end_id=loaded.tokenizer.vocabulary.control_id("end"),
        num_items=num_items,
        min_items=min_items,
        excluded=[trie.places_of(items) for items in excluded] or [np.zeros(0, dtype=np.int64)] * len(prompts),
    )
    # Without a penalty on lengths a score is the plain sum.
    search = {"num_beams": num_beams, "num_return_sequences": num_answers, "length_penalty": 0.0} if num_beams > 1 else {}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_new,
        eos_token_id=list(stop_ids(loaded)),
        pad_token_id=loaded.config.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=num_beams == 1,
        **search,
    )
    output = loaded.model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([only]))
    written = output.sequences[:, num_prompt_tokens:].tolist()
    scores = output.sequences_scores if num_beams > 1 else _greedy_scores(output.logits, output.sequences[:, num_prompt_tokens:])
    return list(zip(written, scores.tolist(), strict=True))


def _greedy_scores(logits: Sequence[torch.Tensor], written: torch.Tensor) -> torch.Tensor:
    """float32[B]: summed log probability of what was written."""
    chosen = [one.float().log_softmax(-1).gather(1, written[:, step : step + 1]) for step, one in enumerate(logits)]
    return torch.cat(chosen, dim=1).sum(1)


def _items(trie: ItemTrie, written: list[int]) -> list[str]:
    """The whole items at the beginning of what was written."""
    items = []
    for start in range(0, len(written) - trie.num_levels + 1, trie.num_levels):
        node = trie.walk(written[start : start + trie.num_levels])
        if node is None:
            break
        items.append(trie.item_at(node.start))
    return items
