"""Cross-entropy of a linear head without its logits: chunk by chunk, gradients made in the same pass.

Shape legend: B rows, S tokens of a row, T supervised tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_LABEL = -100
"""Label of a position without supervision."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None, *, chunk_tokens: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the negative log likelihoods of `labels` under `softmax(hidden @ weight.T)`.

    Softmax and sums run in fp32 (fp64 for fp64 input). At most `chunk_tokens` rows of logits exist at once, and none for
    positions without supervision.

    Args:
        hidden: float[B, S, E].
        weight: float[V, E], of the type of `hidden`.
        labels: int64[B, S], the token that each position has to predict (already shifted), `IGNORE_LABEL` for none.
        weights: float[B, S], factor on each position's loss; None for 1.
        chunk_tokens: Bound on the logits held at once, in tokens.

    Returns:
        The scalar sum of weight times negative log likelihood, differentiable by `hidden` and `weight`; and the
        unweighted float[B, S] negative log likelihoods, detached, 0 where nothing is supervised.
    """
    if not torch.is_grad_enabled():
        # An autograd function sees `requires_grad` even here and would make gradients that nobody asks for.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, chunk_tokens)


class LinearHead(nn.Linear):
    """Output layer that returns logits, or the loss when labels are given.

    The loss is computed inside this module's forward because ZeRO-3 gathers the weight only there.
    """

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, weights: torch.Tensor | None = None, chunk_tokens: int = 1024
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits float[B, S, V]; with `labels` what `linear_cross_entropy` returns."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels, weights, chunk_tokens=chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_NE, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights_N = torch.ones_like(labels_N, dtype=exact) if weights is None else weights.reshape(-1).to(exact)
        # fp16 gradients before loss scaling would underflow: multiply them in the exact type.
        product = exact if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.zeros_like(hidden_NE, dtype=product) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        token_losses_N = torch.zeros_like(weights_N)
        for index_C in (labels_N != IGNORE_LABEL).nonzero().squeeze(1).split(chunk_tokens):
            hidden_CE, weights_C = hidden_NE[index_C], weights_N[index_C]
            log_probs_CV = torch.log_softmax((hidden_CE @ weight.T).to(exact), dim=-1)
            label_C1 = labels_N[index_C].unsqueeze(1)
            nll_C = -log_probs_CV.gather(1, label_C1).squeeze(1)
            token_losses_N[index_C] = nll_C
            loss += nll_C @ weights_C
            if grad_hidden is None and grad_weight is None:
                continue
            grad_CV = log_probs_CV.exp_().scatter_add_(1, label_C1, torch.full_like(label_C1, -1, dtype=exact))
            grad_CV = grad_CV.mul_(weights_C.unsqueeze(1)).to(product)
            if grad_hidden is not None:
                grad_hidden[index_C] = grad_CV @ weight.to(product)
            if grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_CE.to(product)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(product))
        ctx.hidden_shape, ctx.hidden_dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        token_losses = token_losses_N.view(labels.shape)
        ctx.mark_non_differentiable(token_losses)
        return loss, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(ctx.hidden_dtype).view(ctx.hidden_shape)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
