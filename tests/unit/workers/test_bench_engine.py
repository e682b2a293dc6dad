"""The engine's benchmark, a GPU's table too: it runs, and what it prints is what was measured."""

from __future__ import annotations

import json

import bench_engine
import pytest
import torch
from benchmarks import (
    engine,
    engine_memory,
    engine_products,
    engine_threads,
    random_models,
)
from benchmarks.models import SMOLLM2, Choice
from peft.tuners.lora import LoraLayer

from workers.engine import dividing, strands
from workers.operations import LossOutcome, StepOutcome


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_gpus_table_on_a_cpu_with_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "MANY", {"large": [(2, [6]), (4, [9])]})
    monkeypatch.setattr(engine_memory, "_MOST_ROUNDS", 1)
    path = tmp_path / "record.json"
    options = ["--model", "random-tiny", "--rounds", "2", "--dtype", "float32", "--json", str(path)]
    bench_engine.main(options)
    record = json.loads(path.read_text())
    raw, ratios = record["raw"], record["ratios"]
    for cell in ("2x6", "4x9"):
        assert {len(raw[f"{cell}/{side}"]) for side in ("together", "in_turn", "swapping")} == {2}
        assert 0 < ratios[f"{cell} model FLOP utilisation"] < 2
    engine_s, plain_s = (raw[f"one/mixed/{side}"] for side in ("engine", "plain"))
    quotients = [plain / ours for plain, ours in zip(plain_s, engine_s, strict=True)]
    assert ratios["one/mixed engine/plain"] == pytest.approx(sum(quotients) / 2)
    assert ratios["one/equal time of a deterministic step"] > 0
    assert {"one/mixed peak engine/plain", "one/equal share of frozen products"} <= ratios.keys()
    assert {"segments/8x16 mixed bmm/loop", "segments/32x64 equal grouped_mm/loop"} <= ratios.keys()
    assert "4x9 bound if the other adapters cost nothing" in ratios
    assert len(raw["4x9/one run's"]) == len(raw["4x9/products of one"]) == 2
    assert len(raw["memory/equal peak/suited plain"]) == 1
    assert "random-tiny on cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_where_the_time_goes(tmp_path):
    path = tmp_path / "record.json"
    options = ["--model", "random-tiny", "--part", "profile", "--rounds", "1", "--json", str(path)]
    bench_engine.main(options)
    ratios = json.loads(path.read_text())["ratios"]
    for cell in ("mixed", "equal", "8x16"):
        assert 0.2 < ratios.pop(f"profile/{cell} operations/step") < 2
        shares = {name: share for name, share in ratios.items() if f"/{cell}/" in name}
        assert sum(shares.values()) == pytest.approx(1)
        for room in ("lora.py/products", "products.py/products", "norms.py/the rest"):
            assert shares[f"profile/{cell}/{room}"] > 0


@pytest.mark.slow
def test_each_way_to_use_threads_is_the_way_that_it_is_called(tmp_path, monkeypatch):
    seen: dict[str, set[tuple[int, int, int]]] = {}

    def look(steps, _setting, _found) -> None:
        for name in steps:
            way = engine_threads._WAYS[name.rpartition("/")[2]]
            with way(), dividing.dividing(2**16):
                inside = torch.get_num_threads()
                product = dividing.product(99, 999_999, torch.get_num_threads)
            with way():
                parts = strands._worthy(1024)
            seen.setdefault(name.rpartition("/")[2], set()).add((inside, product, parts))

    monkeypatch.setattr(engine_threads, "take_turns", look)
    bench_engine.main(["--model", "random-tiny", "--part", "threads", "--threads", "2"])
    assert seen == {
        "as it is": {(1, 2, 2)},
        "without strands": {(1, 2, 1)},
        "all threads for everything": {(2, 2, 1)},
        "one thread": {(1, 1, 1)},
    }


@pytest.mark.parametrize(
    "options", [["threads"], ["profile", "--threads", "2"]], ids=lambda options: options[0]
)
def test_parts_say_which_threads_they_are_for(options, capsys):
    with pytest.raises(SystemExit):
        bench_engine.main(["--model", "random-tiny", "--part", *options])
    assert "--threads" in capsys.readouterr().err


def test_the_model_for_gpus_has_about_a_billion_parameters():
    module = random_models.build("random-1b", "meta", torch.bfloat16)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(1.24e9, rel=0.01)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def setting(clock) -> engine.Setting:
    model = random_models.base_model("random-tiny", "cpu", torch.float32)
    return engine.Setting(
        backend=engine.TorchBackend([model]),
        model="random-tiny",
        plain=lambda: random_models.build("random-tiny", "cpu", torch.float32),
        vocabulary=512,
        dropout=0.0,
        rounds=3,
        clock=clock,
    )


def test_every_side_is_warmed_and_timed_in_turn():
    calls: list[str] = []
    ticks = iter(range(1000))
    steps = {name: lambda name=name: calls.append(name) for name in ("ours", "theirs")}

    def clock() -> float:
        calls.append("clock")
        return float(next(ticks))

    cells: dict[str, list[float]] = {}
    engine.take_turns(steps, setting(clock), cells)
    assert calls[:2] == ["ours", "theirs"]
    ours, theirs = ["clock", "ours", "clock"], ["clock", "theirs", "clock"]
    assert calls[2:] == [*ours, *theirs, *theirs, *ours, *ours, *theirs]
    assert cells == {"ours": [1.0] * 3, "theirs": [1.0] * 3}


def test_bounds_are_quotients_of_the_rounds():
    # In the second round the machine was half as fast.
    cells = {"4x9/together": [2.0, 4.0], "4x9/in_turn": [8.0, 16.0], "4x9/swapping": [6.0, 12.0]}
    cells |= {"4x9/products": [1.0, 2.0], "4x9/products of one": [0.5, 1.0]}
    cells |= {"4x9/one run's": [1.6, 3.2]}
    assert engine.ratios(cells) == {
        "4x9 together/in_turn": 4.0,
        "4x9 together/swapping": 3.0,
        "4x9 bound by frozen products alone": 8.0,
        "4x9 together/in_turn of frozen products alone": 2.0,
        "4x9 bound if the other adapters cost nothing": 5.0,
    }


def test_both_sides_train_on_the_same_rows_in_the_same_type():
    own = setting(engine.wall_clock)
    rows = engine.one_rows(own)["mixed"]
    lora = own.run_settings().lora
    assert (lora.rank, lora.alpha) == (engine.RANK, engine.ALPHA)
    assert set(lora.target_modules) == set(engine.TARGETS)
    own.backend.open_run("one", own.run_settings(), None)
    outcome = own.backend.forward_backward("one", 1, rows.ours)
    assert isinstance(outcome, LossOutcome)
    plain = own.plain()
    plain.load_state_dict(own.backend.base_model("random-tiny").module.state_dict(), strict=False)
    loss = plain(**rows.theirs).loss.item()
    (ours,) = [metric.value for metric in outcome.metrics if metric.name == "loss"]
    assert ours == pytest.approx(loss, abs=1e-5)
    scored = int((rows.theirs["labels"][:, 1:] != -100).sum())
    tokens = len(rows.ours.batch.input_tokens)
    assert tokens == int(rows.theirs["attention_mask"].sum()) - len(rows.theirs["labels"])
    model = own.backend.base_model("random-tiny")
    layers = sum(layer.weight.numel() for layer in model.layers.values())
    flops = engine_products.frozen_flops(model, tokens, scored)
    assert engine.one_work(own)["one/mixed"] == flops == 4 * (layers * tokens + 512 * 64 * scored)


@pytest.mark.parametrize("runs", [1, 2])
def test_the_plain_loop_is_a_users(runs):
    """What no gain may come from: a baseline that does more, or something else."""
    base = random_models.build("random-tiny", "cpu", torch.bfloat16)
    assert base.config._attn_implementation == "sdpa"
    step = engine.plain_loop(base, 0.25, runs)
    layers = [part for part in base.modules() if isinstance(part, LoraLayer)]
    assert len(layers) == 2 * len(engine.TARGETS)
    names = [f"adapter{index}" for index in range(runs)]
    for layer in layers:
        assert layer.r == dict.fromkeys(names, engine.RANK)
        assert layer.lora_alpha == dict.fromkeys(names, engine.ALPHA)
        assert {part.p for part in layer.lora_dropout.values()} == {0.25}
        assert layer.training
    adapters = {key: own for key, own in base.named_parameters() if ".lora_" in key}
    frozen = [own for key, own in base.named_parameters() if key not in adapters]
    assert {own.dtype for own in frozen} == {torch.bfloat16}
    rows = engine.tenants_rows(setting(engine.wall_clock), runs, 9)
    before = {key: own.detach().clone() for key, own in adapters.items()}
    step(rows)
    assert not any(own.requires_grad for own in frozen)
    for key, own in adapters.items():
        assert own.grad is None, key
        assert not torch.equal(own, before[key]), key


@pytest.mark.slow
def test_smollm2_is_the_same_on_both_sides():
    choice = Choice(SMOLLM2, dtype="bfloat16")
    plain, own = choice.plain(), choice.backend().base_model(SMOLLM2).module
    assert plain.config._attn_implementation == "sdpa"
    theirs = dict(own.named_parameters())
    for name, weights in plain.named_parameters():
        assert weights.dtype is torch.bfloat16
        assert torch.equal(weights, theirs[name])


def test_a_step_together_is_a_step_of_each():
    own = setting(engine.wall_clock)
    names = ["a", "b"]
    for name in names:
        own.backend.open_run(name, own.run_settings(), None)
    rows = engine.tenants_rows(own, 2, 9)
    engine.together(own.backend, names, rows)
    engine.in_turn(own.backend, names, rows)
    from workers.operations import StepRequest

    for name, batch in zip(names, rows, strict=True):
        own.backend.forward_backward(name, 1, batch.ours)
        outcome = own.backend.optim_step(name, StepRequest())
        assert isinstance(outcome, StepOutcome)
        assert outcome.step == 3
