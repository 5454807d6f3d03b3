import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megamm.models.loss import IGNORE_LABEL, LinearHead, linear_cross_entropy


def _problem(dtype: torch.dtype, *, num_tokens: int = 23, width: int = 12, vocabulary: int = 37):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, num_tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, (2, num_tokens), generator=generator)
    labels[torch.rand(2, num_tokens, generator=generator) < 0.4] = IGNORE_LABEL
    weights = torch.rand(2, num_tokens, generator=generator) * 3
    return hidden.requires_grad_(), weight.requires_grad_(), labels, weights


def _plain(hidden, weight, labels, weights):
    nll = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL, reduction="none").view(
        labels.shape
    )
    return (nll if weights is None else nll * weights).sum(), nll


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_equal_plain_cross_entropy_in_fp64(chunk_tokens, weighted):
    hidden, weight, labels, weights = _problem(torch.float64)
    weights = weights if weighted else None
    loss, token_losses = linear_cross_entropy(hidden, weight, labels, weights, chunk_tokens=chunk_tokens)
    expected, nll = _plain(hidden, weight, labels, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(token_losses, nll.detach(), rtol=0, atol=1e-12)
    # Any scale may arrive from above.
    ours, theirs = (torch.autograd.grad(one * -0.37, (hidden, weight)) for one in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_gradients_pass_gradcheck():
    hidden, weight, labels, weights = _problem(torch.float64, num_tokens=5, width=3, vocabulary=7)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, weights, chunk_tokens=3)[0], (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_its_rounding(dtype):
    hidden, weight, labels, weights = _problem(dtype)
    loss, token_losses = linear_cross_entropy(hidden, weight, labels, weights, chunk_tokens=8)
    assert loss.dtype == token_losses.dtype == torch.float32
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected, _ = _plain(exact_hidden, exact_weight, labels, weights)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=8 * eps, atol=0)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (exact_hidden, exact_weight))
    for one, other, source in zip(ours, theirs, (hidden, weight), strict=True):
        assert one.dtype == source.dtype
        assert (one.double() - other).norm() <= 4 * eps * other.norm()


def test_fp16_gradients_that_loss_scaling_saves_do_not_underflow():
    hidden = torch.zeros(1, 1, 4, dtype=torch.float16)
    hidden[..., 0] = 1.0
    weight = torch.zeros(3, 4, dtype=torch.float16)
    weight[:, 0] = torch.tensor([20.0, 0.0, 0.0])
    weight.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([[0]]))
    (loss * 2.0**16).backward()
    # Unscaled, exp(-20) is below the smallest fp16 number.
    torch.testing.assert_close(weight.grad[1, 0].float(), torch.tensor(2.0**16 * math.exp(-20.0)), rtol=1e-3, atol=0)


def test_no_supervised_token_gives_an_exact_zero_that_reaches_everything():
    hidden, weight, labels, weights = _problem(torch.float32)
    loss, token_losses = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_LABEL), weights)
    assert loss.item() == 0.0
    assert not token_losses.any()
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_only_wanted_gradients_are_made():
    hidden, weight, labels, _ = _problem(torch.float32)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    loss, _ = linear_cross_entropy(hidden.detach(), weight, labels)
    loss.backward()
    assert hidden.grad is None and weight.grad is not None


@pytest.mark.parametrize("tied", [True, False])
def test_head_equals_plain_loss_with_an_embedding_tied_and_untied(tied):
    def build() -> tuple[nn.Embedding, LinearHead]:
        torch.manual_seed(0)
        embedding, head = nn.Embedding(19, 8).double(), LinearHead(8, 19, bias=False).double()
        if tied:
            head.weight = embedding.weight
        return embedding, head

    ids, labels = torch.randint(0, 19, (2, 9)), torch.randint(0, 19, (2, 9))
    labels[:, ::3] = IGNORE_LABEL
    (embedding, head), (plain_embedding, plain_head) = build(), build()
    loss, _ = head(embedding(ids).tanh(), labels, chunk_tokens=4)
    loss.backward()
    expected, _ = _plain(plain_embedding(ids).tanh(), plain_head.weight, labels, None)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(embedding.weight.grad, plain_embedding.weight.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(head.weight.grad, plain_head.weight.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(head(embedding(ids)), plain_embedding(ids) @ plain_head.weight.T, rtol=0, atol=1e-13)


def test_logits_never_exist_for_more_than_a_chunk():
    hidden, weight, labels, _ = _problem(torch.float32, width=3)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == weight.shape[0]:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)[0].backward()
    assert largest == 4
