import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASREncoder
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from megamm.core.lengths import audio_num_mel_frames, audio_num_tokens, image_num_tokens, patch_grid


@given(st.integers(1, 5000))
def test_audio_tokens_equal_the_towers_own_arithmetic(frames):
    chunks = [100] * (frames // 100) + ([frames % 100] if frames % 100 else [])
    assert audio_num_tokens(frames) == int(Qwen3ASREncoder._post_cnn_length(torch.tensor(chunks)).sum())


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([4, 14, 16]), st.sampled_from([16, 64, 256]))
def test_patch_grid_equals_the_stock_processor_where_that_fits(height, width, patch_size, max_patches):
    target = get_image_size_for_max_num_patches(height, width, patch_size, max_patches)
    stock = (target[0] // patch_size, target[1] // patch_size)
    ours = patch_grid(height, width, patch_size=patch_size, max_patches=max_patches, merge=1)
    assert ours[0] * ours[1] <= max_patches
    if stock[0] * stock[1] <= max_patches:
        assert ours == stock


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 2, 4]))
def test_merged_grid_is_whole(height, width, merge):
    rows, columns = patch_grid(height, width, patch_size=16, max_patches=256, merge=merge)
    assert rows % merge == 0 and columns % merge == 0
    assert 1 <= image_num_tokens((rows, columns), merge) == rows * columns // merge**2 <= 256 // merge**2


def test_small_pictures_are_enlarged_no_further_than_asked():
    assert patch_grid(28, 28, patch_size=12, max_patches=256, merge=2) == (16, 16)
    assert patch_grid(28, 28, patch_size=12, max_patches=256, merge=2, max_scale=2.0) == (6, 6)
    assert patch_grid(240, 320, patch_size=12, max_patches=256, merge=2, max_scale=2.0) == (14, 18)


def test_short_sounds_are_padded_before_frames_are_counted():
    assert audio_num_mel_frames(100, 160, 8000) == 50
    assert audio_num_mel_frames(16_000, 160, 8000) == 100
