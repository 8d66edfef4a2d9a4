"""Data sheets of the GPUs that people rent: dense peaks, memory, bandwidth. A device that is not here has no numbers.

The sheets print figures with structured sparsity; the dense ones here are half of them. Two cards of one marketing name are two
rows: an H100 is an SXM module, a PCIe card or an NVL, with peaks of 989, 756 and 835 TFLOP/s in bf16. GeForce cards have the peaks
of products that are summed in fp32, as PyTorch does; their sheets also print twice as much, summed in fp16.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One row of a data sheet."""

    name: str
    """What a user calls it: `h100-sxm`."""
    cuda_words: tuple[str, ...]
    """Words that are in the name that CUDA reports, all of them."""
    tera_flops_per_second: Mapping[str, float]
    """Dense peak by number format, of the matrix units; `fp32` of the vector units, which PyTorch uses unless TF32 is allowed."""
    memory_gigabytes: float
    """Of 10^9 bytes."""
    gigabytes_per_second: float
    """To and from its memory."""
    link_gigabytes_per_second: float
    """To and from the other devices of a node, both directions together: NVLink, or PCIe where there is none."""
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gigabytes * 1e9)

    @property
    def link_bytes_per_second(self) -> float:
        """What NCCL's rings send over the link, each way."""
        return self.link_gigabytes_per_second * 1e9 / 2 * MEASURED_LINK_SHARE


# Of the link's rate, as nccl-tests shows on eight H100: 370 of 450 GB/s (a maintainer of NCCL, who gives a fifth for its protocol:
# https://github.com/NVIDIA/nccl-tests/issues/212). That it is the same share over PCIe is an assumption.
MEASURED_LINK_SHARE = 370 / 450
_HOPPER_SXM = {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp8": 1978.9, "fp32": 66.9}
_HOPPER_NVL = {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp8": 1670.5, "fp32": 60.0}
_AMPERE_100 = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}

# The more specific name first: words are compared whole, so that "L4" is no "L40" and "H20" no "H200".
DEVICES: tuple[Device, ...] = (
    Device(
        name="b200",
        cuda_words=("B200",),
        tera_flops_per_second={"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp8": 4500.0, "fp32": 75.0},
        memory_gigabytes=180,
        gigabytes_per_second=7700,
        link_gigabytes_per_second=1800,
        source="https://resources.nvidia.com/en-us-data-center-overview/blackwell-datasheet",
    ),
    Device(
        name="h200-nvl",
        cuda_words=("H200", "NVL"),
        tera_flops_per_second=_HOPPER_NVL,
        memory_gigabytes=141,
        gigabytes_per_second=4800,
        link_gigabytes_per_second=900,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
    Device(
        name="h200-sxm",
        cuda_words=("H200",),
        tera_flops_per_second=_HOPPER_SXM,
        memory_gigabytes=141,
        gigabytes_per_second=4800,
        link_gigabytes_per_second=900,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
    Device(
        name="h100-pcie",
        cuda_words=("H100", "PCIe"),
        tera_flops_per_second={"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp8": 1513.0, "fp32": 51.2},
        memory_gigabytes=80,
        gigabytes_per_second=2000,
        link_gigabytes_per_second=128,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/gtcs22/data-center/h100/PB-11133-001_v01.pdf",
    ),
    Device(
        name="h100-nvl",
        cuda_words=("H100", "NVL"),
        tera_flops_per_second=_HOPPER_NVL,
        memory_gigabytes=94,
        gigabytes_per_second=3900,
        link_gigabytes_per_second=600,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    Device(
        name="h100-sxm",
        cuda_words=("H100",),
        tera_flops_per_second=_HOPPER_SXM,
        memory_gigabytes=80,
        gigabytes_per_second=3350,
        link_gigabytes_per_second=900,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    Device(
        name="h20",
        cuda_words=("H20",),
        tera_flops_per_second={"bf16": 148.0, "fp16": 148.0, "tf32": 74.0, "fp8": 296.0, "fp32": 44.0},
        memory_gigabytes=96,
        gigabytes_per_second=4000,
        link_gigabytes_per_second=900,
        source="https://github.com/pytorch/torchtitan/blob/main/torchtitan/tools/utils.py (no public data sheet)",
    ),
    Device(
        name="a100-80gb-sxm",
        cuda_words=("A100", "SXM4", "80GB"),
        tera_flops_per_second=_AMPERE_100,
        memory_gigabytes=80,
        gigabytes_per_second=2039,
        link_gigabytes_per_second=600,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    Device(
        name="a100-80gb-pcie",
        cuda_words=("A100", "PCIe", "80GB"),
        tera_flops_per_second=_AMPERE_100,
        memory_gigabytes=80,
        gigabytes_per_second=1935,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    Device(
        name="a100-40gb",
        cuda_words=("A100",),
        tera_flops_per_second=_AMPERE_100,
        memory_gigabytes=40,
        gigabytes_per_second=1555,
        link_gigabytes_per_second=64,
        source="https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
    ),
    Device(
        name="l40s",
        cuda_words=("L40S",),
        tera_flops_per_second={"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp8": 733.0, "fp32": 91.6},
        memory_gigabytes=48,
        gigabytes_per_second=864,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    Device(
        name="l40",
        cuda_words=("L40",),
        tera_flops_per_second={"bf16": 181.05, "fp16": 181.05, "tf32": 90.5, "fp8": 362.0, "fp32": 90.5},
        memory_gigabytes=48,
        gigabytes_per_second=864,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/en-us/data-center/l40/",
    ),
    Device(
        name="l4",
        cuda_words=("L4",),
        tera_flops_per_second={"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp8": 242.5, "fp32": 30.3},
        memory_gigabytes=24,
        gigabytes_per_second=300,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/en-us/data-center/l4/",
    ),
    Device(
        name="a10",
        cuda_words=("A10",),
        tera_flops_per_second={"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
        memory_gigabytes=24,
        gigabytes_per_second=600,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
    ),
    Device(
        name="a40",
        cuda_words=("A40",),
        tera_flops_per_second={"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
        memory_gigabytes=48,
        gigabytes_per_second=696,
        link_gigabytes_per_second=64,
        source="https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    ),
    Device(
        name="t4",
        cuda_words=("T4",),
        tera_flops_per_second={"fp16": 65.0, "fp32": 8.1},
        memory_gigabytes=16,
        gigabytes_per_second=320,
        link_gigabytes_per_second=32,
        source="https://www.nvidia.com/en-us/data-center/tesla-t4/",
    ),
    Device(
        name="a10g",
        cuda_words=("A10G",),
        tera_flops_per_second={"bf16": 70.0, "fp16": 70.0, "tf32": 35.0, "fp32": 35.0},
        memory_gigabytes=24,
        gigabytes_per_second=600,
        link_gigabytes_per_second=64,
        source="https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    Device(
        name="rtx-5090",
        cuda_words=("GeForce", "5090"),
        tera_flops_per_second={"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp8": 419.0, "fp32": 104.8},
        memory_gigabytes=32,
        gigabytes_per_second=1792,
        link_gigabytes_per_second=128,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
    Device(
        name="rtx-4090",
        cuda_words=("GeForce", "4090"),
        tera_flops_per_second={"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp8": 330.3, "fp32": 82.6},
        memory_gigabytes=24,
        gigabytes_per_second=1008,
        link_gigabytes_per_second=64,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    Device(
        name="rtx-3090",
        cuda_words=("GeForce", "3090"),
        tera_flops_per_second={"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},
        memory_gigabytes=24,
        gigabytes_per_second=936,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    Device(
        name="rtx-6000-ada",
        cuda_words=("RTX", "6000", "Ada"),
        tera_flops_per_second={"bf16": 364.2, "fp16": 364.2, "tf32": 182.1, "fp8": 728.5, "fp32": 91.1},
        memory_gigabytes=48,
        gigabytes_per_second=960,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/rtx-6000/proviz-print-rtx6000-datasheet-web-2504660.pdf",
    ),
    Device(
        name="rtx-a6000",
        cuda_words=("A6000",),
        tera_flops_per_second={"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
        memory_gigabytes=48,
        gigabytes_per_second=768,
        link_gigabytes_per_second=64,
        source="https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    Device(
        name="v100-32gb-sxm",
        cuda_words=("V100", "SXM2", "32GB"),
        tera_flops_per_second={"fp16": 125.0, "fp32": 15.7},
        memory_gigabytes=32,
        gigabytes_per_second=900,
        link_gigabytes_per_second=300,
        source="https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    ),
    Device(
        name="v100-16gb-sxm",
        cuda_words=("V100", "SXM2", "16GB"),
        tera_flops_per_second={"fp16": 125.0, "fp32": 15.7},
        memory_gigabytes=16,
        gigabytes_per_second=900,
        link_gigabytes_per_second=300,
        source="https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    ),
    Device(
        name="mi325x",
        cuda_words=("MI325X",),
        tera_flops_per_second={"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp8": 2614.9, "fp32": 163.4},
        memory_gigabytes=256,
        gigabytes_per_second=6000,
        link_gigabytes_per_second=896,
        source="https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html",
    ),
    Device(
        name="mi300x",
        cuda_words=("MI300X",),
        tera_flops_per_second={"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp8": 2614.9, "fp32": 163.4},
        memory_gigabytes=192,
        gigabytes_per_second=5300,
        link_gigabytes_per_second=896,
        source="https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
)

# Words of a name that say that it is not the whole card of that number, or another one.
_OF_VGPU = re.compile(r"\d+[abcq]")
_OF_ANOTHER = {"mig", "laptop", "max", "d", "ti", "super"}


class UnknownDevice(ValueError):
    """There is no data sheet of that name; the message is one line for the user."""


def device_named(name: str) -> Device:
    """Return the row of a name as a user gives it: `h100-sxm`.

    Raises:
        UnknownDevice: there is none.
    """
    names = [device.name for device in DEVICES]
    name = name.lower()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UnknownDevice(f"--device: no data sheet of '{name}'; there are: {', '.join(names)}{hint}")
    return DEVICES[names.index(name)]


def device_of_cuda_name(cuda_name: str) -> Device | None:
    """Return the row of a GPU, or None if it is not known; a slice (MIG, vGPU) and a laptop's GPU are not the card of that number.

    Args:
        cuda_name: as `torch.cuda.get_device_name()` gives it.
    """
    words = {word.lower() for word in cuda_name.replace("-", " ").split()}
    if words & _OF_ANOTHER or any(_OF_VGPU.fullmatch(word) for word in words):
        return None
    return next((device for device in DEVICES if all(word.lower() in words for word in device.cuda_words)), None)


def peak_flops_per_second(cuda_name: str, precision: str) -> float | None:
    """Return a GPU's dense peak at a number format, or None if the device or the format is not known there.

    Args:
        cuda_name: as `torch.cuda.get_device_name()` gives it.
        precision: `fp32`, `tf32`, `bf16`, `fp16` or `fp8`.
    """
    device = device_of_cuda_name(cuda_name)
    peak = None if device is None else device.tera_flops_per_second.get(precision)
    return None if peak is None else peak * 1e12


def why_no_peak(cuda_name: str, precision: str) -> str:
    """Return why `peak_flops_per_second` knows nothing of a GPU at a number format."""
    if device_of_cuda_name(cuda_name) is None:
        return f"unknown device {cuda_name}"
    return f"no {precision} peak known for {cuda_name}"
