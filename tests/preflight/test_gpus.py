"""What nvidia-smi says, by a program that says what real ones say, and by a real one where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamm.config import load_recipe
from megamm.core.env import RankInfo
from megamm.preflight import facts, gpus
from megamm.preflight.links import _all_reduce
from megamm.preflight.meeting import Meeting
from megamm.preflight.stopwatch import seconds_of

WELL = "0, GPU-0a, NVIDIA H100 80GB HBM3, 570.86.15, 1980, 1980, 34, 0"
CALM = "Not Active, Not Active"
FINE = "No, No"


PROGRAM = """#!/bin/sh
case $1 in
    *=uuid,{prefix}.*) cat {folder}/reasons ;;
    *=uuid,*) echo "Field \"${{1#*,}}\" is not a valid field to query."; exit 2 ;;
    --query-gpu=*) cat {folder}/gpus; exit {code} ;;
    *) cat {folder}/remapped ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Make `nvidia-smi` say `rows` of GPUs, and of the first one `reasons` of slow clocks and `remapped` rows; or fail."""

    def install(rows, *, reasons=CALM, remapped=FINE, prefix="clocks_event_reasons", code=0):
        for name, text in (("gpus", rows), ("reasons", f"GPU-0a, {reasons}"), ("remapped", f"GPU-0a, {remapped}")):
            (tmp_path / name).write_text(f"{text}\n")
        program = tmp_path / "nvidia-smi"
        program.write_text(PROGRAM.format(folder=tmp_path, prefix=prefix, code=code))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_without_nvidia_smi_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.look() == gpus.Gpus()


def test_gpus_that_are_well(nvidia_smi):
    nvidia_smi(f"{WELL}\n{WELL.replace('0, GPU-0a', '1, GPU-1b')}")
    found = gpus.look()
    assert (found.num_gpus, found.names, found.driver, found.faults) == (2, ("NVIDIA H100 80GB HBM3",), "570.86.15", ())
    assert found.clocks_mhz == (("1980", "1980"), ("1980", "1980"))


@pytest.mark.parametrize("prefix", ["clocks_event_reasons", "clocks_throttle_reasons"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rows": WELL.replace("34, 0", "34, 3")}, "GPU 0: uncorrected memory errors since its last reset"),
        ({"rows": WELL.replace("34, 0", "34, [GPU requires reset]")}, "=[GPU requires reset]"),
        ({"reasons": "Active, Not Active"}, "slowed down by its own temperature"),
        ({"reasons": "Not Active, Active"}, "slowed down by the power supply"),
        ({"remapped": "Yes, No"}, "memory rows to be remapped by a reset"),
        ({"remapped": "No, Yes"}, "memory rows that could not be remapped"),
    ],
)
def test_a_fault_is_named_with_its_gpu(nvidia_smi, prefix, change, fault):
    # What is said of one GPU alone is not taken for another's.
    rows = f"{WELL.replace('0, GPU-0a', '1, GPU-1b')}\n{change.get('rows', WELL)}"
    nvidia_smi(**{**change, "rows": rows}, prefix=prefix)
    (found,) = gpus.look().faults
    assert found.startswith("GPU 0: ") and fault in found


def test_what_a_card_or_a_driver_does_not_have_is_no_fault(nvidia_smi):
    nvidia_smi(WELL.replace("34, 0", "34, [N/A]"), remapped="N/A, N/A")
    assert not gpus.look().faults
    nvidia_smi(WELL, reasons="Active, Active", prefix="named_otherwise")
    assert gpus.look().num_gpus == 1 and not gpus.look().faults


def test_a_driver_that_fails_is_a_fault(nvidia_smi):
    nvidia_smi("Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error", code=255)
    assert gpus.look().faults == ("nvidia-smi fails: Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error",)


@pytest.mark.parametrize(("visible", "is_bad"), [(None, True), ("0", True), ("", False)])
def test_gpus_that_torch_does_not_see_are_a_problem_unless_they_were_hidden(nvidia_smi, monkeypatch, tmp_path, visible, is_bad):
    nvidia_smi(WELL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(facts, "matmul_gflops", lambda local_rank: 1.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    recipe = load_recipe("tiny", [f"--data.root={tmp_path}"])
    found = facts.node_facts(recipe, RankInfo(rank=0, local_rank=0, world_size=1), lambda: None)["problems"]
    assert any("nvidia-smi lists 1 GPUs and torch" in problem for problem in found) == is_bad, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_found_well_and_adds_up_with_itself(tmp_path):
    recipe = load_recipe("tiny", [f"--data.root={tmp_path}"])
    meeting = Meeting(RankInfo(rank=0, local_rank=0, world_size=1), dist.HashStore(), 120.0)
    found = facts.node_facts(recipe, meeting.info, meeting.beat)
    assert found["gpus"]["num_gpus"] >= found["num_devices"] >= 1 and found["gpus"]["driver"]
    # A real driver knows all fields that are asked for.
    assert not any("fails" in fault or "not answer" in fault for fault in found["gpus"]["faults"])
    assert found["gflops"] > 1000
    device = torch.device("cuda", 0)
    matrix = torch.ones(4096, 4096, device=device)
    # The host is done at once, the GPU is not.
    assert seconds_of(lambda: [matrix @ matrix for _ in range(50)], device) > 50 * 2 * 4096**3 / 1e15
    assert _all_reduce(meeting, "group", [0], 1 << 20) == {"bytes_per_second": 0.0}
