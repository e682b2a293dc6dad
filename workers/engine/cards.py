"""How a base model is described to the coordinator."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.engine.base_model import BaseModel
from workers.operations import ModelCard

_WANTED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def model_card(model: BaseModel) -> ModelCard:
    """Everything that a tenant may know of the model."""
    files = model.tokenizer_files
    return ModelCard(
        name=model.name,
        references=model.references,
        architecture=type(model.module).__name__,
        parameters=model.parameters,
        vocabulary_size=model.vocabulary_size,
        context_length=model.context_length,
        dtype=str(model.dtype).removeprefix("torch."),
        linear_modules=model.linear_modules,
        has_chat_template=bool(getattr(model.tokenizer, "chat_template", None)),
        tokenizer_sha256=files_digest(files),
        tokenizer_files=files,
    )


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that clients need to encode text as the worker does, as `save_pretrained` writes
    them."""
    with tempfile.TemporaryDirectory(prefix="tensafe-tokenizer-") as name:
        tokenizer.save_pretrained(name)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(name).iterdir())
            if path.name in _WANTED
        }


def files_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the files in name order, each as `<sha256>  <name>\\n`; empty without files."""
    if not files:
        return ""
    listing = "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)
    )
    return hashlib.sha256(listing.encode()).hexdigest()
