"""How likely a model finds given sequences: the negative log likelihood of their supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megamm.core.types import IGNORE_LABEL, TokenSequence
from megamm.inference.load import Loaded
from megamm.inference.prompt import media_arrays


# Not inference_mode: weights that ZeRO-3 gathers in here stay, and training goes on with them.
@torch.no_grad()
def token_losses(loaded: Loaded, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    """Unweighted negative log likelihoods, for each sequence float32[T], 0 where nothing is supervised.

    Padding stands on the right, where a causal decoder never looks, so a result does not depend on the other sequences.
    """
    num_tokens = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = np.full((len(sequences), num_tokens), loaded.config.pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_LABEL)
    mask = np.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        input_ids[row, :length], labels[row, :length], mask[row, :length] = sequence.input_ids, sequence.labels, 1
    images = [image for sequence in sequences for image in sequence.images]
    audios = [audio for sequence in sequences for audio in sequence.audios]
    arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask} | media_arrays(images, audios)
    losses = loaded.model(**{name: torch.from_numpy(array).to(loaded.device) for name, array in arrays.items()}).token_losses.cpu().numpy()
    return [losses[row, : len(sequence.input_ids)] for row, sequence in enumerate(sequences)]
