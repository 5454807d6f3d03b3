from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from megamm.models import attention
from megamm.models.attention import document_attention, make_documents

ROW = st.lists(st.integers(1, 9), min_size=1, max_size=5)
MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def _projections(num_rows: int, row_tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_rows, heads, row_tokens, 8, dtype=torch.float64, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    ]


def _masked_reference(query, key, value, lengths_of_rows, scaling):
    """Softmax over an explicit mask: earlier tokens of the same document."""
    owner = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths_of_rows])
    row_tokens = owner.shape[1]
    mask = (owner[:, :, None] == owner[:, None, :]) & torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_documents_equal_masked_attention_forward_and_backward(rows, seed):
    row_tokens = max(map(sum, rows))
    padding = [row_tokens - sum(row) for row in rows]
    lengths = [[*row, pad] if pad else row for row, pad in zip(rows, padding, strict=True)]
    query, key, value = _projections(len(rows), row_tokens, seed)
    documents = make_documents(lengths, padding, torch.zeros(len(rows), row_tokens, 32))
    out, _ = document_attention(MODULE, query, key, value, None, documents=documents, scaling=0.3)
    expected = _masked_reference(query, key, value, lengths, 0.3)
    is_real = torch.arange(row_tokens)[None] < torch.tensor([sum(row) for row in rows])[:, None]
    assert torch.equal(out[~is_real], torch.zeros_like(out[~is_real]))
    torch.testing.assert_close(out[is_real], expected[is_real], rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=out.dtype) * is_real[..., None, None]
    for ours, theirs in zip(
        torch.autograd.grad(out, (query, key, value), upstream), torch.autograd.grad(expected, (query, key, value), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("longest", [512, 8])
def test_bfloat16_on_a_cpu_equals_the_reference_by_products_and_by_the_kernel(is_causal, longest, monkeypatch):
    monkeypatch.setattr(attention, "_LONGEST_PRODUCT", longest)
    lengths = [[5, 20, 5], [30]]
    exact = _projections(2, 30, 3)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=is_causal)
    documents = make_documents(lengths, None, torch.zeros(2, 30, 32))
    out, _ = document_attention(module, *rounded, documents, scaling=0.3)
    expected, _ = document_attention(module, *exact, None, documents=documents, scaling=0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.03)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours, theirs = torch.autograd.grad(out, rounded, upstream.bfloat16()), torch.autograd.grad(expected, exact, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.1)


def test_without_is_causal_a_token_sees_what_is_behind_it_and_no_other_document():
    query, key, value = _projections(1, 7, 4)
    documents = make_documents([[3, 4]], None, torch.zeros(1, 7, 32))
    out, _ = document_attention(SimpleNamespace(num_key_value_groups=2, is_causal=False), query, key, value, documents, scaling=0.3)
    for first, end in ((0, 3), (3, 7)):
        own = [x[:, :, first:end] for x in (query, key, value)]
        expected = F.scaled_dot_product_attention(*own, scale=0.3, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(out[:, first:end], expected, rtol=0, atol=1e-12)


def test_without_documents_it_is_plain_sdpa_with_its_mask():
    query, key, value = _projections(2, 6, 0)
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    out, weights = document_attention(MODULE, query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert weights is None


@pytest.mark.parametrize(
    ("lengths", "padding", "message"),
    [
        ([[3, 4]], None, "sum to the row's 8 tokens"),
        ([[8, 0]], None, "must be positive"),
        ([[5, 3]], [2], "not the row's last document"),
        ([[8], [8]], None, "input_ids has 1"),
        ([[8]], [0, 0], "num_padding 2"),
    ],
)
def test_lengths_that_do_not_fill_the_row_are_refused(lengths, padding, message):
    with pytest.raises(ValueError, match=message):
        make_documents(lengths, padding, torch.zeros(1, 8, 4))


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"sliding_window": 4}])
def test_dropout_and_windows_over_documents_are_refused(changes):
    query, key, value = _projections(1, 8, 0)
    documents = make_documents([[8]], None, torch.zeros(1, 8, 4))
    with pytest.raises(ValueError, match="no dropout"):
        document_attention(MODULE, query, key, value, None, documents=documents, **changes)


def test_rows_without_documents_stay_in_the_graph():
    # Else the backward would skip the query and key projections of a rank with empty rows, which ZeRO-3 does not survive.
    query, key, value = _projections(2, 6, 0)
    documents = make_documents([[6], [6]], [6, 6], torch.zeros(2, 6, 4))
    out, _ = document_attention(MODULE, query, key, value, None, documents=documents, scaling=0.3)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum() * 0.0, (query, key, value)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_boundaries_for_the_kernel_fill_the_batch(monkeypatch):
    monkeypatch.setattr(attention, "_runs_varlen", lambda embeds: True)
    documents = make_documents([[5, 195], [200], [1, 199]], [195, 200, 0], torch.zeros(3, 200, 4))
    assert documents.boundaries.dtype == torch.int32 and documents.longest == 199
    # Padding is cut in short pieces; the row without documents keeps one token to attend in.
    assert documents.boundaries.tolist() == [0, 5, 133, 200, 201, 329, 400, 401, 600]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_kernel_equals_documents_one_by_one(dtype):
    lengths, padding = [[5, 60, 300, 35], [1, 199, 150, 50], [400]], [35, 0, 400]
    on_cpu = _projections(3, 400, 3)
    upstream = torch.randn(3, 400, 4, 8, dtype=torch.float64)
    upstream[0, -35:] = upstream[2] = 0
    outs, grads = [], []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        inputs = [x.detach().to(device, dtype).to(kind).requires_grad_() for x in on_cpu]
        documents = make_documents(lengths, padding, torch.zeros(3, 400, 1, device=device, dtype=kind))
        assert device == "cpu" or (documents.boundaries[-1] == 3 * 400 and documents.longest == 300)
        out, _ = document_attention(MODULE, *inputs, None, documents=documents, scaling=0.3)
        grads.append([g.cpu().double() for g in torch.autograd.grad(out, inputs, upstream.to(device, kind))])
        outs.append(out.detach().cpu().double())
    for out in outs:
        out[0, -35:] = out[2] = 0
    # One rounding of inputs and outputs: 2^-8 for bf16.
    torch.testing.assert_close(outs[1], outs[0], rtol=2**-7, atol=2**-7)
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-5)
