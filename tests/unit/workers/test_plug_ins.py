"""An operator's own losses: found by name, checked, and computed as the built-in ones are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tensafe.wire.loss_messages import card_message, card_of
from workers.allocator import suited
from workers.cli import worker
from workers.losses import (
    Choice,
    LossDeclarationError,
    LossInput,
    LossLoadError,
    LossMetric,
    LossOutput,
    LossRegistry,
    LossTerms,
    Number,
    Reduction,
    Scored,
    load_losses,
    loss,
)
from workers.losses.registry import BUILT_IN

PLACE = "harness.plug_in_losses"


def test_one_is_found_by_module_and_function():
    registry = load_losses([f"my_huber={PLACE}:huber", f"longest={PLACE}:longest"])
    card = registry.find("my_huber").card
    assert card.name == "my_huber"
    assert card.plug_in
    assert card.description.startswith("Σ w·huber(logprob")
    assert [item.name for item in card.inputs] == ["target_tokens", "weights", "wanted", "kinds"]
    assert registry.find("longest").card.reductions == (Reduction.SEQUENCE_MEAN, Reduction.SUM)
    names = [card.name for card in registry.cards()]
    assert names == sorted([*(each.name for each in BUILT_IN), "my_huber", "longest"])
    assert card_of(card_message(card)) == card


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with entry points, as an installer leaves it."""
    info = tmp_path / "their_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[tensafe.losses]\nhuber = {PLACE}:huber\ngone = {PLACE}:nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_one_is_found_by_its_entry_point_and_only_if_it_is_named(installed):
    assert load_losses(["huber"]).find("huber").card.plug_in
    assert "huber" not in [card.name for card in load_losses([]).cards()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x=no.such.module:f", "cannot be imported: ModuleNotFoundError"),
        (f"x={PLACE}:nothing", "cannot be imported: AttributeError"),
        (f"x={PLACE}", "must be NAME=module:function"),
        (f"x={PLACE}:plain", "decorate the function"),
        (f"X-y={PLACE}:huber", "use lower_snake_case"),
        (f"ppo={PLACE}:huber", "two losses 'ppo'"),
        (f"x={PLACE}:contradicting", "combines the metric clip_fraction as max"),
        ("unknown", "no installed package has an entry point 'unknown'"),
        ("gone", "entry point harness.plug_in_losses:nothing cannot be imported"),
    ],
)
def test_one_that_cannot_be_had_says_why(installed, text, says):
    with pytest.raises(LossLoadError, match=says):
        load_losses([text])


def test_a_worker_does_not_start_without_its_losses():
    command = ["--connect", "127.0.0.1:1", "--threads", "1", "--model", "./no-such-model"]
    command += ["--loss", "x=no.such.module:f"]
    result = CliRunner().invoke(worker, command, env=suited({"TENSAFE_WORKER_KEY": "k"}))
    assert result.exit_code == 1
    assert "--loss x=no.such.module:f cannot be imported" in result.output
    result = CliRunner().invoke(
        worker,
        ["--connect", "127.0.0.1:1", "--backend", "mock", "--loss", "x=a:b"],
        env=suited({"TENSAFE_WORKER_KEY": "k"}),
    )
    assert result.exit_code == 2
    assert "leave out" in result.output


@pytest.mark.parametrize(
    ("declaration", "says"),
    [
        ({"options": [Number("a", "", 2.0, 0.0, 1.0)]}, "default of f's option a must be from 0"),
        ({"options": [Choice("a", "", "x", ("y", "z"))]}, "must be one of y, z"),
        ({"options": [Number("reference", "", 0.0, 0.0, 1.0)]}, "reference"),
        ({"inputs": [LossInput("weights", "")]}, "inputs weights twice"),
        ({"inputs": [LossInput("x", "", dtype="float64")]}, "neither int32 nor float32"),
        ({"metrics": [LossMetric("loss", "mean", "")]}, "has a metric loss already"),
        ({"metrics": [LossMetric("x", "last", "")]}, "combines as 'last'"),
        ({"outputs": [LossOutput("logprobs", "")]}, "output logprobs already"),
        ({"per": "sequence", "reductions": [Reduction.TOKEN_MEAN]}, "may have the reductions"),
        ({"reductions": []}, "at least one"),
        ({"datums_together": 0}, "datums_together"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(declaration, says):
    def f(scored: Scored) -> LossTerms:
        return LossTerms(-scored.logprobs)

    with pytest.raises(LossDeclarationError, match=says):
        loss(**declaration)(f)


def scored(count: int = 5, lengths: tuple[int, ...] = (2, 3)) -> Scored:
    logprobs = torch.linspace(-3, -1, count, dtype=torch.float64, requires_grad=True)
    inputs = {"wanted": torch.full((count,), -2.0, dtype=torch.float64)}
    return Scored(logprobs, torch.ones(count), lengths, inputs)


def test_a_known_answer():
    found = load_losses([f"huber={PLACE}:huber"]).find("huber")(scored(), delta=0.75, entropy=False)
    distance = np.abs(np.linspace(-3, -1, 5) + 2)
    expected = np.where(distance < 0.75, distance**2 / 2, 0.75 * (distance - 0.375))
    np.testing.assert_allclose(found.terms.detach(), expected, atol=1e-12)
    np.testing.assert_allclose(found.metrics["distance"], distance, atol=1e-12)


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda s: -s.logprobs, "gave a Tensor, not LossTerms"),
        (lambda s: LossTerms(-s.logprobs[1:]), r"terms \[4\] instead of \[5\]"),
        (lambda s: LossTerms(s.logprobs, {"x": s.logprobs}), "gave x, which its card"),
        (lambda s: LossTerms(s.logprobs, {}, {"y": s.logprobs}), "gave y, which its card"),
        (lambda s: LossTerms(s.logprobs, {}, {"z": s.logprobs}), r"the output z \[5\]"),
    ],
)
def test_what_a_loss_gives_is_held_to_its_card(gives, says):
    made = loss(outputs=[LossOutput("z", "", per_datum=True)])(gives)
    with pytest.raises(ValueError, match=says):
        made(scored())


def test_sums_and_spreads_are_each_datums_own():
    sums = scored().datum_sums(torch.arange(5.0))
    assert sums.tolist() == [1.0, 9.0]
    assert scored().spread(sums).tolist() == [1.0, 1.0, 9.0, 9.0, 9.0]


def test_the_cards_need_no_torch():
    """The mock worker, and whoever else only wants to know what there is."""
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from workers.losses import LossRegistry\n"
        "print(len(LossRegistry().cards()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == len(LossRegistry().cards())
