"""Every item of a catalogue ranked exactly: the log probability of each, by teacher forcing along the trie.

A prompt is run once. Then, level by level, the beginnings of items that exist are run against its cached keys and values: many of them side
by side in one row, each seeing the prompt and its own tokens alone.

Shape legend: B prompts, P tokens of the longest prompt, N items, C nodes of a chunk, D depth of a node, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megamm.core.errors import ConfigError
from megamm.core.predictions import RankedItem
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, left_padded

_CHUNK_ELEMENTS = 1 << 25
"""Bound on the logits and on the attention mask of a chunk."""


def rank_items(
    loaded: Loaded,
    trie: ItemTrie,
    prompts: Sequence[Prompt],
    *,
    excluded: Sequence[Sequence[str]] = (),
    max_items: int | None = None,
    least_tokens: int = 0,
) -> list[list[RankedItem]]:
    """All items for each prompt, the likeliest to come first in the answer first.

    Args:
        loaded: The model.
        trie: Of its items, `ItemTrie.of(loaded)`.
        prompts: Run as one batch.
        excluded: For each prompt items that are left out, such as those already bought; empty for none.
        max_items: How many are wanted; None for all.
        least_tokens: As `item_log_probabilities`.

    Raises:
        ConfigError: As `item_log_probabilities`, or not one list of excluded items a prompt.
        DataError: An excluded item is unknown.
    """
    if excluded and len(excluded) != len(prompts):
        raise ConfigError(f"{len(excluded)} lists of excluded items for {len(prompts)} prompts; give one for each")
    if not prompts:
        return []
    scores = item_log_probabilities(loaded, trie, prompts, least_tokens=least_tokens).cpu().numpy()
    rankings = []
    for row, of_prompt in enumerate(scores):
        left_out = {trie.table.row_of(item) for item in excluded[row]} if excluded else set()
        order = [index for index in np.argsort(-of_prompt, kind="stable").tolist() if index not in left_out]
        rankings.append([RankedItem(trie.table.ids[index], float(of_prompt[index])) for index in order[:max_items]])
    return rankings


# Not inference_mode: weights that ZeRO-3 gathers in here stay, and training goes on with them.
@torch.no_grad()
def item_log_probabilities(loaded: Loaded, trie: ItemTrie, prompts: Sequence[Prompt], *, least_tokens: int = 0) -> torch.Tensor:
    """float32[B, N]: log probability, in nats, that each prompt's answer begins with each item, in the order of `trie.table.ids`.

    Over the whole vocabulary, so that they sum to the probability that the answer begins with an item at all.

    Args:
        loaded: The model.
        trie: Of its items.
        prompts: Run as one batch.
        least_tokens: Rows are made so long. Equally many rows of equal length take equally many forwards, whatever they hold.

    Raises:
        ConfigError: The decoder does not attend to everything before a token, or a prompt with an item is longer than its positions.
    """
    config = loaded.config.text_config
    _check_decoder(config)
    inputs = left_padded(prompts, loaded.config.pad_token_id, loaded.device, least_tokens=least_tokens)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    if num_prompt_tokens + trie.num_levels > config.max_position_embeddings:
        raise ConfigError(
            f"a prompt of {num_prompt_tokens} tokens and an item of {trie.num_levels} exceed the decoder's "
            f"{config.max_position_embeddings} positions; show a shorter history"
        )
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prefill = loaded.model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    scores = _children(trie, 0, slice(0, 1), prefill.logits, scores=mask.new_zeros((len(prompts), 1), dtype=torch.float32))
    for depth in range(1, trie.num_levels):
        chunks = []
        for nodes in _chunks(trie, depth, num_prompt_tokens, len(prompts), loaded.config.text_config.vocab_size):
            logits = _run_beginnings(loaded, trie, depth, nodes, prompt_mask=mask, cache=prefill.past_key_values)
            chunks.append(_children(trie, depth, nodes, logits, scores=scores))
        scores = torch.cat(chunks, dim=1)
    return scores[:, torch.from_numpy(trie.places).to(scores.device)]


def _children(trie: ItemTrie, depth: int, nodes: slice, logits_BCV: torch.Tensor, *, scores: torch.Tensor) -> torch.Tensor:
    """float32[B, children]: log probabilities of all children of some nodes of a depth; `scores` are those of the depth's nodes."""
    borders, below = trie.borders(depth), trie.borders(depth + 1)
    first, last = borders[nodes.start], borders[nodes.stop]
    starts = below[np.searchsorted(below, first) : np.searchsorted(below, last)]
    parents = torch.from_numpy(np.searchsorted(borders, starts, side="right") - 1).to(scores.device)
    tokens = torch.from_numpy(trie.tokens[starts, depth]).to(scores.device)
    logits = logits_BCV.float()
    return scores[:, parents] + logits[:, parents - nodes.start, tokens] - logits.logsumexp(-1)[:, parents - nodes.start]


def _chunks(trie: ItemTrie, depth: int, num_prompt_tokens: int, num_prompts: int, num_ids: int) -> Iterator[slice]:
    """Runs of nodes of a depth that are small enough to be computed at once."""
    num_nodes = len(trie.borders(depth)) - 1
    by_logits = _CHUNK_ELEMENTS // (num_prompts * num_ids)
    # The mask of C nodes has B·CD·(P + CD) elements.
    by_mask = int((np.sqrt(num_prompt_tokens**2 + 4 * _CHUNK_ELEMENTS / num_prompts) - num_prompt_tokens) / 2) // depth
    size = max(1, min(by_logits, by_mask))
    for start in range(0, num_nodes, size):
        yield slice(start, min(start + size, num_nodes))


def _run_beginnings(loaded: Loaded, trie: ItemTrie, depth: int, nodes: slice, *, prompt_mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """float[B, C, V]: logits after the tokens that lead to some nodes; the cache is left as it was."""
    device, num_prompts = prompt_mask.device, len(prompt_mask)
    beginnings = torch.from_numpy(trie.tokens[trie.borders(depth)[nodes.start : nodes.stop], :depth].copy()).to(device)
    num_tokens = beginnings.numel()
    dtype = loaded.model.dtype
    # A token sees the prompt without its padding, and the tokens of its own beginning up to itself.
    place = torch.arange(num_tokens, device=device)
    among = (place[:, None] // depth == place // depth) & (place[:, None] >= place)
    sees = torch.cat([prompt_mask.bool()[:, None].expand(-1, num_tokens, -1), among.expand(num_prompts, -1, -1)], dim=2)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    positions = prompt_mask.sum(1, keepdim=True) + place % depth
    output = loaded.model(
        input_ids=beginnings.flatten().expand(num_prompts, -1),
        position_ids=positions,
        attention_mask=mask[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.arange(depth - 1, num_tokens, depth, device=device),
    )
    cache.crop(-num_tokens)
    return output.logits


def _check_decoder(config: Any) -> None:
    """Refuse decoders whose cache cannot be shared by beginnings side by side."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    implementation = config._attn_implementation or "sdpa"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise ConfigError(
            f"exact ranking needs a decoder that attends to all tokens before, this {config.model_type} has {', '.join(sorted(kinds))} "
            f"and sliding_window={getattr(config, 'sliding_window', None)}; rank with beams instead (--num-beams)"
        )
    if "flash" in implementation or "flex" in implementation:
        raise ConfigError(f"exact ranking gives attention a mask, which {implementation} does not take; load the model with 'sdpa'")
