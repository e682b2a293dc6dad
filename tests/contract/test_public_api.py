"""The frozen public API of the SDK: a change here is a change for every user.

After a change that is meant, regenerate the golden file and review its diff:

    python tests/contract/test_public_api.py --save-golden
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import tensafe_client
import tg_tinker
from tensafe_client import data

GOLDEN = Path(__file__).parents[1] / "golden" / "public_api.json"


def describe(value: Any) -> Any:
    """Names, parameters and defaults; no annotations, which may be written in several ways."""
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        members = {
            name: describe(member)
            for name, member in inspect.getmembers(value)
            if not name.startswith("_") and _ours(value, name)
        }
        described: dict[str, Any] = {"bases": bases, "members": members}
        if dataclasses.is_dataclass(value):
            described["fields"] = [field.name for field in dataclasses.fields(value)]
        if "__init__" in vars(value):
            described["init"] = signature(value.__init__)
        return described
    if isinstance(value, property):
        return "property"
    if callable(value):
        kind = "async " if inspect.iscoroutinefunction(value) else ""
        return kind + signature(value)
    return type(value).__name__


def signature(function: Any) -> str:
    parts = []
    for parameter in inspect.signature(function).parameters.values():
        shown = parameter.replace(annotation=inspect.Parameter.empty)
        if "factory" in str(shown.default):
            shown = shown.replace(default=...)
        parts.append(("*, " if _first_keyword(function, parameter) else "") + str(shown))
    return f"({', '.join(parts)})"


def _first_keyword(function: Any, parameter: inspect.Parameter) -> bool:
    keywords = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    return bool(keywords) and keywords[0].name == parameter.name


def _ours(owner: type, name: str) -> bool:
    for base in owner.__mro__:
        if name in vars(base):
            return base.__module__.startswith("tensafe_client")
    return False


def current() -> dict[str, Any]:
    return {
        "tensafe_client": {n: describe(getattr(tensafe_client, n)) for n in tensafe_client.__all__},
        "tensafe_client.data": {n: describe(getattr(data, n)) for n in data.__all__},
    }


def test_the_public_api_is_frozen() -> None:
    golden = json.loads(GOLDEN.read_text())
    now = current()
    for module, names in golden.items():
        assert sorted(now[module]) == sorted(names), module
        for name, described in names.items():
            assert now[module][name] == described, f"{module}.{name}"


def test_the_alias_is_the_client() -> None:
    assert tg_tinker.__all__ == tensafe_client.__all__
    for name in tensafe_client.__all__:
        assert getattr(tg_tinker, name) is getattr(tensafe_client, name)


def test_the_asyncio_twins_have_the_same_names() -> None:
    for sync, twin in (
        (tensafe_client.ServiceClient, tensafe_client.AsyncServiceClient),
        (tensafe_client.TrainingClient, tensafe_client.AsyncTrainingClient),
        (tensafe_client.Admin, tensafe_client.AsyncAdmin),
    ):
        public = [name for name in dir(sync) if not name.startswith("_")]
        assert public == [name for name in dir(twin) if not name.startswith("_")]
        for name in public:
            method = getattr(sync, name)
            if inspect.isfunction(method):
                assert signature(method) == signature(getattr(twin, name)), name


def test_the_seeds_defaults() -> None:
    config = tensafe_client.TrainingConfig("m")
    assert dataclasses.asdict(config) == {
        "model_ref": "m",
        "lora_config": None,
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "momentum": None,
            "grad_clip_norm": None,
        },
        "dp_config": None,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": None,
        "seed": None,
        "name": None,
        "deterministic": False,
    }
    assert dataclasses.asdict(tensafe_client.LoRAConfig()) == {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"],
        "bias": "none",
    }


if __name__ == "__main__" and sys.argv[1:] == ["--save-golden"]:
    GOLDEN.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")
