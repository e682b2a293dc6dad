"""Checks an adapter in `peft`'s format, as far as that goes without torch and without the model.

Every field that would change what the adapter computes, or that nobody here knows, is refused
rather than ignored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from tensafe.v1.artifacts_pb2 import AdapterShape
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1024 * 1024

_MOST_RANK = 1024
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
}
"""Fields whose value is fixed. Those that are absent have peft's default, which fits."""
_READ = ("r", "lora_alpha", "lora_dropout", "target_modules")
_NO_MATTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",  # how the base's weights lie in `peft`'s memory
    "inference_mode",
    "megatron_core",
    "peft_version",
    "revision",
)
"""Fields that change nothing of what the adapter computes."""
_DEFAULTS = {"qalora_group_size": 16}
"""Values of other fields that say as little as none, false or nothing in it."""
_INITIAL = (True, False, None, "gaussian", "orthogonal", "mica")
"""Beginnings that leave the base's weights alone; `pissa`, `olora` and others change them."""
_KNOWN = {*_MUST_BE, *_READ, *_NO_MATTER, "init_lora_weights"}
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_config(data: bytes, model: Model) -> AdapterShape:
    """The shape that `adapter_config.json` describes.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, UNSUPPORTED_OPTION or UNKNOWN_TARGET_MODULE, naming the
            field.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(CONFIG_FILE, f"is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise _invalid(CONFIG_FILE, "is not a JSON object")
    for field, values in _MUST_BE.items():
        if config.get(field, values[0]) not in values:
            raise _unsupported(field, config[field])
    if config.get("init_lora_weights", True) not in _INITIAL:
        raise _unsupported("init_lora_weights", config["init_lora_weights"])
    for field in sorted(config.keys() - _KNOWN):
        if config[field] and config[field] != _DEFAULTS.get(field):
            raise _unsupported(field, config[field])
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    dropout, targets = config.get("lora_dropout", 0.0), config.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise _invalid(f"{CONFIG_FILE}:r", f"must be from 1 to {_MOST_RANK}")
    if not _is_number(alpha) or not 0 < alpha <= 1e6:
        raise _invalid(f"{CONFIG_FILE}:lora_alpha", "must be above 0 and at most 1e6")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise _invalid(f"{CONFIG_FILE}:lora_dropout", "must be from 0 to below 1")
    if (
        not isinstance(targets, list)
        or not targets
        or not all(isinstance(name, str) and name and len(name) <= 128 for name in targets)
        or len(targets) > 64
        or len(set(targets)) < len(targets)
    ):
        raise _invalid(
            f"{CONFIG_FILE}:target_modules",
            "must be a list of 1 to 64 different module names; write a pattern out as names",
        )
    _check_targets(targets, model)
    return AdapterShape(rank=rank, alpha=alpha, dropout=dropout, target_modules=sorted(targets))


def _check_targets(targets: list[str], model: Model) -> None:
    known = [module.name for module in model.linear_modules]
    unknown = sorted(set(targets) - set(known)) if known else []
    if unknown:
        raise TenSafeFault(
            "UNKNOWN_TARGET_MODULE",
            f"model {model.name} has no linear module {unknown[0]!r}; it has "
            f"{', '.join(sorted(known))}",
            field=f"{CONFIG_FILE}:target_modules",
            module=unknown[0],
        )


def header_bytes(first: bytes, size_bytes: int) -> int:
    """Length of the header of a safetensors file that begins with these 8 bytes.

    Raises:
        TenSafeFault: INVALID_ARGUMENT.
    """
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size_bytes - 8, 100 * 2**20):
        raise _invalid(WEIGHTS_FILE, "is not a safetensors file: its header has no sound length")
    return length


def check_header(data: bytes, size_bytes: int, shape: AdapterShape, model: Model) -> None:
    """Checks names, types, shapes and places of the tensors in a header of a file of this size.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, naming the tensor.
    """
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        raise _invalid(WEIGHTS_FILE, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _invalid(WEIGHTS_FILE, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    spans = []
    sides: dict[str, dict[str, list[int]]] = {}
    for name, entry in header.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX):
            raise _invalid(f"{WEIGHTS_FILE}:{name}", "is not a LoRA weight as `peft` names them")
        extents, span = _entry(name, entry)
        spans.append(span)
        sides.setdefault(name[len(_PREFIX) : -len(end)], {})[end] = extents
    position = 0
    for begin, stop in sorted(spans):
        if begin != position:
            raise _invalid(WEIGHTS_FILE, f"has a gap or an overlap at byte {position} of its data")
        position = stop
    if position != size_bytes - 8 - len(data):
        raise _invalid(WEIGHTS_FILE, "is longer or shorter than its header says")
    _check_modules(sides, shape, model)


def tensors(data: bytes) -> list[tuple[str, str, int]]:
    """Name, type and number of elements of each tensor of a checked header, in the data's order."""
    header = json.loads(data)
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, entry["dtype"], math.prod(entry["shape"])) for name, entry in entries]


def _entry(name: str, entry: Any) -> tuple[list[int], tuple[int, int]]:
    try:
        item_bytes = ITEM_BYTES[entry["dtype"]]
        extents, (begin, end) = entry["shape"], entry["data_offsets"]
        sound = (
            len(extents) == 2
            and all(type(number) is int and number > 0 for number in extents)
            and type(begin) is int
            and type(end) is int
            and begin >= 0
            and end - begin == item_bytes * math.prod(extents)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _invalid(
            f"{WEIGHTS_FILE}:{name}",
            f"must be a matrix of {', '.join(ITEM_BYTES)} with a place that fits its shape",
        )
    return extents, (begin, end)


def _check_modules(
    sides: Mapping[str, Mapping[str, list[int]]], shape: AdapterShape, model: Model
) -> None:
    found: Counter[str] = Counter()
    for module, both in sides.items():
        last = PurePosixPath(module.replace(".", "/")).name
        if last not in shape.target_modules:
            raise _invalid(f"{WEIGHTS_FILE}:{module}", f"is not in {CONFIG_FILE}'s target_modules")
        if len(both) < 2:
            raise _invalid(f"{WEIGHTS_FILE}:{module}", "has only one of lora_A and lora_B")
        if both[_ENDS[0]][0] != shape.rank or both[_ENDS[1]][1] != shape.rank:
            raise _invalid(f"{WEIGHTS_FILE}:{module}", f"is not of rank {shape.rank}")
        found[last] += 1
    expected = {module.name: module.count for module in model.linear_modules}
    for name in shape.target_modules:
        if found[name] != expected.get(name, max(found[name], 1)):
            raise _invalid(
                f"{WEIGHTS_FILE}:{name}",
                f"is adapted {found[name]} times, but {model.name} has {expected.get(name, 0)}",
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _invalid(field: str, what: str) -> TenSafeFault:
    return TenSafeFault(
        "INVALID_ARGUMENT", f"{field} {what}; save the adapter anew with `peft`", field=field
    )


def _unsupported(field: str, value: object) -> TenSafeFault:
    return TenSafeFault(
        "UNSUPPORTED_OPTION",
        f"{CONFIG_FILE} sets {field} to {value!r:.80}, which runs here do not have; merge the "
        "adapter or train it without",
        field=f"{CONFIG_FILE}:{field}",
    )
