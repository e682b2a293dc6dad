"""A deterministic run has the same bits whoever shares the worker and whatever befalls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from parity import deterministic_run
from parity.deterministic_run import opened, options, train, train_call, weights
from parity.group_members import SGD, Member, entries
from parity.scarce_memory import capacity
from parity.tiny_models import GATED
from parity.tiny_runs import perturb, settings, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.engine.processor import processor
from workers.engine.program import PROGRAM
from workers.operations import Reduction, StepOutcome, StepRequest

BASE = freeze("tiny", tiny_llama())
CALLS = range(4)
NEIGHBOURS = [
    Member(1, {"rank": 6}, {}, Reduction.TOKEN_MEAN, (40, 3, 17), 0.9),
    Member(2, {"rank": 33, "target_modules": GATED, "dropout": 0.5}, SGD, Reduction.SUM, (64,), 1),
    Member(3, {"rank": 1}, {"grad_clip_norm": 0.1}, Reduction.TOKEN_MEAN, (5,), 1),
]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    return train(opened(TorchBackend([BASE], token_budget=4096)), CALLS)


def test_a_batch_of_it_takes_several_passes(alone):
    """Else the tests below would say nothing about how it is cut."""
    backend = opened(TorchBackend([BASE], token_budget=10**6))
    with capacity(BASE.body) as seen:
        train_call(backend, 0)
    assert len(seen.tokens) == 2
    # Every call differs, and so do the weights before and after each of the two updates.
    assert len(set(alone)) == len(CALLS) + 3


@pytest.mark.parametrize("token_budget", [1, 100, 10**6])
def test_at_any_budget(alone, token_budget):
    assert train(opened(TorchBackend([BASE], token_budget=token_budget)), CALLS) == alone


def test_with_others_in_between_and_beside_it_in_every_update(alone):
    backend = TorchBackend([BASE], token_budget=70)
    for index, member in enumerate(NEIGHBOURS):
        own = settings(seed=member.seed, lora=member.lora, optimizer=member.optimizer)
        backend.open_run(str(index), own, None)
        perturb(backend, str(index))
    opened(backend)
    found = []
    for call in CALLS:
        backend.forward_backward_group(entries(NEIGHBOURS, call=call))
        found.append(train_call(backend, call))
        names = ["0", "1", "run", "2"]
        outcomes = backend.optim_step_group([(name, StepRequest()) for name in names])
        assert all(isinstance(outcome, StepOutcome) for outcome in outcomes)
        found.append(weights(backend))
    assert found == alone


def test_it_never_computes_in_company(alone):
    backend = opened(TorchBackend([BASE]))
    backend.open_run("other", settings(), None)
    request = NEIGHBOURS[0].request()
    with pytest.raises(ValueError, match="deterministic"):
        backend.forward_backward_group([("run", 1, request), ("other", 1, request)])
    # Nothing was touched.
    assert train(backend, CALLS) == alone


def test_when_memory_is_so_scarce_that_activations_are_made_anew(alone):
    with capacity(BASE.body) as plenty:
        assert train(opened(TorchBackend([BASE], token_budget=4096)), CALLS) == alone
    backend = opened(TorchBackend([BASE], token_budget=4096))
    with capacity(BASE.body, 0.8 * plenty.most_bytes) as seen:
        assert train(backend, CALLS) == alone
    assert plenty.faults == 0
    assert seen.faults == 1, "it is known from then on"


def test_when_there_is_not_even_memory_for_that_it_says_so(alone):
    backend = opened(TorchBackend([BASE], token_budget=4096))
    with capacity(BASE.body, 1000), pytest.raises(TenSafeFault, match="deterministic") as caught:
        train_call(backend, 0)
    assert caught.value.detail.reason == "OUT_OF_MEMORY"
    assert train(opened(backend), CALLS) == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_after_a_restart_in_the_middle_of_a_window(threads, tmp_path):
    torch.set_num_threads(threads)
    try:
        whole = train(opened(TorchBackend([BASE], token_budget=4096)), CALLS)
        backend = opened(TorchBackend([BASE], token_budget=4096))
        assert train(backend, range(3)) == whole[:6]
    finally:
        torch.set_num_threads(1)
    backend.save_state("run", tmp_path, include_optimizer=True)
    root = Path(deterministic_run.__file__).parents[1]
    path = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, deterministic_run.__file__, str(threads), str(tmp_path), "3", "4"],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == whole[6:]


def test_its_kernels_add_in_one_order_and_others_need_not(monkeypatch):
    """On a GPU attention's backward pass would add as it comes: torch is asked not to."""
    seen = []

    def note(output: torch.Tensor) -> None:
        output.register_hook(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
        assert not torch.is_deterministic_algorithms_warn_only_enabled()

    hidden = BASE.hidden

    def watched(*args, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        output = hidden(*args, **options)
        note(output)
        return output

    monkeypatch.setattr(BASE, "hidden", watched, raising=False)
    for deterministic in (True, False):
        backend = opened(TorchBackend([BASE]), deterministic=deterministic)
        seen.clear()
        train_call(backend, 0)
        assert set(seen) == {deterministic}
        assert len(seen) >= 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_fingerprint_tells_what_bits_depend_on(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = TorchBackend([BASE]).fingerprint()
    expected = {
        "engine": PROGRAM,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu",
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "dtype": "float32",
    }
    assert expected.items() <= found.items()
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in found["told"].split()


def test_without_it_another_budget_changes_bits():
    """What the setting is for; if this fails, the tests above cannot."""
    found = [
        train(opened(TorchBackend([BASE], token_budget=budget), deterministic=False), range(2))
        for budget in (100, 10**6)
    ]
    assert found[0] != found[1]
    assert options().deterministic
