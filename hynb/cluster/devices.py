"""Peak rates of GPUs, as their makers state them."""

from __future__ import annotations

import re

# Dense bf16 matrix products per second without sparsity, fp16 where a GPU has no bf16, in 1e12 operations; the first
# name that fits counts.
_PEAK_TERAFLOPS = (
    (r"GB300", 2500.0),
    (r"B300", 2250.0),
    (r"GB200|B200", 2250.0),
    (r"H20\b", 148.0),
    (r"(H100|H800).*PCIe", 756.0),
    (r"H100.*NVL", 835.0),
    (r"H100|H800|H200|GH200", 989.0),
    (r"A100|A800", 312.0),
    (r"L20\b", 119.5),
    (r"L4\b", 121.0),
    (r"RTX 6000 Ada", 364.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"A40\b", 149.7),
    (r"A10\b", 125.0),
    (r"A10G\b", 70.0),
    (r"RTX A6000", 154.8),
    (r"A30\b", 165.0),
    (r"V100S", 130.0),
    (r"V100.*PCIE", 112.0),
    (r"V100", 125.0),
)


def peak_flops(name: str) -> float | None:
    """Operations per second of dense bf16 matrix products on a whole GPU; None for one that is not in the table.

    Args:
        name: as the driver reports it, such as "NVIDIA H100 80GB HBM3".
    """
    if "MIG" in name:
        return None
    for pattern, teraflops in _PEAK_TERAFLOPS:
        if re.search(pattern, name):
            return teraflops * 1e12
    return None
