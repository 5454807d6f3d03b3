"""What nvidia-smi says, by a program that says what real ones say; there is no GPU here."""

from __future__ import annotations

import pytest
import torch

from megamm.config import load_recipe
from megamm.core.env import RankInfo
from megamm.preflight import facts, gpus

WELL = "0, NVIDIA H100 80GB HBM3, 570.86.15, 1980, 1980, 34, 0, Not Active, Not Active"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Make `nvidia-smi` print `rows` for GPUs and `remapped` for rows, or fail."""

    def install(rows, remapped="No, No\n", code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncase $1 in --query-gpu=*) cat <<'END'\n{rows}\nEND\n exit {code};; *) cat <<'END'\n{remapped}\nEND\n esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_without_nvidia_smi_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.look() == gpus.Gpus()


def test_gpus_that_are_well(nvidia_smi):
    nvidia_smi(f"{WELL}\n{WELL.replace('0, N', '1, N', 1)}", "No, No\nNo, No")
    found = gpus.look()
    assert (found.num_gpus, found.names, found.driver, found.faults) == (2, ("NVIDIA H100 80GB HBM3",), "570.86.15", ())
    assert found.clocks_mhz == (("1980", "1980"), ("1980", "1980"))


@pytest.mark.parametrize(
    ("row", "remapped", "fault"),
    [
        (WELL.replace("34, 0", "34, 3"), "No, No", "GPU 0: uncorrected memory errors since its last reset"),
        (WELL.replace("Not Active, Not", "Active, Not"), "No, No", "slowed down by its own temperature"),
        (WELL.removesuffix("Not Active") + "Active", "No, No", "slowed down by the power supply"),
        (WELL, "Yes, No", "memory rows to be remapped by a reset"),
        (WELL, "No, Yes", "memory rows that could not be remapped"),
    ],
)
def test_a_fault_is_named_with_its_gpu(nvidia_smi, row, remapped, fault):
    nvidia_smi(row, remapped)
    (found,) = gpus.look().faults
    assert fault in found


def test_what_a_card_does_not_have_is_no_fault(nvidia_smi):
    nvidia_smi(WELL.replace("34, 0", "34, [N/A]"), "N/A, N/A")
    assert not gpus.look().faults


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
    recipe = load_recipe("tiny", [f"--data.root={tmp_path}", "--preflight.write_mib=1"])
    found = facts.node_facts(recipe, tmp_path, RankInfo(rank=0, local_rank=0, world_size=1))["problems"]
    assert any("nvidia-smi lists 1 GPUs and torch" in problem for problem in found) == is_bad, found
