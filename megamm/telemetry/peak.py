"""Peak arithmetic of a device, the denominator of MFU."""

from __future__ import annotations

import torch

# Dense bf16 TFLOP/s without sparsity, from the vendors' data sheets; the first match in the device's name counts.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("L40S", 362.0),
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
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in _PEAK_TFLOPS if part in name), None)
