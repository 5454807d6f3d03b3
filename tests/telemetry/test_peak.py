import pytest
import torch

from megamm.telemetry.peak import peak_flops, peak_of_name


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_device_has_the_peak_of_its_own_model(name, tflops):
    assert peak_of_name(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA H2000", "NVIDIA GeForce RTX 4090", "NVIDIA GB300", "cpu"])
def test_an_unknown_device_has_no_peak(name):
    assert peak_of_name(name) is None


def test_the_recipe_overrides_the_table_and_a_processor_has_no_peak():
    assert peak_flops(torch.device("cpu"), 12.5) == 12.5e12
    assert peak_flops(torch.device("cpu"), 0) is None
