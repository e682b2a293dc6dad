"""From the command line's model references to a backend that is ready."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from workers.engine.base_model import BaseModel, freeze
from workers.engine.cards import tokenizer_files
from workers.engine.checks import UnsupportedModelError
from workers.engine.choosing import choose_product
from workers.engine.compiling import CompileError, Compiling, compile_if_asked
from workers.engine.engine import TorchBackend
from workers.engine.model_sources import ModelLoadError, ModelSource, resolve
from workers.losses import LossRegistry

__all__ = ["ModelLoadError", "load_backend", "load_model", "pick_device", "pick_dtype"]

log = logging.getLogger(__name__)

_NAMED_KEYS = 5


def load_backend(
    references: Sequence[str],
    *,
    device: str,
    dtype: str,
    threads: int,
    token_budget: int | None = None,
    run_bytes: int | None = None,
    sample_bytes: int | None = None,
    losses: LossRegistry | None = None,
    compiling: Compiling = Compiling.OFF,
    captures: bool = True,
) -> TorchBackend:
    """Loads every model onto one device.

    Args:
        references: `[NAME=]REF`, each a known alias, a local directory or a hub id.
        device: `auto`, `cpu` or `cuda:N`.
        dtype: `auto`, `bfloat16` or `float32`.
        threads: torch's CPU threads.
        token_budget, run_bytes, sample_bytes, losses, captures: as `TorchBackend` takes them.
        compiling: whether kernels are compiled.

    Raises:
        ModelLoadError: a model or the device is not to be had, never a substitute; or kernels
            cannot be compiled and must be.
    """
    torch.set_num_threads(threads)
    place = pick_device(device)
    if place.startswith("cuda"):
        # Read when the library starts. With another setting its products are not the same each
        # time, and torch refuses them to deterministic runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kind = pick_dtype(dtype, place)
    sources = [resolve(reference) for reference in references]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ModelLoadError(
            f"two models have the same name among {names}; tell them apart with --model NAME=REF"
        )
    loaded = [load_model(source, place, kind) for source in sources]
    backend = TorchBackend(
        loaded,
        token_budget,
        run_bytes,
        losses=losses,
        sample_bytes=sample_bytes,
        captures=captures,
    )
    try:
        compile_if_asked(compiling, place, kind)
    except CompileError as error:
        raise ModelLoadError(f"{error}; install what it lacks, or use --compile off") from error
    return backend


def load_model(source: ModelSource, device: str, dtype: torch.dtype) -> BaseModel:
    """Loads one model and its tokenizer, frozen, onto a device.

    Raises:
        ModelLoadError: with the reason and the remedy.
    """
    from transformers import AutoModelForCausalLM

    try:
        # trust_remote_code stays off: a model brings no code.
        module: Any
        module, loaded = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # Told by name below, instead of in transformers' log.
            ignore_mismatched_sizes=True,
        )
        _check_complete(source, loaded)
        tokenizer = _load_tokenizer(source)
        model = freeze(
            source.name,
            module.to(device),
            tokenizer=tokenizer,
            references=source.references,
            tokenizer_files={} if tokenizer is None else tokenizer_files(tokenizer),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnsupportedModelError) as error:
        raise ModelLoadError(
            f"cannot load model {source.name}: {_reason(error)}. {source.remedy}"
        ) from error
    model.product = choose_product(model)
    log.info(
        "loaded %s: %.1f M parameters, %s on %s, adapters by %s",
        model.name,
        model.parameters / 1e6,
        str(dtype).removeprefix("torch."),
        device,
        type(model.product).__name__,
    )
    return model


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        # `transformers` would say to turn it on.
        return "it is defined by Python code of its own, and TenSafe runs no code of a model"
    return str(error)


def _check_complete(source: ModelSource, loaded: Mapping[str, Any]) -> None:
    """`transformers` fills what a checkpoint lacks with random numbers and goes on; we do not.

    Tied weights count as there: `transformers` leaves them out of what is missing.

    Raises:
        ModelLoadError: naming the weights.
    """
    for fault, keys in (
        ("lacks", sorted(loaded["missing_keys"])),
        ("has other shapes for", sorted(str(key) for key, *_ in loaded["mismatched_keys"])),
    ):
        if keys:
            named = ", ".join(keys[:_NAMED_KEYS])
            more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
            raise ModelLoadError(
                f"cannot load model {source.name}: its checkpoint {fault} {named}{more}. "
                f"{source.remedy}"
            )


def _load_tokenizer(source: ModelSource) -> Any:
    """None for a local directory that holds no tokenizer: such a model takes token ids only."""
    from transformers import AutoTokenizer

    directory = Path(source.location)
    if directory.is_dir() and not (directory / "tokenizer_config.json").exists():
        log.warning("model %s has no tokenizer; it takes prompts as token ids only", source.name)
        return None
    return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)


def pick_device(device: str) -> str:
    """`auto`: the first GPU, or the CPU.

    Raises:
        ModelLoadError: there is no such device.
    """
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ModelLoadError(f"no device {device!r}; use auto, cpu or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(
            f"no device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} "
            "GPUs; use --device cpu, or install a torch build for your GPU"
        )
    return f"cuda:{index or 0}"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto`: bfloat16 where the device multiplies it natively, else float32."""
    if dtype != "auto":
        kind: torch.dtype = getattr(torch, dtype)
        return kind
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
