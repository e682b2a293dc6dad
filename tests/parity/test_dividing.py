"""Whatever number of threads an operation is divided among, it computes the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from parity.deterministic_run import opened, train
from parity.tiny_runs import request_of, rows_of, settings, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from workers.engine import dividing
from workers.engine.base_model import BaseModel, freeze
from workers.engine.dividing import product
from workers.engine.engine import TorchBackend
from workers.engine.kernels import KERNELS, fused

FROZEN = {torch.ops.aten.mm.default, torch.ops.aten.linear.default}
BATCH = request_of(rows_of(3, [9, 30, 2]))


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exact() -> BaseModel:
    return freeze("tiny", tiny_llama().double())


class Threads(TorchDispatchMode):
    """Counts operations by how many threads they could use: products with the model's weights, and
    all others."""

    def __init__(self, model: BaseModel) -> None:
        super().__init__()
        self._weights = {layer.weight.data_ptr() for layer in model.layers.values()}
        self.products: Counter[int] = Counter()
        self.others: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        frozen = func in FROZEN and any(one.data_ptr() in self._weights for one in tensors)
        if tensors and tensors[0].is_floating_point():
            (self.products if frozen else self.others)[torch.get_num_threads()] += 1
        return func(*args, **kwargs or {})


def test_a_frozen_layer_keeps_nothing_for_its_way_back():
    """By threads of our choice it is a function of ours, and a gradient by weights is not asked."""
    model = freeze("tiny", tiny_llama())
    layer = model.layers["model.layers.0.mlp.up_proj"]
    inputs = torch.randn(9, layer.in_features, requires_grad=True)
    kept: list[torch.Tensor] = []
    with model.dividing(9), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda own: own):
        outputs = layer(inputs)
    assert not kept
    assert type(outputs.grad_fn).__name__ == "_FrozenBackward"
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(9, -1))


def gradient(model: BaseModel) -> torch.Tensor:
    backend = TorchBackend([model], token_budget=4096)
    backend.open_run("run", settings(lora={"dropout": 0.3, "target_modules": ("q_proj",)}), None)
    with torch.no_grad():
        backend._runs["run"].adapter.weights.normal_(generator=torch.Generator().manual_seed(1))
    backend.forward_backward("run", 1, BATCH)
    found = backend._runs["run"].accumulator
    assert found is not None
    return found


@pytest.fixture
def by_one(exact) -> torch.Tensor:
    torch.set_num_threads(1)
    found = gradient(exact)
    torch.set_num_threads(2)
    return found


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("rest", [1, 2])
def test_a_pass_is_the_same(monkeypatch, exact, by_one, products, rest):
    monkeypatch.setattr(dividing, "_WORTHY_PRODUCT", 0 if products == 2 else 2**60)
    monkeypatch.setattr(dividing, "_WORTHY_ELEMENTS", 0 if rest == 2 else 2**60)
    with Threads(exact) as seen:
        found = gradient(exact)
    assert (found - by_one).norm() <= 1e-12 * by_one.norm()
    # Forward products of all layers, backward ones of all but the first layer's first three.
    assert seen.products == {products: 2 * len(exact.layers) - 3}
    assert seen.others[rest] > 400


def test_sizes_decide(exact):
    ran: list[int] = []
    with exact.dividing(1):
        for rows, matrix in ((1, 64 * 64), (100, 2**20), (1, 2048 * 2048)):
            product(rows, matrix, lambda: ran.append(torch.get_num_threads()))
        with exact.dividing(2**20):
            ran.append(torch.get_num_threads())
            product(1, 64 * 16, lambda: ran.append(torch.get_num_threads()))
        ran.append(torch.get_num_threads())
    assert ran == [1, 2, 2, 2, 1, 1]


def test_a_product_outside_of_passes_has_all_threads():
    assert product(1, 1, torch.get_num_threads) == 2


def test_a_pass_that_fails_gives_the_threads_back(exact):
    with pytest.raises(ZeroDivisionError), exact.dividing(1):
        product(1, 1, lambda: 1 // 0)
    assert torch.get_num_threads() == 2
    assert not dividing.chooses()


def test_on_one_thread_or_another_device_nothing_is_chosen():
    with dividing.dividing(1, "cuda:0"):
        assert not dividing.chooses()
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with dividing.dividing(2**30):
        assert not dividing.chooses()
        assert torch.get_num_threads() == 1


def test_a_model_whose_products_are_not_linear_layers_keeps_all_threads():
    module = tiny_llama()
    module.model.experts = torch.nn.ParameterList([torch.zeros(300, 300)])
    with freeze("experts", module).dividing(1):
        assert torch.get_num_threads() == 2


def test_compiled_kernels_keep_the_threads_that_they_were_made_with(exact):
    made = KERNELS[0]
    made.adopt(made.plain)
    try:
        with fused(1000, exact=False), exact.dividing(1):
            assert torch.get_num_threads() == 2
        with fused(1000, exact=True), exact.dividing(1):
            assert torch.get_num_threads() == 1
    finally:
        made.adopt(None)


def test_a_deterministic_run_has_its_bits_again(monkeypatch):
    monkeypatch.setattr(dividing, "_WORTHY_PRODUCT", 200_000)
    monkeypatch.setattr(dividing, "_WORTHY_ELEMENTS", 4096)
    model = freeze("tiny", tiny_llama())
    once = train(opened(TorchBackend([model], token_budget=50)), range(2))
    assert train(opened(TorchBackend([model], token_budget=4096)), range(2)) == once
