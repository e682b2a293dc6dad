"""Adapters that `peft` has saved elsewhere, read as if one of our runs had saved its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"


def is_peft_folder(directory: Path) -> bool:
    """Whether a folder has an adapter, and nothing of a run beside it."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "state.json").exists()


def peft_state(directory: Path, model: str) -> dict[str, Any]:
    """What stands in for `state.json`: no step was applied here, and no seed is known.

    The coordinator has checked the configuration when the adapter came.
    """
    config = json.loads((directory / CONFIG_FILE).read_text())
    return {
        "complete": False,
        "model": model,
        "step": 0,
        "seed": 0,
        "lora": {
            "rank": int(config.get("r", 8)),
            "alpha": float(config.get("lora_alpha", 8)),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "target_modules": config["target_modules"],
        },
    }
