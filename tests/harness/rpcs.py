"""Every RPC of the contract, from the proto files that there are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

PROTOS = Path(__file__).resolve().parents[2] / "protos/tensafe/v1"
METHODS: dict[str, Any] = {
    f"{service.full_name}/{method.name}": method
    for path in sorted(PROTOS.glob("*.proto"))
    for service in import_module(f"tensafe.v1.{path.stem}_pb2").DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Descriptors by `tensafe.v1.TrainingService/Submit`."""
