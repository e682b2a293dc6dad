"""Log-probabilities from hidden states: known answers, and torch's own gradient."""

from __future__ import annotations

import math

import pytest
import torch

from workers.engine import head
from workers.engine.head import target_logprobs


def test_known_answers():
    # An identity head: the hidden state is the logits.
    hidden = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [1000.0, 0.0, 0.0]])
    logprobs = target_logprobs(hidden, torch.eye(3), None, torch.tensor([1, 0, 1]))
    expected = [math.log(1 / 3), math.log(2 / 4), -1000.0]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_is_autograds_across_chunks(monkeypatch, bias):
    monkeypatch.setattr(head, "_CHUNK_LOGITS_CPU", 1)
    torch.manual_seed(0)
    hidden = torch.randn(150, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(30, 8)
    offset = torch.randn(30) if bias else None
    targets, weights = torch.randint(0, 30, (150,)), torch.randn(150)
    ours = target_logprobs(hidden, weight, offset, targets)
    (ours * weights).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    logits = torch.nn.functional.linear(hidden, weight, offset)
    theirs = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, hidden.grad, atol=1e-5, rtol=1e-5)


def test_bfloat16_head_has_a_float32_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    targets = torch.randint(0, 40, (9,))
    ours = target_logprobs(hidden, weight, None, targets)
    assert ours.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight).float()
    theirs = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs)


def test_no_targets_give_no_logprobs():
    empty = torch.zeros(0, 4)
    assert target_logprobs(empty, torch.eye(4), None, torch.zeros(0, dtype=torch.long)).shape == (
        0,
    )
