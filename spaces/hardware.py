"""Peak FLOP/s of devices, dense, from their data sheets; a device that is not listed has no peak."""

from __future__ import annotations

from collections.abc import Mapping

# (part of the name that CUDA reports, {precision: FLOP/s}), the more specific name first: "H200" holds no "H20" after it was
# tried, "H100 PCIe" is tried before "H100". Data sheets give sparse figures beside; these are the dense ones. fp32 is that of the
# vector units, which PyTorch uses unless TF32 is allowed.
_T = 1e12
PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    # https://resources.nvidia.com/en-us-data-center-overview/blackwell-datasheet (B200, per GPU, dense)
    ("B200", {"bf16": 2250 * _T, "fp32": 75 * _T}),
    # https://www.nvidia.com/en-us/data-center/h200/ (SXM; the NVL's clock is lower)
    ("H200 NVL", {"bf16": 835.5 * _T, "fp32": 60 * _T}),
    ("H200", {"bf16": 989.4 * _T, "fp32": 66.9 * _T}),
    # https://www.nvidia.com/en-us/data-center/h100/
    ("H100 PCIe", {"bf16": 756.0 * _T, "fp32": 51.2 * _T}),
    ("H100 NVL", {"bf16": 835.5 * _T, "fp32": 60 * _T}),
    ("H100", {"bf16": 989.4 * _T, "fp32": 66.9 * _T}),
    # https://www.nvidia.com/en-us/data-center/a100/
    ("A100", {"bf16": 312.0 * _T, "fp32": 19.5 * _T}),
    # https://www.nvidia.com/en-us/data-center/l40s/
    ("L40S", {"bf16": 362.05 * _T, "fp32": 91.6 * _T}),
    # https://www.nvidia.com/en-us/data-center/l4/
    ("L4", {"bf16": 121.0 * _T, "fp32": 30.3 * _T}),
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    ("A10", {"bf16": 125.0 * _T, "fp32": 31.2 * _T}),
)


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Return a GPU's dense peak at a precision (`fp32`, `bf16`), or None if the device is not known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
    """
    words = device_name.replace("-", " ").split()
    for name, peaks in PEAKS:
        # Whole words: "L4" is no "L40", "A10" no "A100", "H20" no "H200".
        if all(part in words for part in name.split()):
            return peaks.get(precision)
    return None
