"""A run meets rotten data, goes back and leaves them out, and ends as a run that never saw them: through launcher and command line.

Easy texts, then a window of random characters that `data.schedule` brings in at step 13: the loss jumps from 2 to 6 for four steps.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import Qwen3Config, Qwen3ForCausalLM

from megamm.checkpoint.manifest import read_data_state, read_ledger, read_manifest
from megamm.config import to_dict
from megamm.core.json_lines import read_json_lines
from megamm.data.planning.state import LoaderState
from megamm.data.shards.index import write_index
from megamm.tokenizers import text
from megamm.train.data_report import read_report
from megamm.train.rewinds import decisions
from megamm.train.trace import trace_step
from tests.support.recipes import write_recipe
from tests.support.runs import WORDS, recipe_over
from tests.support.shards import as_files, chat, text_document, write_tar

# Each test may have to wait for several launches of two ranks.
pytestmark = pytest.mark.timeout(900)
CHECKOUT = Path(__file__).resolve().parents[2]
ROTTEN = "--data.schedule=[{step=13,weights={easy=0.0,rotten=1.0}},{step=15,weights={easy=1.0,rotten=0.0}}]"
SHORT = ("--batch.global_rows=4", "--batch.micro_rows=1", "--data.window=32", "--optim.lr=1e-2", "--schedule.kind=constant")
SPIKE = ("--spike.window=8", "--spike.factor=1.5", "--spike.patience=3", "--checkpoint.every=2", "--checkpoint.keep_last=20")
LAST = "step_00000016"


def wav(values: np.ndarray) -> bytes:
    """A sound of float samples."""
    file = io.BytesIO()
    soundfile.write(file, values.astype(np.float32), 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def ask(mark: str) -> list[dict[str, str]]:
    """A question about a sound."""
    return [{"type": "audio", "member": "0.wav"}, {"type": "text", "text": f"which digit is it{mark}"}]


def launch(folder: Path, num_ranks: int, run: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", "pretrain", "recipe.toml", "--run", run, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=400)


def train(folder: Path, num_ranks: int, run: str, *overrides: str) -> str:
    """What a run says on standard error."""
    result = launch(folder, num_ranks, run, *overrides)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


def trained(run: Path) -> list[tuple[int, str]]:
    """Step and digest of its samples."""
    return [(line["step"], line["sample_keys"]) for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Easy and rotten texts, sounds of which one is asked about with a tilde, and a recipe for the texts."""
    folder = tmp_path_factory.mktemp("rewind")
    random = np.random.default_rng(3)
    sound = wav(random.uniform(-0.5, 0.5, 9000))
    samples = {
        "easy": {f"e{number:03d}": as_files(text_document("the word zero is a digit " * 3)) for number in range(40)},
        "rotten": {
            f"r{number:03d}": as_files(text_document(bytes(random.integers(33, 127, 60).tolist()).decode())) for number in range(40)
        },
        "sounds": {f"s{number:02d}": as_files(chat(ask("~" if number == 5 else "?"), "zero"), _0_wav=sound) for number in range(12)},
    }
    for name, of_kind in samples.items():
        write_index(write_tar(folder / "data" / name / "train-00000.tar", of_kind))
    paths = ("--data.held_out={}", "--data.train={}")
    datasets = ('--data.train.easy={shards="easy/train-*.tar"}', '--data.train.rotten={shards="rotten/train-*.tar",weight=0.0}')
    recipe = recipe_over(folder / "data", *paths, *datasets, *SHORT, *SPIKE, "--loss.task_weights={}", "--train.steps=16")
    text.train([*WORDS, *(f"the word {word} is a digit" for word in WORDS)], recipe.tokenizer, folder / "data" / "tokenizer")
    write_recipe(folder / "recipe.toml", to_dict(recipe))
    return folder


@pytest.fixture(scope="module")
def left(folder):
    """A run that left the data of steps 13 to 15 out from the start."""
    train(folder, 2, "left", ROTTEN, "--skip-steps", "13-15")
    return folder / "left"


@pytest.fixture(scope="module")
def spiked(folder):
    """A run that leaves in the middle of the spike, resumes, goes back from step 15 to step 12, and ends."""
    train(folder, 2, "spiked", ROTTEN, "--rewind-on-spike", "--stop-after=14")
    told = train(folder, 2, "spiked", ROTTEN, "--rewind-on-spike")
    assert "steps 13 to 15: loss " in told and "going back from step 15 to 12, without the data of steps 13 to 15" in told
    return folder / "spiked"


@pytest.mark.distributed
@pytest.mark.integration
def test_a_run_that_goes_back_ends_as_one_that_left_the_data_out_from_the_start(spiked, left):
    mine, theirs = (run / "checkpoints" / LAST for run in (spiked, left))
    files, expected = (read_manifest(checkpoint).files for checkpoint in (mine, theirs))
    # Weights, moments and random states of both ranks: equal files have equal digests.
    assert {name for name in files if files[name] != expected[name]} == {"data_state.json"}
    assert read_manifest(mine).engine == read_manifest(theirs).engine and read_ledger(mine) == read_ledger(theirs)
    state, other = ({**read_data_state(checkpoint), "stretches": None} for checkpoint in (mine, theirs))
    assert state == other and "watch" in state
    assert trained(spiked) == trained(left) and [step for step, _ in trained(spiked)] == list(range(1, 17))


@pytest.mark.distributed
@pytest.mark.integration
def test_what_a_run_keeps_of_its_going_back(spiked):
    (stretch,) = decisions(spiked)
    assert (stretch.first, stretch.last, stretch.from_step, stretch.to_step) == (13, 15, 15, 12)
    assert LoaderState.from_json(read_data_state(spiked / "checkpoints" / LAST)).stretches == (stretch,)
    # The checkpoint of step 14 was written during the spike.
    assert (spiked / "checkpoints" / "step_00000014.abandoned-1").is_dir() and (spiked / "checkpoints" / "step_00000014").is_dir()
    (event,) = [line for line in read_json_lines(spiked / "metrics.jsonl") if "rewind/from_step" in line]
    assert (event["step"], event["rewind/from_step"], event["rewind/left_out_steps"]) == (12, 15, 3)
    assert any(line.startswith("left out, from step 15 back to 12: data of steps 13 to 15") for line in read_report(spiked).lines())
    for step in (13, 14, 15):
        assert {one.dataset for one in trace_step(spiked, step, of_data=True).samples} == {"rotten"}
    for step, digest in trained(spiked):
        assert trace_step(spiked, step).sample_keys == digest
    assert trace_step(spiked, 14).samples == trace_step(spiked, 17, of_data=True).samples


@pytest.mark.distributed
@pytest.mark.integration
def test_a_run_that_was_killed_as_it_went_back_does_not_decide_again_at_another_number_of_ranks(folder, spiked):
    killed = shutil.copytree(spiked, folder / "killed")
    (killed / "DONE").unlink()
    # As the disk was when the decision had been written and nothing else was done.
    for checkpoint in (killed / "checkpoints").glob("step_*"):
        if checkpoint.name > "step_00000012" and "." not in checkpoint.name:
            shutil.rmtree(checkpoint)
    (killed / "checkpoints" / "step_00000014.abandoned-1").rename(killed / "checkpoints" / "step_00000014")
    told = train(folder, 1, "killed", ROTTEN, "--rewind-on-spike", "--spike.factor=1000.0")
    assert "the run went back from before step_00000014: it is set aside" in told and "going back" not in told
    assert trained(killed) == trained(spiked) and decisions(killed) == decisions(spiked)
    stretches = [LoaderState.from_json(read_data_state(run / "checkpoints" / LAST)).stretches for run in (killed, spiked)]
    assert stretches[0] == stretches[1]


@pytest.mark.distributed
@pytest.mark.integration
def test_a_run_that_may_not_go_back_again_ends_in_one_line(folder, spiked):
    ended = shutil.copytree(spiked, folder / "ended")
    (ended / "DONE").unlink()
    for checkpoint in (ended / "checkpoints").glob("step_*"):
        if checkpoint.name > "step_00000012":
            shutil.rmtree(checkpoint)
    # Data of step 16 are rotten too: with a patience of one step they are a spike of their own.
    result = launch(folder, 1, "ended", ROTTEN, "--rewind-on-spike", "--spike.patience=1", "--spike.max_rewinds=1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "step 13: loss " in result.stderr and "spike.max_rewinds=1 is used up" in result.stderr
    assert decisions(ended) == decisions(spiked)


@pytest.fixture(scope="module")
def broken_tower(folder):
    """A text tower that knows no number for the tilde, which is in one sample alone."""
    (tilde,) = text.TextTokenizer.load(folder / "data" / "tokenizer").encode("it~")[-1:]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tower = Qwen3ForCausalLM(Qwen3Config(vocab_size=400, head_dim=8, tie_word_embeddings=False, **sizes))
    tower.get_input_embeddings().weight.data[tilde] = float("nan")
    tower.save_pretrained(folder / "tower")
    return folder / "tower"


@pytest.mark.distributed
@pytest.mark.integration
def test_a_sample_whose_loss_is_not_finite_is_named_and_can_be_kept_out(folder, broken_tower):
    sounds = ('--data.train={easy={shards="easy/train-*.tar"},sounds={shards="sounds/train-*.tar"}}', "--data.row_frames=400")
    steps = ("--data.window=16", "--train.steps=3", "--optim.max_unapplied_updates=0")
    short = (*sounds, *steps, f"--model.text.pretrained={broken_tower}")
    result = launch(folder, 2, "loud", *short)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("the update was not applied, because the loss is not finite (optim.max_unapplied_updates=0)") == 1
    (line,) = read_json_lines(folder / "loud" / "unapplied.jsonl")
    assert line["suspects"] == ["sounds/s05"] and (line["reason"], line["loss"], line["grad_norm"]) == ("loss", "nan", "inf")
    # One rank had it, and both their samples are there, each with its place.
    (rank,) = [rank for rank, loss in enumerate(line["losses"]) if loss == "nan"]
    (place,) = [one for one in line["samples"] if (one["dataset"], one["key"]) == ("sounds", "s05")]
    assert place == {**place, "rank": rank, "shard": "train-00000.tar"} and {one["rank"] for one in line["samples"]} == {0, 1}
    traced = trace_step(folder / "loud", line["step"])
    assert [(one.rank, one.micro_step, one.row, one.key) for one in traced.samples] == [
        (one["rank"], one["micro_step"], one["row"], one["key"]) for one in line["samples"]
    ]
    told = f"update of step {line['step']} not applied (data of step {line['data_step']}): loss not finite on rank {rank}"
    assert traced.lines()[1] == f"{told}; samples: sounds/s05"
    (folder / "keys.txt").write_text("\n".join(line["suspects"]))
    train(folder, 2, "loud", *short, "--exclude", "keys.txt")
    losses = [line["loss"] for line in read_json_lines(folder / "loud" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3 and all(isinstance(loss, float) for loss in losses)
