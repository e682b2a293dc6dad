"""In how many steps of a run a unit of a client's batches is: once in a window, and not too often.

A unit is known by a keyed hash: of its unit id, or of its tokens, so that the books name nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tensafe.v1 import training_pb2 as training
from tensafe.v1.types_pb2 import DATA_TYPE_INT32, Tensor
from tensafe.wire.tensors import decode
from tensafe_server.privacy.runs import Units


@dataclass(slots=True)
class OpenWindow:
    """The units of the batches since the last step.

    Attributes:
        seen: all of them.
        used: those that add to the step.
    """

    seen: set[bytes] = field(default_factory=set)
    used: list[bytes] = field(default_factory=list)

    def take(self, keys: Sequence[bytes], uses: Mapping[bytes, int], most: int | None) -> Tensor:
        """Takes a batch in.

        Args:
            keys: of each datum, its unit.
            uses: in how many steps before each unit was; 0 where it is left out.
            most: in how many it may be; None: any number.

        Returns:
            int32 [B]: the number of each datum's unit in the batch; −1: it adds nothing.
        """
        different = dict.fromkeys(keys)
        adding = [
            key
            for key in different
            if key not in self.seen and (most is None or uses.get(key, 0) < most)
        ]
        numbers = dict.fromkeys(different, -1) | {key: n for n, key in enumerate(adding)}
        self.seen.update(different)
        self.used += adding
        found = np.fromiter((numbers[key] for key in keys), "<i4", len(keys))
        return Tensor(dtype=DATA_TYPE_INT32, shape=found.shape, data=found.tobytes())


def unit_keys(batch: training.Batch, units: Units, secret: bytes) -> list[bytes]:
    """The keyed hash of each datum's unit, 16 bytes."""
    if units is Units.UNIT_ID:
        return [_hash(secret, b"unit", [unit.encode()]) for unit in batch.unit_ids]
    offsets = decode(batch.offsets)
    columns = [decode(batch.input_tokens)]
    columns += [decode(item.tensor) for item in batch.loss_inputs if item.name == "target_tokens"]
    return [
        _hash(secret, b"example", [column[begin:end].tobytes() for column in columns])
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def _hash(secret: bytes, kind: bytes, parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(key=secret, person=kind, digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
