"""Whether a call fits its loss, by the cards that workers have published."""

from __future__ import annotations

from collections.abc import Mapping

from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.wire.loss_messages import option_values, reduction_of
from tensafe.wire.loss_tensors import check_tensors
from tensafe.wire.losses import LossCard, no_such_loss
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, TensorError, decode
from tensafe_server.operations.vocabulary import check_vocabulary

Losses = Mapping[str, LossCard]
_DEFAULT = "cross_entropy"


def check_loss(
    operation: training.Forward | training.ForwardBackward,
    kind: str,
    offsets: Array,
    model: Model,
    losses: Losses,
    *,
    private: bool = False,
) -> bool:
    """Checks a call's loss, its options, its reference and its tensors.

    Args:
        kind: `forward` or `forward_backward`.
        offsets: int64 [B + 1] of the batch, checked.
        losses: those of the model. A model that was registered before losses had cards has none:
            its worker alone checks.
        private: the run is, and a batch in which nothing is scored counts as an empty one.

    Returns:
        Whether it compares with a reference.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION, INVALID_ARGUMENT, INVALID_BATCH, NOTHING_SCORED or
            TOKEN_OUT_OF_RANGE, naming the field.
    """
    loss = operation.loss
    if not losses:
        return False
    name = loss.name or _DEFAULT
    card = losses.get(name)
    if card is None:
        raise no_such_loss(name, losses, f"{kind}.loss.name")
    options = card.resolve_options(option_values(loss), f"{kind}.loss.options")
    reduction = card.resolve_reduction(reduction_of(loss.reduction), f"{kind}.loss.reduction")
    inputs = operation.batch.inline.loss_inputs
    batch = f"{kind}.batch.inline"
    names = [item.name for item in inputs]
    card.check_inputs(names, f"{batch}.loss_inputs")
    source = loss.reference.WhichOneof("source")
    compares = card.needs_reference(source, options, names, f"{kind}.loss.reference")
    tensors: dict[str, Array] = {}
    for index, item in enumerate(inputs):
        field = f"{batch}.loss_inputs[{index}]"
        if item.HasField("offsets"):
            raise TenSafeFault(
                "INVALID_BATCH",
                f"{item.name} has offsets of its own; leave them out: it has one row for each "
                "input token",
                field=field,
            )
        try:
            tensors[item.name] = decode(item.tensor)
        except TensorError as error:
            raise TenSafeFault("INVALID_BATCH", f"{item.name}: {error}", field=field) from error
    check_tensors(
        card,
        tensors,
        offsets,
        reduction,
        lambda name: f"{batch}.{name}",
        may_score_nothing=private,
    )
    check_vocabulary(tensors["target_tokens"], f"{batch}.target_tokens", model, offsets)
    return compares
