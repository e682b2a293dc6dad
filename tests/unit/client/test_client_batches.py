"""Hugging Face batches and datums against a reference that shifts row by row."""

from __future__ import annotations

from collections import UserDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe.wire.tensors import decode
from tensafe_client import BatchError, Datum
from tensafe_client.data import encode_batch
from tensafe_client.data.batches import encode_private_batch

Row = tuple[list[int], list[int]]


@st.composite
def padded(draw: st.DrawFn) -> tuple[dict[str, list[list[int]]], list[Row]]:
    """A padded batch, and its rows without padding; at least one label is scored."""
    width = draw(st.integers(2, 7))
    left = draw(st.booleans())
    rows: list[Row] = []
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, width))
        ids = draw(st.lists(st.integers(0, 50), min_size=length, max_size=length))
        learn = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        labels = [token if yes else -100 for token, yes in zip(ids, learn, strict=True)]
        rows.append((ids, labels))
        fill = width - length
        for name, values, filler in (
            ("input_ids", ids, 3),
            ("labels", labels, -100),
            ("attention_mask", [1] * length, 0),
        ):
            pad = [filler] * fill
            batch[name].append(pad + values if left else values + pad)
    ids, labels = rows[0]
    if all(label == -100 for _, marks in rows for label in marks[1:]):
        rows[0] = (ids, [*labels[:-1], ids[-1]])
        place = -1 if left else len(ids) - 1
        batch["labels"][0][place] = ids[-1]
    return batch, rows


def unpack(batch: Any) -> list[tuple[list[int], list[int], list[float]]]:
    message, offsets = encode_batch(batch)
    assert decode(message.offsets).tolist() == offsets.tolist()
    tensors = {item.name: decode(item.tensor) for item in message.loss_inputs}
    assert tensors["target_tokens"].dtype == np.int32
    assert tensors["weights"].dtype == np.float32
    inputs = decode(message.input_tokens)
    assert inputs.dtype == np.int32
    assert offsets[-1] == len(inputs)
    return [
        (
            inputs[a:b].tolist(),
            tensors["target_tokens"][a:b].tolist(),
            tensors["weights"][a:b].tolist(),
        )
        for a, b in pairwise(offsets)
    ]


def reference(ids: list[int], labels: list[int]) -> tuple[list[int], list[int], list[float]]:
    """As `transformers` shifts: logits[t] against labels[t + 1], −100 ignored."""
    targets, weights = [], []
    for token, label in zip(ids[1:], labels[1:], strict=True):
        targets.append(token if label == -100 else label)
        weights.append(0.0 if label == -100 else 1.0)
    return ids[:-1], targets, weights


@given(padded())
def test_padded_batches_match_the_reference(
    case: tuple[dict[str, list[list[int]]], list[Row]],
) -> None:
    batch, rows = case
    expected = [reference(ids, labels) for ids, labels in rows]
    assert unpack(batch) == expected
    arrays = {name: np.array(values, np.int32) for name, values in batch.items()}
    assert unpack(UserDict(arrays)) == expected
    datums = [Datum.from_labels(ids, labels) for ids, labels in rows]
    assert unpack(datums) == expected


def test_torch_tensors_of_other_types_are_taken() -> None:
    torch = pytest.importorskip("torch")
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0]]),
        "labels": [torch.tensor([5, -100, 7, -100])],
        "attention_mask": torch.tensor([[True, True, True, False]]),
    }
    assert unpack(batch) == [([5, 6], [6, 7], [0.0, 1.0])]


def test_weights_and_loss_inputs_may_be_as_a_bfloat16_model_gives_them() -> None:
    torch = pytest.importorskip("torch")
    numbers = torch.tensor([0.5, -1.25], dtype=torch.bfloat16, requires_grad=True)
    datum = Datum([1, 2], [2, 3], numbers, logprobs=numbers)
    assert datum.weights.tolist() == datum.inputs["logprobs"].tolist() == [0.5, -1.25]
    assert datum.weights.dtype == datum.inputs["logprobs"].dtype == np.float32


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_that_is_no_array_is_refused(kind: str) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.ones(2, 3, dtype=torch.int64)
    bad = ids.to_sparse() if kind == "sparse" else ids.to("meta")
    with pytest.raises(BatchError, match="weights is not an array of numbers"):
        Datum([1, 2], [2, 3], bad[0] if kind == "meta" else bad)
    with pytest.raises(BatchError, match="input_ids is not an array of numbers"):
        encode_batch({"input_ids": bad, "labels": ids})


def test_loss_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    logits = torch.randn(3, 6, 11, generator=generator)
    theirs = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    total = weight = 0.0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    for row, (inputs, targets, weights) in enumerate(unpack(batch)):
        logprobs = logits[row, : len(inputs)].log_softmax(-1)
        for place, (target, scored) in enumerate(zip(targets, weights, strict=True)):
            total -= scored * logprobs[place, target].item()
            weight += scored
    assert total / weight == pytest.approx(theirs.item(), rel=1e-5)


OK = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"input_ids": OK}, ["labels"]),
        ({"labels": OK}, ["input_ids"]),
        ({"input_ids": [], "labels": []}, ["input_ids"]),
        ({"input_ids": [[1, 2], [1, 2, 3]], "labels": OK}, ["row 1", "input_ids"]),
        ({"input_ids": OK, "labels": [[1, 2, 3], [4, 5]]}, ["row 1", "labels"]),
        ({"input_ids": OK, "labels": [[1, 2, 3]]}, ["labels", "[1, 3]"]),
        ({"input_ids": OK, "labels": [[-100] * 3] * 2}, ["-100"]),
        ({"input_ids": OK, "labels": [[1, -100, -100], [4, -100, -100]]}, ["-100"]),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, ["input_ids"]),
        ({"input_ids": [[1], [2]], "labels": [[1], [2]]}, ["two"]),
        ({"input_ids": [[1.5, 2.0]], "labels": [[1, 2]]}, ["input_ids", "integers"]),
        ({"input_ids": [[1, -2]], "labels": [[1, 2]]}, ["input_ids[0, 1]", "-2"]),
        ({"input_ids": [[1, 2**40]], "labels": [[1, 2]]}, ["input_ids[0, 1]"]),
        ({"input_ids": [[1, 2]], "labels": [[1, -7]]}, ["labels[0, 1]", "-7"]),
        ({"input_ids": OK, "labels": [[-100] * 3, [-100, 5, -7]]}, ["labels[1, 2]", "-7"]),
        ({"input_ids": OK, "labels": OK, "attention_mask": [[1, 0, 1], [1, 1, 1]]}, ["row 0"]),
        ({"input_ids": OK, "labels": OK, "attention_mask": [[1, 1, 1], [0, 0, 1]]}, ["row 1"]),
        ({"input_ids": OK, "labels": OK, "attention_mask": [[1, 1, 2], [1, 1, 1]]}, ["0 and 1"]),
        ({"input_ids": OK, "labels": OK, "attention_mask": [[1, 1, 1]]}, ["attention_mask"]),
        ({"input_ids": OK, "labels": OK, "position_ids": OK}, ["position_ids"]),
        ([], ["empty"]),
        ([{"input_ids": [1, 2]}], ["batch[0]"]),
        ("text", ["str"]),
        (3, ["int"]),
    ],
)
def test_bad_batches_name_row_and_field(batch: Any, named: list[str]) -> None:
    with pytest.raises(BatchError) as caught:
        encode_batch(batch)
    assert all(name in str(caught.value) for name in named), str(caught.value)


@pytest.mark.parametrize("labels", [[[-100] * 3] * 2, [[1, -100, -100], [4, -100, -100]]])
def test_of_a_private_run_a_batch_may_score_nothing(labels: list[list[int]]) -> None:
    message, offsets = encode_private_batch({"input_ids": OK, "labels": labels})
    weights = {item.name: decode(item.tensor) for item in message.loss_inputs}["weights"]
    assert offsets.tolist() == [0, 2, 4]
    assert weights.tolist() == [0.0] * 4


def test_columns_without_effect_are_passed_over() -> None:
    batch = {"input_ids": OK, "labels": OK, "token_type_ids": [[0] * 3] * 2}
    assert len(unpack(batch)) == 2


@pytest.mark.parametrize(
    "arguments",
    [([], []), ([1, 2], [1]), ([1], [-1]), ([1], [1], [1, 2]), ([1.5], [1]), ([[1]], [[1]])],
)
def test_bad_datums(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(BatchError):
        Datum(*arguments)


def test_weights_of_a_wrong_type_are_told_so() -> None:
    with pytest.raises(BatchError, match="weights must be numbers, got object"):
        Datum([1, 2], [2, 3], [None, 1.0])


def test_datum_weights_may_be_negative_or_missing() -> None:
    assert Datum([1], [2], [-0.5]).weights.tolist() == [-0.5]
    assert Datum([1, 2], [2, 3]).weights.tolist() == [1.0, 1.0]
    assert repr(Datum([1, 2], [2, 3], [0, 1])) == "<Datum 2 tokens, 1 scored>"
