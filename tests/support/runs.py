"""A small real dataset with its tokenizer, and a recipe that trains on it in a second a step."""

from __future__ import annotations

from pathlib import Path

from megamm.config import Recipe, load_recipe
from megamm.data.shards.index import load_index, write_index
from megamm.tokenizers import text
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Everything split over the ranks, nothing kept gathered: a tiny model would never be partitioned otherwise.
_SMALL = (
    "--tokenizer.text_size=300",
    "--tokenizer.location_bins=0",
    "--model.text.config={hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2,head_dim=8,tie_word_embeddings=true}",
    "--model.vision.config={hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2,patch_size=4,num_patches=16,vision_use_head=false}",
    "--model.audio.config={d_model=16,encoder_layers=1,encoder_attention_heads=2,encoder_ffn_dim=24,downsample_hidden_size=8,num_mel_bins=40}",
    "--batch.row_tokens=128",
    "--batch.global_rows=6",
    "--batch.micro_rows=3",
    "--data.window=64",
    "--data.max_skipped_share=0.5",
    "--data.row_frames=400",
    "--schedule.warmup_steps=3",
    "--train.steps=12",
    "--checkpoint.every=0",
    "--evaluation.every=0",
    "--engine.overrides.zero_optimization.stage3_param_persistence_threshold=0",
    "--engine.overrides.zero_optimization.stage3_max_live_parameters=0",
    "--engine.overrides.zero_optimization.stage3_max_reuse_distance=0",
)


def make_data(root: Path, *, num_each: int = 24) -> None:
    """Shards of pictures, sounds, both together and texts below `root`, indexed, and a tokenizer over their words."""
    ask = {"type": "text", "text": "which digit is it?"}
    samples = {"pictures": {}, "sounds": {}, "both": {}, "texts": {}}
    for number in range(num_each):
        word = WORDS[number % 10]
        picture = jpeg(8 + number % 5, 8 + number % 3, seed=number)
        sound = flac(6000 + 700 * (number % 7), seed=number)
        image, audio = {"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "0.flac"}
        samples["pictures"][f"p{number:03d}"] = as_files(chat([image, ask], word), _0_jpg=picture)
        samples["sounds"][f"s{number:03d}"] = as_files(chat([audio, ask], word, task="speech_recognition"), _0_flac=sound)
        if number % 3 == 0:
            samples["both"][f"b{number:03d}"] = as_files(chat([image, audio, ask], word), _0_jpg=picture, _0_flac=sound)
        samples["texts"][f"t{number:03d}"] = as_files(text_document(f"the word {word} " * (1 + number % 4)))
    for name, of_kind in samples.items():
        write_index(write_tar(root / name / "train-00000.tar", of_kind))
    held_out = {f"h{number}": samples["pictures"][f"p{number:03d}"] for number in range(5)}
    write_index(write_tar(root / "pictures" / "test-00000.tar", held_out))
    text.train([*WORDS, ask["text"], *(f"the word {word} is a digit" for word in WORDS)], recipe_over(root).tokenizer, root / "tokenizer")


def corrupt_pictures(tar: Path) -> None:
    """Change bytes inside every fourth picture: the hash no longer matches, so the rank that gets the sample skips it."""
    index = load_index(tar)
    with tar.open("r+b") as file:
        for sample in range(0, index.num_samples, 4):
            member = next(member for member in index.members(sample) if member.suffix == "0.jpg")
            file.seek(member.offset + member.size // 2)
            file.write(b"rotten")


def recipe_over(root: Path, *overrides: str) -> Recipe:
    """The small recipe over `make_data(root)`, with more overrides on top."""
    datasets = [f'--data.train.{name}={{shards="{name}/train-*.tar"}}' for name in ("pictures", "sounds", "both", "texts")]
    paths = [f"--data.root={root}", f"--tokenizer.folder={root}/tokenizer"]
    replaced = ["--data.train={}", '--data.held_out={pictures={shards="pictures/test-*.tar"}}']
    return load_recipe("tiny", [*replaced, *datasets, *paths, *_SMALL, *overrides])
