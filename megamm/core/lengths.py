"""How many tokens a picture or a sound takes: shared by planning, the model and the exported processor.

Pure arithmetic without imports, because the export ships this file next to the modelling code.
"""

AUDIO_CHUNK_FRAMES = 100
"""Mel frames that the audio tower's convolutions see at once (2 x `n_window` of `Qwen3ASREncoderConfig`)."""

AUDIO_STATE_FRAMES = 8
"""Mel frames between two positions that the audio tower returns; the last of a chunk has fewer."""


def audio_num_tokens(num_mel_frames: int) -> int:
    """Positions that the audio tower returns for a sound.

    Args:
        num_mel_frames: Mel frames without padding, at least 1.

    Returns:
        13 for every full chunk of 100 frames, and ceil(frames / 8) for the rest.

    Source: transformers, `Qwen3ASREncoder._post_cnn_length` (three convolutions of stride 2 a chunk).
    """
    full, rest = divmod(num_mel_frames, AUDIO_CHUNK_FRAMES)
    for _ in range(3):
        rest = (rest + 1) // 2
    return full * 13 + rest


def audio_num_mel_frames(num_samples: int, hop_length: int, min_samples: int) -> int:
    """Mel frames of a sound of `num_samples` at the model's rate, after padding short sounds to `min_samples`.

    Source: transformers, `Qwen3ASRFeatureExtractor` (the last STFT frame is dropped).
    """
    return max(num_samples, min_samples) // hop_length


def patch_grid(height: int, width: int, *, patch_size: int, max_patches: int, merge: int, max_scale: float = 100.0) -> tuple[int, int]:
    """Rows and columns of patches for a picture resized at constant aspect ratio to at most `max_patches`.

    Both are multiples of `merge`, so that neighbouring patches can be merged into one token.

    Args:
        height: Source height in pixels.
        width: Source width in pixels.
        patch_size: Side of a patch in pixels.
        max_patches: Upper bound on rows x columns.
        merge: Side of the square of patches that becomes one token.
        max_scale: The picture is enlarged at most by this factor, and then up to whole tokens, so that a small one takes few patches.

    Source: transformers, `get_image_size_for_max_num_patches` of the SigLIP2 image processor; equal to it for merge 1 and the
        default scale.
    """
    unit = patch_size * merge
    budget = max_patches // (merge * merge)

    def units(scale: float, size: int) -> int:
        return max(1, -int(-(size * scale) // unit))

    low, high = 1e-6, max_scale
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if units(middle, height) * units(middle, width) <= budget:
            low = middle
        else:
            high = middle
    # A picture so long that even one unit of height overflows the budget keeps the budget by cutting its long side.
    rows, columns = units(low, height), units(low, width)
    rows = min(rows, max(1, budget // columns)) if rows >= columns else rows
    columns = min(columns, max(1, budget // rows))
    return rows * merge, columns * merge


def image_num_tokens(grid: tuple[int, int], merge: int) -> int:
    """Tokens of a picture whose feature map has `grid` rows and columns, merged by `merge` x `merge`."""
    return (grid[0] // merge) * (grid[1] // merge)
