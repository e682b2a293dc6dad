"""What the engine is fast by leaving out stays out: no row goes through the head that is not
scored, all logits are never there at once, and frozen weights get no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.tiny_runs import perturb, request_of, rows_of, settings, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workers.engine import head
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend

LENGTHS, PROMPT = [40, 33, 21], 8
CHUNK = 32
"""Rows of logits at least that a pass may hold."""
SIZES = {"intermediate_size": 112}
"""Of no other width than the vocabulary's."""


class Shapes(TorchDispatchMode):
    """The shapes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen |= {tuple(x.shape) for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Of a training step, of whose rows the first tokens are not scored."""
    model = freeze("tiny", tiny_llama(**SIZES))
    monkeypatch.setattr(head, "_CHUNK_LOGITS_CPU", CHUNK * model.vocabulary_size)
    backend = TorchBackend([model])
    backend.open_run("run", settings(), None)
    perturb(backend, "run")
    request = request_of(rows_of(3, LENGTHS), masked=PROMPT)
    with Shapes() as shapes:
        backend.forward_backward("run", 1, request)
    assert all(p.grad is None and not p.requires_grad for p in model.body.parameters())
    return shapes.seen


def test_only_scored_rows_meet_the_head_and_never_all_at_once(shapes: set[tuple[int, ...]]):
    vocabulary = tiny_llama(**SIZES).config.vocab_size
    rows = {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == vocabulary}
    scored = sum(length - PROMPT for length in LENGTHS)
    assert rows, "logits were seen"
    chunks = -(-scored // CHUNK)
    assert chunks > 1
    # Chunks of like size, which would be of 32 if all rows were in them.
    assert max(rows) == -(-scored // chunks) < CHUNK


def test_no_gradient_is_made_for_frozen_weights(shapes: set[tuple[int, ...]]):
    frozen = {
        tuple(shape)
        for parameter in tiny_llama(**SIZES).parameters()
        if parameter.ndim == 2
        for shape in (parameter.shape, parameter.shape[::-1])
    }
    assert not shapes & frozen
