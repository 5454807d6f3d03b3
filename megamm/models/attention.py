"""Causal attention over packed rows: a token sees the earlier tokens of its own document and nothing else.

Shape legend: B rows, S tokens of a row, H query heads, K key-value heads, D head size, T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

_PADDING_BLOCK = 128


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
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within documents; without `documents` this is transformers' `sdpa`, KV cache and masks included.

    Args:
        module: The attention layer that calls.
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        attention_mask: Read only without `documents`.
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
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if dropout or sliding_window is not None:
        raise ValueError(
            f"attention over packed documents has no dropout ({dropout}) and no sliding window ({sliding_window}); "
            "set attention_dropout=0 and use_sliding_window=false in the text config"
        )
    if documents.boundaries is not None:
        return _varlen(query, key, value, documents, scaling), None
    return _group_by_group(query, key, value, documents, scaling), None


def _group_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None
) -> torch.Tensor:
    """One call for all documents of a length: short documents cost a kernel call more than they cost arithmetic."""
    num_rows, num_heads, row_tokens, _ = query.shape
    sizes = [count * length for count, length in documents.groups]
    # All groups in one selection: a backward of many selections would add up as many gradients of the whole batch.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).index_select(0, documents.places).split(sizes) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            *(x[group].unflatten(0, shape).transpose(1, 2) for x in (q, k, v)),
            is_causal=True,
            scale=scaling,
            enable_gqa=num_heads != key.shape[1],
        )
        for group, shape in enumerate(documents.groups)
    ]
    real = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    out = real.new_zeros(num_rows * row_tokens, num_heads, value.shape[3]).index_copy(0, documents.places, real)
    return out.view(num_rows, row_tokens, num_heads, value.shape[3])


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


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None) -> torch.Tensor:
    num_rows, num_heads, row_tokens, head_size = query.shape
    groups = num_heads // key.shape[1]
    # Repeated heads, because grouped queries came to this kernel only after its first releases.
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    q, k, v = (x.transpose(1, 2).reshape(num_rows * row_tokens, num_heads, head_size) for x in (query, key, value))
    bounds, longest = documents.boundaries, documents.longest
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    return out.view(num_rows, row_tokens, num_heads, head_size)


def _runs_varlen(embeds: torch.Tensor) -> bool:
    return varlen_attn is not None and embeds.is_cuda and embeds.dtype in (torch.bfloat16, torch.float16)


def _padding_pieces(num_tokens: int) -> list[int]:
    """Padding as short documents, so that an empty row costs next to nothing."""
    full, rest = divmod(num_tokens, _PADDING_BLOCK)
    return [_PADDING_BLOCK] * full + ([rest] if rest else [])


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
