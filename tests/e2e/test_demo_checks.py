"""The demo fails for an adapter that is not the trained one, and not for rounded numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import numpy as np
import plain_peft
import pytest

from tensafe_client import Datum, ServiceClient
from workers.engine import model_sources

TEXTS = [np.random.default_rng(row).integers(3, 250, 24).tolist() for row in range(8)]
ROWS = [Datum(text[:-1], text[1:]) for text in TEXTS]


@pytest.fixture
def tenant(
    new_tenant: Callable[[], ServiceClient], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> demo.Tenant:
    """One who has trained on the small model, which stands for the demo's."""
    monkeypatch.setattr(demo, "MODEL", "tiny")
    source = model_sources.ModelSource("tiny", str(tiny_model), (), "")
    monkeypatch.setattr(model_sources, "resolve", lambda reference: source)
    client = new_tenant()
    run = client.create_training_client(
        {"model_ref": "tiny", "lora_config": {"rank": 4}, "seed": 1}
    )
    for _ in range(8):
        run.forward_backward(ROWS)
        run.optim_step(learning_rate=2e-2)
    return demo.Tenant("alice", 4, 1, client, run)


def take_away(tenant: demo.Tenant, directory: Path) -> None:
    demo.take_away(tenant, demo.Data(train=[], held_out=[ROWS], shown=[]), directory)


def rounded(compute: Callable[..., Any]) -> Callable[..., Any]:
    """As far off as bfloat16 is: 0.05 on average, and far more at one token of a hundred."""
    draw = np.random.default_rng(0)

    def off(*arguments: Any) -> Any:
        right = compute(*arguments)
        error = draw.normal(0, 0.06, right.shape)
        error[:1] += 0.3
        return right + error

    return off


def test_it_takes_the_adapter_that_was_trained(tenant: demo.Tenant, tmp_path: Path):
    take_away(tenant, tmp_path)


def test_it_takes_how_bfloat16_rounds(
    tenant: demo.Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for limits in (demo.LOGPROB_TOLERANCE, demo.GREEDY_TOLERANCE):
        monkeypatch.setitem(limits, "float32", limits["bfloat16"])
    peft = plain_peft.PlainPeft
    monkeypatch.setattr(peft, "logprobs", rounded(peft.logprobs))
    monkeypatch.setattr(
        peft,
        "behind_greedy",
        lambda self, prompt, completion: np.eye(1, len(completion))[0] * 0.25,
    )
    take_away(tenant, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_refuses_an_adapter_of_another_run(
    tenant: demo.Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    monkeypatch.setitem(demo.LOGPROB_TOLERANCE, "float32", demo.LOGPROB_TOLERANCE[dtype])
    other = tenant.client.create_training_client(tenant.run.config).save_state()
    download = tenant.client.download_artifact
    monkeypatch.setattr(
        tenant.client, "download_artifact", lambda _, place: download(other.artifact_id, place)
    )
    with pytest.raises(demo.DemoError, match="other numbers"):
        take_away(tenant, tmp_path)


def test_it_refuses_other_words_than_peft_would_choose(
    tenant: demo.Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample = tenant.run.sample
    monkeypatch.setattr(
        tenant.run, "sample", lambda prompts, **_: sample(prompts, max_tokens=8, seed=3)
    )
    with pytest.raises(demo.DemoError, match="continues differently"):
        take_away(tenant, tmp_path)
