"""Cards of losses as messages, and what a call says of its loss."""

from __future__ import annotations

from tensafe.v1 import losses_pb2 as pb
from tensafe.v1 import types_pb2 as types
from tensafe.wire.losses import (
    Choice,
    Flag,
    LossCard,
    LossInput,
    LossMetric,
    LossOption,
    LossOutput,
    Number,
    Reduction,
    ReferenceRule,
)

_REDUCTIONS = {
    Reduction.TOKEN_MEAN: pb.LOSS_REDUCTION_TOKEN_MEAN,
    Reduction.SEQUENCE_MEAN: pb.LOSS_REDUCTION_SEQUENCE_MEAN,
    Reduction.SUM: pb.LOSS_REDUCTION_SUM,
}
_REDUCTION_NAMES = {number: name for name, number in _REDUCTIONS.items()}
_DTYPES = {"int32": types.DATA_TYPE_INT32, "float32": types.DATA_TYPE_FLOAT32}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}
_COMBINES = {
    "sum": types.REDUCTION_SUM,
    "mean": types.REDUCTION_MEAN,
    "min": types.REDUCTION_MIN,
    "max": types.REDUCTION_MAX,
}
_COMBINE_NAMES = {number: name for name, number in _COMBINES.items()}


def option_values(loss: pb.LossConfig) -> dict[str, object]:
    """A call's options as Python values; a list, an object or null stays a message."""
    values: dict[str, object] = {}
    if not loss.HasField("options"):
        return values
    for name, value in loss.options.fields.items():
        kind = value.WhichOneof("kind")
        plain = kind in ("number_value", "string_value", "bool_value")
        values[name] = getattr(value, kind) if plain else value
    return values


def reduction_of(number: int) -> Reduction | None:
    """None where it is unspecified."""
    return _REDUCTION_NAMES.get(number)


def reduction_number(name: Reduction) -> pb.LossReduction.ValueType:
    """The reverse of `reduction_of`."""
    return _REDUCTIONS[name]


def card_message(card: LossCard) -> pb.Loss:
    """Packs a card."""
    message = pb.Loss(
        name=card.name,
        description=card.description,
        source=card.source,
        inputs=[
            pb.LossInput(
                name=item.name,
                dtype=_DTYPES[item.dtype],
                required=item.required,
                wide=item.wide,
                description=item.description,
            )
            for item in card.inputs
        ],
        options=[_option_message(option) for option in card.options],
        reductions=[_REDUCTIONS[name] for name in card.reductions],
        metrics=[
            pb.LossMetric(
                name=item.name, reduction=_COMBINES[item.combine], description=item.description
            )
            for item in card.metrics
        ],
        outputs=[
            pb.LossOutput(name=item.name, per_datum=item.per_datum, description=item.description)
            for item in card.outputs
        ],
        datums_together=card.datums_together,
        divides_by_weights=card.divides_by_weights,
        plug_in=card.plug_in,
    )
    if card.reference is not None:
        message.reference.SetInParent()
        message.reference.with_option = card.reference.with_option
        message.reference.unless_input = card.reference.unless_input
        message.reference.may_be_none = card.reference.may_be_none
    return message


def _option_message(option: LossOption) -> pb.LossOption:
    message = pb.LossOption(
        name=option.name, description=option.description, required=option.required
    )
    if isinstance(option, Number):
        message.number.minimum, message.number.maximum = option.low, option.high
        if option.default is not None:
            message.number.default_value = option.default
    elif isinstance(option, Choice):
        message.choice.default_value = option.default
        message.choice.values.extend(option.values)
    else:
        message.flag.default_value = option.default
    return message


def card_of(message: pb.Loss) -> LossCard:
    """Unpacks a card."""
    reference = None
    if message.HasField("reference"):
        rule = message.reference
        reference = ReferenceRule(rule.with_option, rule.unless_input, rule.may_be_none)
    return LossCard(
        name=message.name,
        description=message.description,
        source=message.source,
        inputs=tuple(
            LossInput(i.name, i.description, _DTYPE_NAMES[i.dtype], i.required, i.wide)
            for i in message.inputs
        ),
        options=tuple(_option_of(option) for option in message.options),
        reductions=tuple(_REDUCTION_NAMES[number] for number in message.reductions),
        metrics=tuple(
            LossMetric(m.name, _COMBINE_NAMES[m.reduction], m.description) for m in message.metrics
        ),
        outputs=tuple(LossOutput(o.name, o.description, o.per_datum) for o in message.outputs),
        datums_together=message.datums_together,
        divides_by_weights=message.divides_by_weights,
        reference=reference,
        plug_in=message.plug_in,
    )


def _option_of(message: pb.LossOption) -> LossOption:
    name, description, required = message.name, message.description, message.required
    if message.HasField("number"):
        number = message.number
        default = number.default_value if number.HasField("default_value") else None
        return Number(name, description, default, number.minimum, number.maximum, required)
    if message.HasField("choice"):
        choice = message.choice
        return Choice(name, description, choice.default_value, tuple(choice.values), required)
    return Flag(name, description, message.flag.default_value, required)
