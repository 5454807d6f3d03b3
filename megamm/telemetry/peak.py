"""Peak arithmetic of a device, the denominator of MFU."""

from __future__ import annotations

import re

import torch

# Dense bf16 TFLOP/s without sparsity, from the vendors' data sheets; the first whose words are in the device's name counts.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("V100", 125.0),
    ("MI300X", 1307.0),
)


def peak_flops(device: torch.device, configured_tflops: float) -> float | None:
    """Peak floating-point operations a second of `device`.

    Args:
        device: Where the model runs.
        configured_tflops: `telemetry.peak_tflops`; 0 looks the device's name up.

    Returns:
        FLOP/s, or None where the device is not known (then MFU is left out rather than guessed).
    """
    if configured_tflops:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """FLOP/s of a device by its name, or None for an unknown one; only whole words match, so an L40 is no L4."""
    return next((peak * 1e12 for model, peak in _PEAK_TFLOPS if re.search(rf"\b{re.escape(model)}\b", name)), None)
