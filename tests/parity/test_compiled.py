"""Compiled kernels: what they compute, that nothing is compiled on a step's path, who uses them."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from parity.deterministic_run import opened, train
from parity.tiny_models import FAMILIES
from parity.tiny_runs import perturb, request_of, rows_of, settings, tiny_llama

from workers.engine import compiling, kernels
from workers.engine.base_model import freeze
from workers.engine.compiling import CompileError, Compiling, compile_if_asked, compile_kernels
from workers.engine.engine import TorchBackend
from workers.engine.gated import _KnownGate
from workers.engine.kernels import KERNELS, fused
from workers.engine.randomness import mix32
from workers.operations import StepRequest

CPU = torch.device("cpu")


@pytest.fixture
def plain():
    """Whatever a test adopts is gone after it."""
    yield
    for each in KERNELS:
        each.adopt(None)


@pytest.fixture(scope="module")
def compiled():
    """Every kernel's compiled form, whether it gains or not; skipped where nothing compiles."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # As if each took half the time that it takes as written.
        plain = {id(each.plain) for each in KERNELS}
        patch.setattr(compiling, "_seconds", lambda form, *_: 2.0 if id(form) in plain else 1.0)
        names = compile_kernels("cpu", torch.float32)
    assert names == [each.name for each in KERNELS]
    for each in KERNELS:
        found[each.name] = each._fused
        each.adopt(None)
    return found


@pytest.fixture
def adopted(compiled, plain, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", 2)
    for each in KERNELS:
        each.adopt(compiled[each.name])


def resized(each, sample, rows: int, width: int):
    """The sample's arguments in other sizes."""
    if each.name == "keep_bits":
        keys, last = mix32(torch.arange(rows, dtype=torch.int32)), sample[3][0]
        return [keys, mix32(keys.new_tensor(range((width + 1) // 2))), width, last.repeat(rows, 1)]

    def fit(value):
        if not isinstance(value, torch.Tensor):
            # Another model's ε.
            return 3e-6 if isinstance(value, float) else value
        shape = (width,) if value.ndim == 1 else (rows, 1 if value.shape[1] == 1 else width)
        return torch.randn(shape, dtype=value.dtype).abs_().add_(0.1)

    return [fit(value) for value in sample]


SIZES = [(1013, 640), (2, 7), (33, 33), (2, 4096), (129, 130)]


@pytest.mark.slow
@pytest.mark.parametrize("each", KERNELS, ids=lambda each: each.name)
def test_a_compiled_kernel_serves_every_size_without_compiling_again(adopted, each):
    for rows, width in SIZES:
        for sample in each.samples(CPU, torch.float32):
            arguments = resized(each, sample, rows, width)
            with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
                found = each._fused(*arguments)
            torch.testing.assert_close(found, each.plain(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_a_kernel_was_not_made_for_compiles_nothing_within_a_step(adopted):
    (gate,) = [each for each in KERNELS if each.name == "gate"]
    wide = torch.randn(300, 64, dtype=torch.float64)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with fused(300, exact=False):
        found = gate(wide, wide.clone(), "silu")
    torch.testing.assert_close(found, gate.plain(wide, wide, "silu"))
    assert not counters["stats"]
    with pytest.raises(RuntimeError), torch.compiler.set_stance("fail_on_recompile"):
        gate._fused(wide, wide.clone(), "silu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-windows"])
def test_a_step_with_compiled_kernels_is_the_step_as_written(adopted, name):
    found = []
    for wanted in (True, False):
        if not wanted:
            for each in KERNELS:
                each.adopt(None)
        model = freeze("tiny", FAMILIES[name].build().float())
        backend = TorchBackend([model], token_budget=10_000)
        backend.open_run("run", settings(), None)
        perturb(backend, "run")
        outcome = backend.forward_backward("run", 1, request_of(rows_of(3, [23, 9, 40])))
        found.append((torch.from_numpy(outcome.logprobs), backend._runs["run"].accumulator))
        backend.optim_step("run", StepRequest())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert not torch.equal(ours, theirs), "the compiled kernels were not used"


@pytest.mark.slow
def test_deterministic_runs_never_use_them(adopted):
    base = freeze("tiny", tiny_llama())
    before = train(opened(TorchBackend([base])), range(2))
    for each in KERNELS:
        each.adopt(None)
    assert train(opened(TorchBackend([base])), range(2)) == before


def test_small_and_exact_passes_run_as_written(plain):
    seen = []
    for each in KERNELS:
        each.adopt(lambda *_: seen.append(1))
    (gate,) = [each for each in KERNELS if each.name == "gate"]
    sample = gate.samples(CPU, torch.float32)[0]
    for tokens, exact in ((255, False), (4096, True)):
        with fused(tokens, exact=exact):
            assert gate(*sample) is not None
    assert not seen
    with fused(256, exact=False):
        assert gate(*sample) is None
    assert gate(*sample) is not None
    assert len(seen) == 1


def test_what_gains_nothing_is_not_adopted(plain, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiling, "_seconds", lambda *_: 1.0)
    assert compile_kernels("cpu", torch.float32) == []
    assert not any(each.is_fused for each in KERNELS)


@pytest.mark.slow
def test_without_a_compiler_nothing_is_compiled(plain, monkeypatch):
    # No result of an earlier compilation may stand in for the compiler.
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    with pytest.raises(CompileError, match=r"torch\.compile does not work here"):
        compile_if_asked(Compiling.FIRST, "cpu", torch.float64)
    assert not any(each.is_fused for each in KERNELS)


def test_on_a_gpu_the_log_says_why_and_the_worker_goes_on(plain, monkeypatch, caplog):
    def lacking(*_args, **_options):
        raise RuntimeError("no C++ compiler\nhere")

    monkeypatch.setattr(torch, "compile", lacking)
    with caplog.at_level(logging.WARNING, logger="workers"):
        compile_if_asked(Compiling.AUTO, "cuda:0", torch.float32)
    (said,) = [each.getMessage() for each in caplog.records]
    assert "does not work here: no C++ compiler; kernels stay as written" in said
    assert not any(each.is_fused for each in KERNELS)


def test_auto_is_off_on_a_cpu(plain, monkeypatch):
    monkeypatch.setattr(compiling, "compile_kernels", pytest.fail)
    compile_if_asked(Compiling.AUTO, "cpu", torch.float32)
    compile_if_asked(Compiling.OFF, "cuda:0", torch.float32)


def test_an_activation_is_known_by_its_bits():
    model = freeze("tiny", tiny_llama())
    layer = model.module.model.layers[0].mlp
    assert layer.forward.args[1] == "silu"
    gemma = freeze("tiny", FAMILIES["gemma"].build())
    assert gemma.module.model.layers[0].mlp.forward.args[1] == "gelu_tanh"
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True).unbind()
    for form in ("silu", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda g, u, f=form: _KnownGate.apply(g, u, f), (gate, up))
