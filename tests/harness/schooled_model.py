"""A tiny model trained from scratch to know a task, but badly: what RL is to make better.

It answers each question in the form that it learned, and rightly about as often as its lessons did.
"""

from __future__ import annotations

import random
from pathlib import Path

from harness.tiny_model import save_tiny_model
from tensafe_client.rlvr import ChainSum

RIGHT_SHARE = 0.2
_STEPS = 240
_LESSONS_THAT_ARE_RIGHT = 0.6
_BATCH = 64


def save_schooled_model(directory: Path, task: ChainSum, *, seed: int = 0) -> Path:
    """Writes model and tokenizer.

    Args:
        task: whose questions it learns: first with right answers, then with answers of which
            only `RIGHT_SHARE` are right.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Several threads on busy cores spin: a minute's work would take five.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    save_tiny_model(directory, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    draw = random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    answers = sorted({task[index]["answer"] for index in range(len(task))})
    for step in range(_STEPS):
        share = 1.0 if step < _LESSONS_THAT_ARE_RIGHT * _STEPS else RIGHT_SHARE
        rows, learned = [], []
        for _ in range(_BATCH):
            entry = task[draw.randrange(len(task))]
            right = draw.random() < share
            answer = entry["answer"] if right else draw.choice(answers)
            prompt = tokenizer(entry["question"])["input_ids"]
            after = tokenizer(f" {answer}")["input_ids"] + [tokenizer.eos_token_id]
            rows.append(prompt + after)
            learned.append([-100] * len(prompt) + after)
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in learned])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    torch.set_num_threads(threads)
    return directory
