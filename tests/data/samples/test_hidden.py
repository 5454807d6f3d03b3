"""What a masked head is to fill in: how much, where, what the model still sees, and what is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest

from megamm.config import AudioFeatures, Head, ImageFeatures
from megamm.core.errors import DataError
from megamm.core.types import PackedRow
from megamm.data.ledger import BadSample
from megamm.data.loading.arena import map_arrays
from megamm.data.loading.collate import batch_bytes, collate
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.features import MediaRules
from megamm.data.media.files import DECODERS
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.hidden import hidden_cells, hide, masking_random, media_alone, state_frames
from megamm.tasks import template
from tests.support.shards import chat, flac, jpeg

MASKED = Head("masked", states="towers", mask_share=0.5)
NAFLEX, FIXED = ImageFeatures(patch_size=4, max_patches=64), ImageFeatures(kind="fixed", size=32, stride=8)
SOUNDS = AudioFeatures(num_mel=16)
IMAGE, AUDIO = {"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "0.flac"}
ASK = {"type": "text", "text": "what is it?"}


@pytest.mark.parametrize("grid", [(8, 4), (1, 13), (5, 1), (1, 2)])
@pytest.mark.parametrize("span", [1, 3, 20])
@pytest.mark.parametrize("share", [0.01, 0.6, 0.99])
def test_the_share_of_cells_is_hidden_and_one_stays(grid, span, share):
    num = grid[0] * grid[1]
    hidden = hidden_cells(grid, share, span, masking_random(0, 0))
    assert len(hidden) == min(max(1, round(share * num)), num - 1)
    assert (np.diff(hidden) > 0).all() and hidden.min() >= 0 and hidden.max() < num


def test_a_single_cell_stays():
    assert len(hidden_cells((1, 1), 0.9, 1, masking_random(0, 0))) == 0


def test_cells_are_hidden_in_blocks_of_the_span_and_borders_as_often_as_the_middle():
    counts = np.zeros(36)
    for position in range(2000):
        hidden = hidden_cells((6, 6), 4 / 36, 2, masking_random(3, position))
        counts[hidden] += 1
    assert counts.min() > 0.6 * counts.max()
    stretch = hidden_cells((1, 100), 0.2, 20, masking_random(0, 5))
    assert len(stretch) == 20 and np.count_nonzero(np.diff(stretch) > 1) <= 1


def test_the_same_position_hides_the_same_and_another_position_or_seed_something_else():
    drawn = [hidden_cells((8, 8), 0.5, 1, masking_random(*at)).tolist() for at in ((7, 100), (7, 100), (7, 101), (8, 100))]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


def test_draws_are_not_those_of_augmentation():
    assert masking_random(1, 2).random() != np.random.default_rng([1, 2]).random()


@pytest.mark.parametrize("features", [NAFLEX, FIXED], ids=["patches", "square"])
def test_a_picture_is_zero_where_it_is_hidden_and_the_target_is_what_was_there(features):
    image = image_input(jpeg(40, 24), features)
    (seen,), _, target = hide(MASKED, [image], [], masking_random(0, 1))
    num_cells = image.grid[0] * image.grid[1]
    assert target.counts.tolist() == [image.pixels.size // 2, 0] and target.sounds is None
    assert len(target.pictures.numbers) == num_cells // 2 and not target.pictures.documents.any()
    side = features.patch_size if features.kind == "naflex" else features.stride

    def cells(pixels):
        if pixels.ndim == 2:
            return pixels
        rows, columns = image.grid
        return np.stack([
            pixels[:, row * side : (row + 1) * side, column * side : (column + 1) * side].transpose(1, 2, 0).ravel()
            for row in range(rows) for column in range(columns)
        ])  # fmt: skip

    before, after, is_hidden = cells(image.pixels), cells(seen.pixels), np.zeros(num_cells, dtype=bool)
    is_hidden[target.pictures.numbers] = True
    np.testing.assert_array_equal(target.pictures.values, before[is_hidden])
    np.testing.assert_array_equal(after[~is_hidden], before[~is_hidden])
    assert not after[is_hidden].any() and image.pixels.any(), "the picture itself stays as it was"


def test_a_sound_is_zero_where_it_is_hidden_and_its_last_state_is_as_long_as_it_is():
    audio = audio_input(flac(16000 + 160 * 5), SOUNDS)
    num_mel, num_frames = audio.mel.shape
    assert num_frames == 105 and audio.num_tokens == 14
    _, (seen,), target = hide(replace(MASKED, mask_share=0.99), [], [audio], masking_random(0, 1))
    assert len(target.sounds.numbers) == 13 and target.counts[0] == 0
    frames = np.zeros(num_frames, dtype=bool)
    for number, values in zip(target.sounds.numbers.tolist(), target.sounds.values, strict=True):
        start, stop = state_frames(number, num_frames)
        frames[start:stop] = True
        rows = values.reshape(8, num_mel)
        np.testing.assert_array_equal(rows[: stop - start], audio.mel[:, start:stop].T)
        assert np.isnan(rows[stop - start :]).all()
    assert target.counts[1] == frames.sum() * num_mel
    assert not seen.mel[:, frames].any()
    np.testing.assert_array_equal(seen.mel[:, ~frames], audio.mel[:, ~frames])


def test_states_of_a_sound_cover_each_frame_once_and_begin_anew_with_every_chunk():
    covered = [frame for number in range(13 + 13 + 2) for frame in range(*state_frames(number, 211))]
    assert covered == list(range(211))
    assert state_frames(12, 211) == (96, 100) and state_frames(13, 211) == (100, 108) and state_frames(27, 211) == (208, 211)


def parsed(document: dict):
    return template.parse_sample("k", document, where="here")


def test_media_count_wherever_they_stand_and_texts_do_not():
    drawn = {"task": "image_generation", "messages": [{"role": "user", "content": [AUDIO, ASK]}, {"role": "assistant", "content": [IMAGE]}]}
    (message,) = media_alone(MASKED, parsed(drawn).messages)
    assert [part.type for part in message.content] == ["audio", "image"]
    (message,) = media_alone(replace(MASKED, states="vision"), parsed(drawn).messages)
    assert [part.type for part in message.content] == ["image"]


@pytest.mark.parametrize(
    ("states", "question", "reason"),
    [("towers", [ASK], "no image and no audio"), ("audio", [IMAGE], "no audio"), ("vision", [AUDIO], "no image")],
)
def test_a_sample_with_nothing_to_hide_is_refused(states, question, reason):
    with pytest.raises(DataError, match=f"holds {reason}, and a masked head"):
        media_alone(replace(MASKED, states=states), parsed(chat(question, "yes")).messages)


def encoded(tokenizer, document, media, *, random=None, head=MASKED, features=NAFLEX):
    encoder = SampleEncoder(tokenizer, MediaRules(features, SOUNDS, head=head))
    sample = parsed(document)
    facts = {name: DECODERS[name.rpartition(".")[2]].facts(io.BytesIO(content)) for name, content in media.items()}
    (planned,) = encoder.measure(sample, facts)
    sequence, footprint = encoder.encode("d", replace(sample, media=media), random=random)
    assert footprint == planned
    return sequence


def test_answers_are_not_looked_at(tokenizer):
    media = {"0.jpg": jpeg(32, 16)}
    one, other = (encoded(tokenizer, chat([IMAGE, ASK], answer), media) for answer in ("a", "a longer answer that nobody reads"))
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    assert one.weights.tolist() == [0.0] * (len(one.input_ids) - 1) + [1.0]


def test_a_picture_of_one_cell_is_refused(tokenizer):
    with pytest.raises(BadSample, match="a single cell"):
        encoded(tokenizer, chat([IMAGE], "a"), {"0.jpg": jpeg(32, 16)}, features=ImageFeatures(patch_size=4, max_patches=1))


def test_a_micro_batch_counts_cells_through_all_of_its_media(tokenizer):
    media = {"0.jpg": jpeg(32, 16), "0.flac": flac(9000)}
    documents = [chat([IMAGE], "a"), chat([AUDIO], "a"), chat([IMAGE, AUDIO, IMAGE], "a")]
    sequences = [
        encoded(
            tokenizer,
            document,
            {name: media[name] for name in {part["member"] for part in document["messages"][0]["content"]}},
            random=masking_random(0, n),
        )
        for n, document in enumerate(documents)
    ]
    # As it goes through the memory of decoder processes.
    sequences = [map_arrays(sequence, np.copy) for sequence in sequences]
    batch = collate([PackedRow(sequences[:2]), PackedRow(), PackedRow(sequences[2:])], 200, 0, ("classification",), head=MASKED)
    pictures, sounds = batch.head.pictures, batch.head.sounds
    cells = np.concatenate([image[mask.astype(bool)] for image, mask in zip(batch.pixels, batch.pixel_mask, strict=True)])
    assert not cells[pictures.numbers].any() and np.delete(cells, pictures.numbers, axis=0).any(1).all()
    assert sorted(set(pictures.documents.tolist())) == [0, 2]
    assert sorted(set(sounds.documents.tolist())) == [1, 2]
    first = sequences[1].audios[0].num_tokens
    assert (sounds.numbers[sounds.documents == 1] < first).all() and (sounds.numbers[sounds.documents == 2] >= first).all()
    assert batch.head.counts.sum(0).tolist() == [np.isfinite(pictures.values).sum(), np.isfinite(sounds.values).sum()]
    without = replace(batch, head=replace(batch.head, pictures=None, sounds=None))
    assert batch_bytes(batch) - batch_bytes(without) > pictures.values.nbytes + sounds.values.nbytes


def test_a_micro_batch_without_media_has_nothing_hidden():
    batch = collate([PackedRow()], 16, 0, ("classification",), head=MASKED)
    assert batch.head.pictures is None and batch.head.sounds is None and batch.head.counts.shape == (0, 2)
