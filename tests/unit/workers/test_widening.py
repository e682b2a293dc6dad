"""A narrow model computes in float32 for a moment, and has its own weights again after it."""

from __future__ import annotations

import pytest
import torch
from parity.tiny_models import FAMILIES

from workers.engine.widening import widened


def storages(module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_it_is_the_float32_model_and_the_weights_stay_where_they_are(dtype):
    narrow = FAMILIES["qwen3-tied"].build().to(dtype)
    wide = FAMILIES["qwen3-tied"].build().to(dtype).float()
    ids = torch.arange(9)[None]
    before, places = narrow(ids).logits, storages(narrow)
    seen = []
    hook = narrow.model.layers[1].register_forward_hook(
        lambda layer, _inputs, _output: seen.append(layer.mlp.up_proj.weight.dtype), prepend=True
    )
    with widened(narrow):
        assert torch.equal(narrow(ids).logits, wide(ids).logits)
        assert {p.dtype for p in narrow.model.layers.parameters()} == {dtype}
    hook.remove()
    assert seen == [torch.float32]
    assert storages(narrow) == places
    assert torch.equal(narrow(ids).logits, before)


@torch.no_grad()
def test_a_layer_that_fails_has_its_weights_again():
    narrow = FAMILIES["qwen3-tied"].build().to(torch.bfloat16)
    places = storages(narrow)
    narrow.model.layers[1].mlp.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError), widened(narrow):
        narrow(torch.arange(9)[None])
    assert storages(narrow) == places
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_wide_model_is_left_as_it_is():
    wide = FAMILIES["qwen3-tied"].build()
    places = storages(wide)
    with widened(wide):
        wide(torch.arange(9)[None])
        assert storages(wide) == places
