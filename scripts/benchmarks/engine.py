"""The engine against the loops that a user, or a peer, would write, on one model and one machine.

All take turns in one process on the same threads and element type; a figure is seconds of one
training step, forward to update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.engine_products import frozen_flops, frozen_products, product_inputs
from benchmarks.engine_rows import MIXED, Rows, make_rows
from workers.engine.engine import TorchBackend
from workers.operations import LoraSettings, RunSettings, StepRequest

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA, RATE = 16, 32.0, 1e-4
Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared: the loaded engine, and a maker of the same base model without it."""

    backend: TorchBackend
    model: str
    plain: Callable[[], Any]
    vocabulary: int
    dropout: float
    rounds: int
    clock: Callable[[], float]

    def run_settings(self, *, deterministic: bool = False) -> RunSettings:
        """A run like the plain loop's."""
        lora = LoraSettings(RANK, ALPHA, self.dropout, TARGETS)
        return RunSettings(self.model, lora=lora, seed=1, deterministic=deterministic)


def one_run(setting: Setting) -> dict[str, list[float]]:
    """One run against `transformers` + `peft` + AdamW, padded to the batch's longest row."""
    cells: dict[str, list[float]] = {}
    peft_step = plain_loop(setting.plain(), setting.dropout, 1)
    setting.backend.open_run("one", setting.run_settings(), None)
    setting.backend.open_run("exact", setting.run_settings(deterministic=True), None)
    for name, rows in one_rows(setting).items():
        steps = {
            f"one/{name}/engine": lambda rows=rows: in_turn(setting.backend, ["one"], [rows]),
            f"one/{name}/deterministic": lambda rows=rows: in_turn(
                setting.backend, ["exact"], [rows]
            ),
            f"one/{name}/plain": lambda rows=rows: peft_step([rows]),
            f"one/{name}/products": _products(setting, [rows]),
        }
        take_turns(steps, setting, cells)
    for run in ("one", "exact"):
        setting.backend.close_run(run)
    return cells


def many_runs(setting: Setting, tenants: int, lengths: list[int]) -> dict[str, list[float]]:
    """Several runs, a row each: in one pass, one after the other, and by swapping in `peft`; and as
    if all rows were one run's."""
    cells: dict[str, list[float]] = {}
    peft_step = plain_loop(setting.plain(), setting.dropout, tenants)
    names = [f"run-{index}" for index in range(tenants)]
    for name in (*names, "all"):
        setting.backend.open_run(name, setting.run_settings(), None)
    for length in lengths:
        rows = tenants_rows(setting, tenants, length)
        whole = make_rows([length] * tenants, 0.0, setting.vocabulary)
        cell = f"{tenants}x{length}"
        steps = {
            f"{cell}/together": lambda rows=rows: together(setting.backend, names, rows),
            f"{cell}/in_turn": lambda rows=rows: in_turn(setting.backend, names, rows),
            f"{cell}/swapping": lambda rows=rows: peft_step(rows),
            f"{cell}/products": _products(setting, rows),
            f"{cell}/products of one": _products(setting, rows[:1]),
            f"{cell}/one run's": lambda whole=whole: in_turn(setting.backend, ["all"], [whole]),
        }
        take_turns(steps, setting, cells)
    for name in (*names, "all"):
        setting.backend.close_run(name)
    return cells


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """How many times faster the engine is: medians of the rounds' quotients."""
    found = {}
    for name, seconds in cells.items():
        cell, _, who = name.rpartition("/")
        if who == "plain":
            found[f"{cell} engine/plain"] = quotient(seconds, cells[f"{cell}/engine"])
        elif who == "deterministic":
            found[f"{cell} time of a deterministic step"] = quotient(
                seconds, cells[f"{cell}/engine"]
            )
        elif who in ("in_turn", "swapping"):
            found[f"{cell} together/{who}"] = quotient(seconds, cells[f"{cell}/together"])
        elif who == "products":
            # As if the engine did nothing but these.
            slower = cells.get(f"{cell}/plain") or cells[f"{cell}/in_turn"]
            found[f"{cell} bound by frozen products alone"] = quotient(slower, seconds)
        elif who == "products of one":
            # Of an engine in which all else is free, in turn as well.
            tenants = int(cell.partition("x")[0])
            found[f"{cell} together/in_turn of frozen products alone"] = tenants * quotient(
                seconds, cells[f"{cell}/products"]
            )
        elif who == "one run's":
            found[f"{cell} bound if the other adapters cost nothing"] = quotient(
                cells[f"{cell}/in_turn"], seconds
            )
    return found


def quotient(slower: list[float], faster: list[float]) -> float:
    return median(one / other for one, other in zip(slower, faster, strict=True))


def utilisation(
    cells: dict[str, list[float]], work: dict[str, float], gigaflops: float
) -> dict[str, float]:
    """Useful work of the engine's steps over what the device's products would do meanwhile, and
    how much of a step those products take: the rest is what bounds it.

    Args:
        work: operations of a step, by cell.
        gigaflops: the device's rate.
    """
    found = {}
    for cell, flops in work.items():
        seconds = median(cells.get(f"{cell}/engine") or cells[f"{cell}/together"])
        found[f"{cell} model FLOP utilisation"] = flops / seconds / (gigaflops * 1e9)
        found[f"{cell} share of frozen products"] = median(cells[f"{cell}/products"]) / seconds
    return found


def one_work(setting: Setting) -> dict[str, float]:
    """Operations of a step of each cell of `one_run`."""
    return {f"one/{name}": _flops(setting, [rows]) for name, rows in one_rows(setting).items()}


def many_work(setting: Setting, tenants: int, lengths: list[int]) -> dict[str, float]:
    """The same of `many_runs`."""
    return {
        f"{tenants}x{length}": _flops(setting, tenants_rows(setting, tenants, length))
        for length in lengths
    }


@contextmanager
def open_runs(setting: Setting, count: int) -> Iterator[list[str]]:
    """Their names."""
    names = [f"run-{index}" for index in range(count)]
    for name in names:
        setting.backend.open_run(name, setting.run_settings(), None)
    yield names
    for name in names:
        setting.backend.close_run(name)


def one_rows(setting: Setting) -> dict[str, Rows]:
    return {
        "mixed": make_rows(MIXED, 0.6, setting.vocabulary),
        "equal": make_rows([128] * 8, 0.0, setting.vocabulary),
    }


def tenants_rows(setting: Setting, tenants: int, length: int) -> list[Rows]:
    return [make_rows([length], 0.0, setting.vocabulary, seed) for seed in range(tenants)]


def _products(setting: Setting, rows: list[Rows]) -> Step:
    model = setting.backend.base_model(setting.model)
    sizes = _sizes(rows)
    inputs = product_inputs(model, *sizes)
    return lambda: frozen_products(model, inputs, *sizes)


def _flops(setting: Setting, rows: list[Rows]) -> float:
    return frozen_flops(setting.backend.base_model(setting.model), *_sizes(rows))


def _sizes(rows: list[Rows]) -> tuple[int, int]:
    weights = [own.ours.batch.weights for own in rows]
    scored = sum(int((own != 0).sum()) for own in weights if own is not None)
    return sum(len(own.ours.batch.input_tokens) for own in rows), scored


def take_turns(steps: dict[str, Step], setting: Setting, cells: dict[str, list[float]]) -> None:
    for step in steps.values():
        for _ in range(warm_ups()):
            step()
    for turn in range(setting.rounds):
        for name, step in list(steps.items())[:: 1 if turn % 2 == 0 else -1]:
            begin = setting.clock()
            step()
            cells.setdefault(name, []).append(setting.clock() - begin)


def in_turn(backend: TorchBackend, names: list[str], rows: list[Rows]) -> None:
    for name, own in zip(names, rows, strict=True):
        backend.forward_backward(name, 1, own.ours)
        backend.optim_step(name, StepRequest())


def together(backend: TorchBackend, names: list[str], rows: list[Rows]) -> None:
    entries = [(name, 1, own.ours) for name, own in zip(names, rows, strict=True)]
    passed = backend.forward_backward_group(entries)
    applied = backend.optim_step_group([(name, StepRequest()) for name in names])
    for outcome in (*passed, *applied):
        if isinstance(outcome, Exception):
            raise outcome


def plain_loop(base: nn.Module, dropout: float, adapters: int) -> Callable[[list[Rows]], None]:
    """A step of each adapter in turn, on its own rows; with one adapter, the user's own loop."""
    names = [f"adapter{index}" for index in range(adapters)]
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS)
    )
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.train()
    optimizers = []
    for name in names:
        model.set_adapter(name)
        own = [p for key, p in model.named_parameters() if f".{name}." in key]
        optimizers.append(torch.optim.AdamW(own, lr=RATE, weight_decay=0.01))

    def run(rows: list[Rows]) -> None:
        for name, optimizer, own in zip(names, optimizers, rows, strict=True):
            if adapters > 1:
                model.set_adapter(name)
            batch = {key: value.to(model.device) for key, value in own.theirs.items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def warm_ups() -> int:
    """Steps before any is measured: a GPU captures passes that come again."""
    return 4 if torch.cuda.is_available() else 1


def wall_clock() -> float:
    """Seconds, with the device's queue emptied."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
