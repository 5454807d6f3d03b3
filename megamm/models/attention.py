"""Attention over packed rows: a token sees its own document and nothing else, in the decoder only the tokens before it.

The patches of several pictures are packed as documents as well, so that a small picture beside a large one costs what it is.

An attention layer may hold a learned prefix (`adapters.Prefix`): keys and values that every token of every document sees besides.

Shape legend: B rows, S tokens of a row, H query heads, K key-value heads, D head size, T tokens of one document, P of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

DOCUMENT_ATTENTION = "megamm_documents"
"""Name under which transformers knows this attention."""

KeysValues: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Keys and values of a prefix, [K, P, D] each."""

_PADDING_BLOCK = 128
# Up to here a product, a softmax and a product are faster in bfloat16 on a CPU than torch's fused kernel, which converts every block:
# 6 times at 35 tokens, 2 times at 512, forward and backward together; in float32 both take as long.
_LONGEST_PRODUCT = 512


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch of packed rows lie; made once a forward and handed to every layer.

    Attributes:
        groups: (number of documents, their length in tokens), shortest first; a group is one call. Padding is in none. Empty
            where the variable-length kernel runs.
        places: int64[tokens of all groups], the groups' tokens in order as places in the flattened batch; on the device of the
            model. None where the variable-length kernel runs.
        boundaries: int32[number of documents + 1], first token of every document in the flattened batch, padding
            included; on the device of the model. None where the variable-length kernel does not run.
        longest: Length in tokens of the longest document between `boundaries`; 0 without them.
    """

    groups: tuple[tuple[int, int], ...]
    places: torch.Tensor | None
    boundaries: torch.Tensor | None
    longest: int


def make_documents(document_lengths: Sequence[Sequence[int]], num_padding: Sequence[int] | None, embeds_BSE: torch.Tensor) -> Documents:
    """Describe the documents of a batch.

    Args:
        document_lengths: For each row the lengths of all its documents; they sum to S.
        num_padding: For each row how many tokens its last document holds if that is padding, else 0; None for none.
        embeds_BSE: Embeddings of the batch, for its shape, device and type.

    Raises:
        ValueError: Lengths that do not fill the rows, or padding that is not the last document.
    """
    num_rows, row_tokens = embeds_BSE.shape[:2]
    padding = [0] * num_rows if num_padding is None else list(num_padding)
    if len(document_lengths) != num_rows or len(padding) != num_rows:
        raise ValueError(f"document_lengths has {len(document_lengths)} rows and num_padding {len(padding)}; input_ids has {num_rows}")
    real: list[tuple[int, ...]] = []
    for row, (lengths, padded) in enumerate(zip(document_lengths, padding, strict=True)):
        if sum(lengths) != row_tokens or min(lengths) < 1:
            raise ValueError(f"document_lengths[{row}]={list(lengths)} must be positive and sum to the row's {row_tokens} tokens")
        if padded and lengths[-1] != padded:
            raise ValueError(f"num_padding[{row}]={padded} is not the row's last document ({lengths[-1]} tokens)")
        # A row without documents attends over one token of padding: queries and keys stay in the graph, so that the backward
        # enters the same modules on every rank.
        real.append(tuple(lengths[:-1] if padded else lengths) or (1,))
    if not _runs_varlen(embeds_BSE):
        return _grouped(real, row_tokens, embeds_BSE.device)
    pieces = [piece for lengths in real for piece in (*lengths, *_padding_pieces(row_tokens - sum(lengths)))]
    boundaries = torch.tensor([0, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents((), None, boundaries.to(embeds_BSE.device, non_blocking=True), max(pieces))


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within documents; without `documents` this is transformers' `sdpa`, KV cache and masks included.

    Args:
        module: The attention layer that calls; its `prefix`, where it has one, stands before every document, and its `is_causal` says
            whether a token sees those behind it.
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        attention_mask: Read only without `documents`; towers whose layers hand nothing else through give those here.
        documents: What `make_documents` returned for this batch.
        scaling: Factor on the scores.
        dropout: Must be 0 over documents.
        sliding_window: Must be None over documents.
        kwargs: Passed to `sdpa`.

    Returns:
        [B, S, H, D], zero or arbitrary (but finite and independent of every document) on padding; and None for weights.

    Raises:
        ValueError: Dropout or a sliding window over documents.
    """
    # Always called, whatever the rows hold: ranks must gather it in the same order.
    prefix = module.prefix() if hasattr(module, "prefix") else None
    if isinstance(attention_mask, Documents):
        documents = attention_mask
    elif documents is None:
        if prefix is not None:
            key, value, attention_mask = _behind_prefix(prefix, query, key, value, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if dropout or sliding_window is not None:
        raise ValueError(
            f"attention over packed documents has no dropout ({dropout}) and no sliding window ({sliding_window}); "
            "set attention_dropout=0 and use_sliding_window=false in the config of the decoder or vision tower"
        )
    is_causal = getattr(module, "is_causal", True)
    run = _group_by_group if documents.boundaries is None else _varlen
    return run(query, key, value, documents, scaling, prefix, is_causal=is_causal), None


def _behind_prefix(
    prefix: KeysValues, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values of unpacked rows with the prefix before them, and the mask over both; the KV cache never holds a prefix."""
    num_tokens, num_keys = query.shape[2], key.shape[2]
    num_prefix = prefix[0].shape[1]
    key, value = (torch.cat([own.expand(key.shape[0], -1, -1, -1), x], dim=2) for own, x in zip(prefix, (key, value), strict=True))
    if mask is not None:
        return key, value, F.pad(mask, (num_prefix, 0), value=True if mask.dtype == torch.bool else 0.0)
    if num_tokens > 1:
        mask = query.new_ones((num_tokens, num_prefix + num_keys), dtype=torch.bool).tril(num_prefix + num_keys - num_tokens)[None, None]
    return key, value, mask


def _group_by_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    prefix: KeysValues | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """One call for all documents of a length: short documents cost a kernel call more than they cost arithmetic."""
    before = _before_documents(prefix, query)
    num_rows, num_heads, row_tokens, _ = query.shape
    sizes = [count * length for count, length in documents.groups]
    # All groups in one selection: a backward of many selections would add up as many gradients of the whole batch.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).index_select(0, documents.places).split(sizes) for x in (query, key, value))
    outputs = [
        _attend(
            *(_with_prefix(own, x[group].unflatten(0, shape)).transpose(1, 2) for own, x in zip(before, (q, k, v), strict=True)),
            is_causal=is_causal,
            scaling=scaling,
        )[:, :, 0 if prefix is None else prefix[0].shape[1] :]
        for group, shape in enumerate(documents.groups)
    ]
    real = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    out = real.new_zeros(num_rows * row_tokens, num_heads, value.shape[3]).index_copy(0, documents.places, real)
    return out.view(num_rows, row_tokens, num_heads, value.shape[3])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scaling: float | None) -> torch.Tensor:
    """[N, H, T, D] from [N, H, T, D] and twice [N, K, T, D]."""
    num_heads, num_tokens, head_size = query.shape[1:]
    groups = num_heads // key.shape[1]
    if query.is_cuda or query.dtype != torch.bfloat16 or num_tokens > _LONGEST_PRODUCT:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=groups > 1)
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (head_size**-0.5 if scaling is None else scaling)
    if is_causal:
        later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ value


def _before_documents(prefix: KeysValues | None, query: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What stands before each document's queries, keys and values: [P, heads, D] each, or nothing.

    Queries of zeros, whose results are dropped, keep the attention causal and square, which is all that the fast kernels do.
    """
    if prefix is None:
        return None, None, None
    keys, values = (x.transpose(0, 1) for x in prefix)
    return query.new_zeros(keys.shape[0], query.shape[1], query.shape[3]), keys, values


def _with_prefix(own: torch.Tensor | None, documents: torch.Tensor) -> torch.Tensor:
    """[documents, T, heads, D] with [P, heads, D] before each."""
    return documents if own is None else torch.cat([own.expand(documents.shape[0], -1, -1, -1), documents], dim=1)


def _grouped(lengths: Sequence[Sequence[int]], row_tokens: int, device: torch.device) -> Documents:
    starts: dict[int, list[int]] = {}
    for row, of_row in enumerate(lengths):
        place = row * row_tokens
        for length in of_row:
            starts.setdefault(length, []).append(place)
            place += length
    groups = tuple((len(first), length) for length, first in sorted(starts.items()))
    places = torch.cat([(torch.tensor(starts[length]).unsqueeze(1) + torch.arange(length)).flatten() for _, length in groups])
    return Documents(groups, places.to(device, non_blocking=True), None, 0)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    prefix: KeysValues | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    num_rows, num_heads, row_tokens, head_size = query.shape
    groups = num_heads // key.shape[1]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    bounds, longest, places = documents.boundaries, documents.longest, None
    if prefix is not None:
        num_prefix = prefix[0].shape[1]
        flat, places = _insert_prefix(_before_documents(prefix, query), flat, bounds)
        bounds, longest = bounds + num_prefix * torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device), longest + num_prefix
    # Repeated heads, because grouped queries came to this kernel only after its first releases.
    q, k, v = (x.repeat_interleave(groups, dim=1) if x.shape[1] != num_heads else x for x in flat)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0) if is_causal else (-1, -1))
    return (out if places is None else out[places]).view(num_rows, row_tokens, num_heads, head_size)


def _insert_prefix(
    before: Sequence[torch.Tensor], flat: Sequence[torch.Tensor], bounds: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The flattened batch with the prefix before each document of `bounds`, and where each of its own tokens went."""
    num_documents, num_tokens, num_prefix = len(bounds) - 1, flat[0].shape[0], before[0].shape[0]
    tokens = torch.arange(num_tokens, device=bounds.device)
    places = tokens + num_prefix * torch.bucketize(tokens, bounds[1:].long(), right=True).add(1)
    starts = bounds[:-1] + num_prefix * torch.arange(num_documents, device=bounds.device)
    prefix_places = (starts[:, None] + torch.arange(num_prefix, device=bounds.device)).flatten()
    size = num_tokens + num_documents * num_prefix
    longer = [
        x.new_zeros(size, *x.shape[1:]).index_copy(0, places, x).index_copy(0, prefix_places, own.to(x.dtype).repeat(num_documents, 1, 1))
        for own, x in zip(before, flat, strict=True)
    ]
    return longer, places


def _runs_varlen(embeds: torch.Tensor) -> bool:
    return varlen_attn is not None and embeds.is_cuda and embeds.dtype in (torch.bfloat16, torch.float16)


def _padding_pieces(num_tokens: int) -> list[int]:
    """Padding as short documents, so that an empty row costs next to nothing."""
    full, rest = divmod(num_tokens, _PADDING_BLOCK)
    return [_PADDING_BLOCK] * full + ([rest] if rest else [])


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
