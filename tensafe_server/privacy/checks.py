"""What a private run takes, and what only a private run takes.

Whatever a step sums must be a function of one unit at a time: a mean over a batch's tokens, or an
advantage whitened over a batch, lets one unit move what the others add.
"""

from __future__ import annotations

from tensafe.v1 import losses_pb2 as losses
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import decode
from tensafe_server.privacy.runs import PrivateRun, Units

_PER_EXAMPLE_LOSSES = frozenset({"cross_entropy"})
_PER_EXAMPLE_REDUCTIONS = frozenset(
    {
        losses.LOSS_REDUCTION_UNSPECIFIED,
        losses.LOSS_REDUCTION_SUM,
        losses.LOSS_REDUCTION_SEQUENCE_MEAN,
    }
)


def check_private(spec: training.OperationSpec, private: PrivateRun | None, run_id: str) -> None:
    """Checks an operation against what its run promises.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION or INVALID_BATCH.
    """
    kind = spec.WhichOneof("operation")
    if private is None:
        if kind == "private_step":
            raise _unsupported(
                "private_step",
                f"run {run_id} is not private; call forward_backward and optim_step",
            )
        if kind in ("forward", "forward_backward"):
            _refuse_units(spec, kind)
        return
    if kind == "forward":
        _refuse_units(spec, kind)
        if not private.raw_metrics:
            raise _unsupported(
                "forward",
                f"run {run_id} tells private metrics only, and a loss is none; to evaluate on data "
                "that is not private, save the run and load it into one without dp_config",
            )
    elif kind == "sample" and spec.sample.params.prompt_logprobs and not private.raw_metrics:
        raise _unsupported(
            "sample.params.prompt_logprobs",
            f"run {run_id} tells private metrics only, and a prompt's log-probabilities are its "
            "loss; leave prompt_logprobs out, or sample from an artifact of it",
        )
    elif kind == "forward_backward":
        if private.server_poisson:
            raise _drawn(kind, run_id)
        _check_gradient(spec.forward_backward, private, run_id)
    elif kind == "optim_step" and private.server_poisson:
        raise _drawn(kind, run_id)
    elif kind == "private_step" and not private.server_poisson:
        raise _unsupported(
            "private_step",
            f"the client chooses the batches of run {run_id}; call forward_backward and "
            "optim_step, or create a run with sampling server_poisson",
        )


def _check_gradient(operation: training.ForwardBackward, private: PrivateRun, run_id: str) -> None:
    loss = operation.loss.name or "cross_entropy"
    if loss not in _PER_EXAMPLE_LOSSES:
        raise _unsupported(
            "forward_backward.loss.name",
            f"private run {run_id} cannot use {loss!r}: what it takes beside an example's own "
            "tokens (advantages, old log-probabilities, pairs) may come from other examples; use "
            f"{', '.join(sorted(_PER_EXAMPLE_LOSSES))}, or a run without dp_config",
        )
    if operation.loss.reduction not in _PER_EXAMPLE_REDUCTIONS:
        raise _unsupported(
            "forward_backward.loss.reduction",
            "a mean over a batch's tokens lets one example move what the others add; leave it out "
            "for the sum of each example's own mean, or use `sum`",
        )
    batch = operation.batch.inline
    if private.units is not Units.UNIT_ID:
        if batch.unit_ids:
            raise _unsupported(
                "forward_backward.batch.inline.unit_ids",
                f"the privacy unit of run {run_id} is the example; leave unit_ids out, or "
                "create a run with privacy_unit unit_id",
            )
        return
    datums = len(decode(batch.offsets)) - 1
    if len(batch.unit_ids) != datums:
        raise TenSafeFault(
            "INVALID_BATCH",
            f"unit_ids has {len(batch.unit_ids)} entries, the batch has {datums} datums; run "
            f"{run_id} protects units, so say whose each datum is",
            field="forward_backward.batch.inline.unit_ids",
        )


def _refuse_units(spec: training.OperationSpec, kind: str) -> None:
    batch = spec.forward.batch if kind == "forward" else spec.forward_backward.batch
    if batch.inline.unit_ids:
        raise _unsupported(
            f"{kind}.batch.inline.unit_ids",
            "only a private run with privacy_unit unit_id takes unit_ids; leave them out",
        )


def _drawn(kind: str, run_id: str) -> TenSafeFault:
    return _unsupported(
        kind, f"the server draws the batches of run {run_id}; call train_private instead"
    )


def _unsupported(field: str, text: str) -> TenSafeFault:
    return TenSafeFault("UNSUPPORTED_OPTION", text, field=field)
