"""Which processor computes, and what libraries were told: they choose their kernels by both."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

_FACTS = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
_LIBRARIES = ("ATEN_", "CUBLAS", "CUDNN_", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_")


def processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Maker, kind and instruction sets, as far as the system tells: two that torch calls by one
    name, such as AVX512, may compute bfloat16 products in different units."""
    facts: dict[str, str] = {}
    try:
        for line in listing.read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    known = facts.get("flags", facts.get("Features", "")).split()
    kind = [facts[name] for name in _FACTS if name in facts]
    return " ".join([platform.machine(), *kind, *(name for name in _SETS if name in known)])


def told(environment: Mapping[str, str] = os.environ) -> str:
    """Variables that the libraries of products read, such as one that keeps instruction sets from
    them: more of them than change bits, since which do is theirs to say."""
    own = {key: value for key, value in environment.items() if key.startswith(_LIBRARIES)}
    return " ".join(f"{key}={own[key]}" for key in sorted(own))
