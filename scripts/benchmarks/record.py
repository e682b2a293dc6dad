"""What every benchmark writes with `--json FILE`: ratios, raw figures, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tensafe", "grpcio", "protobuf", "uvloop", "torch", "transformers", "peft", "numpy")


def machine() -> dict[str, Any]:
    """The machine as far as figures depend on it."""
    cpu = platform.processor()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "instruction_sets": [
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags
        ],
        "gpu": _gpu(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(path: Path, name: str, ratios: dict[str, Any], raw: dict[str, Any]) -> None:
    """Writes one benchmark's record."""
    record = {
        "benchmark": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ratios": ratios,
        "raw": raw,
        "versions": versions(),
        "machine": machine(),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """Rows (what, figure, baseline, goal) as aligned columns."""
    rows = [("", "measured", "baseline", "goal"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
