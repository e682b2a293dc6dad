"""A loss: a small function of scored positions, and the card that says what it takes and gives.

from workers.losses import LossInput, LossMetric, LossTerms, Number, Scored, loss

@loss(
    source="Huber 1964",
    inputs=[LossInput("wanted", "the log-probability to reach")],
    options=[Number("delta", "where it becomes linear", 1.0, low=1e-6, high=1e6)],
    metrics=[LossMetric("distance", "mean", "|logprob − wanted|")],
)
def huber(scored: Scored, delta: float) -> LossTerms:
    '''Σ huber(logprob − wanted).'''
    distance = (scored.logprobs - scored.inputs["wanted"]).abs()
    near = distance.clamp(max=delta)
    return LossTerms(near * (distance - near / 2), {"distance": distance.detach()})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tensafe.wire.losses import (
    TARGET_TOKENS,
    WEIGHTS,
    LossCard,
    LossInput,
    LossMetric,
    LossOption,
    LossOutput,
    Reduction,
    ReferenceRule,
    Value,
)
from workers.losses.scored import LossTerms, Scored, Statistic

COMMON_METRICS = frozenset(
    {
        *("loss", "grad_norm", "learning_rate", "tokens", "scored_tokens"),
        *("tokens_per_second", "compute_ms", "queue_ms"),
    }
)
"""Names that every call or update has already."""
_COMBINES = ("sum", "mean", "min", "max")

LossFunction = Callable[..., LossTerms]
Needs = Callable[[Mapping[str, Any], bool], Collection[Statistic]]


class LossDeclarationError(ValueError):
    """A loss whose card contradicts itself."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that can be computed.

    Attributes:
        card: what it takes and gives.
        function: `(scored, **options)` → terms.
        per: whether it has a term for each token, or for each sequence (or group of them).
        needs: (options, whether there is a reference) → the statistics that it reads.
    """

    card: LossCard
    function: LossFunction
    per: Literal["token", "sequence"] = "token"
    needs: Needs = lambda options, reference: ()

    @property
    def name(self) -> str:
        return self.card.name

    def statistics(self, options: Mapping[str, Value], reference: bool) -> frozenset[Statistic]:
        """What it reads of each position, with these options."""
        return frozenset(self.needs(options, reference))

    def __call__(self, scored: Scored, **options: Any) -> LossTerms:
        """The terms of scored positions.

        Raises:
            ValueError: they are not what the card promises.
        """
        found = self.function(scored, **options)
        self._check(scored, found)
        return found

    def named(self, name: str) -> Loss:
        """The same as an operator's plug-in under this name."""
        return replace(self, card=replace(self.card, name=name, plug_in=True))

    def _check(self, scored: Scored, found: LossTerms) -> None:
        card = self.card
        if not isinstance(found, LossTerms):
            raise ValueError(f"{card.name} gave a {type(found).__name__}, not LossTerms")
        for what, values in {"terms": found.terms, **found.metrics, **found.outputs}.items():
            _check_real(f"{card.name} gave {what}", values)
        positions = tuple(scored.logprobs.shape)
        datums = (len(scored.lengths),)
        units = (len(scored.lengths) // card.datums_together,)
        expected = positions if self.per == "token" else units
        if tuple(found.terms.shape) != expected:
            raise ValueError(
                f"{card.name} gave terms {list(found.terms.shape)} instead of {list(expected)}"
            )
        unknown = set(found.metrics) - {metric.name for metric in card.metrics}
        unknown |= set(found.outputs) - {output.name for output in card.outputs}
        if unknown:
            raise ValueError(f"{card.name} gave {min(unknown)}, which its card does not declare")
        for output in card.outputs:
            if output.name in found.outputs:
                shape = tuple(found.outputs[output.name].shape)
                allowed = [datums] if output.per_datum else [positions, positions[:1]]
                if shape not in allowed:
                    raise ValueError(f"{card.name} gave the output {output.name} {list(shape)}")


def loss(
    *,
    source: str = "",
    inputs: Sequence[LossInput] = (),
    options: Sequence[LossOption] = (),
    metrics: Sequence[LossMetric] = (),
    outputs: Sequence[LossOutput] = (),
    reductions: Sequence[Reduction] | None = None,
    per: Literal["token", "sequence"] = "token",
    datums_together: int = 1,
    wide: bool = False,
    divides_by_weights: bool = False,
    reference: ReferenceRule | None = None,
    needs: Needs = lambda options, reference: (),
) -> Callable[[LossFunction], Loss]:
    """Makes a function into a loss; its name and the first paragraph of its docstring go with it.

    Args:
        source: paper and equation.
        inputs: beside `target_tokens` and `weights`, which every loss has.
        options: keyword arguments of the function.
        reductions: the default first. None: all that `per` allows.
        per: whether it gives a term for each token, or for each sequence (or group of them).
        datums_together: datums after one another that belong together; never split.
        wide: whether there may be K targets and weights for each position.
        divides_by_weights: whether its token mean divides by Σ weights.
        reference: when it compares with a reference.
        needs: (options, whether there is a reference) → statistics to compute for it.

    Raises:
        LossDeclarationError: the declaration contradicts itself.
    """
    allowed = [item for item in Reduction if per == "token" or item is not Reduction.TOKEN_MEAN]

    def make(function: LossFunction) -> Loss:
        paragraph = (inspect.getdoc(function) or "").split("\n\n")[0]
        card = LossCard(
            name=function.__name__,
            description=" ".join(paragraph.split()),
            source=source,
            inputs=(
                replace(TARGET_TOKENS, wide=wide),
                replace(WEIGHTS, wide=wide),
                *inputs,
            ),
            options=tuple(options),
            reductions=tuple(allowed if reductions is None else reductions),
            metrics=tuple(metrics),
            outputs=tuple(outputs),
            datums_together=datums_together,
            divides_by_weights=divides_by_weights,
            reference=reference,
        )
        _check_card(card, allowed)
        return Loss(card, function, per, needs)

    return make


def _check_real(what: str, values: object) -> None:
    from torch import Tensor

    if not isinstance(values, Tensor):
        raise ValueError(f"{what} as a {type(values).__name__}, not a tensor")
    if values.is_complex():
        raise ValueError(f"{what} as complex numbers")


def _check_card(card: LossCard, allowed: Sequence[Reduction]) -> None:
    for what, names in (
        ("inputs", [item.name for item in card.inputs]),
        ("options", [option.name for option in card.options]),
        ("metrics", [metric.name for metric in card.metrics]),
        ("outputs", [output.name for output in card.outputs]),
    ):
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise LossDeclarationError(f"{card.name} declares {what} {min(twice)} twice")
    if any(option.name == "reference" for option in card.options):
        raise LossDeclarationError(
            "no option can be called reference: every call has a field for it"
        )
    if not 1 <= card.datums_together <= 1024:
        raise LossDeclarationError(f"datums_together is {card.datums_together}; use 1 to 1024")
    for option in card.options:
        problem = None if option.default is None else option.check(option.default)
        if problem:
            raise LossDeclarationError(f"default of {card.name}'s option {option.name} {problem}")
    for metric in card.metrics:
        if metric.combine not in _COMBINES:
            raise LossDeclarationError(
                f"metric {metric.name} of {card.name} combines as {metric.combine!r}; use "
                f"{', '.join(_COMBINES)}"
            )
        if metric.name in COMMON_METRICS:
            raise LossDeclarationError(f"every call has a metric {metric.name} already")
    if any(output.name == "logprobs" for output in card.outputs):
        raise LossDeclarationError("every call has the output logprobs already")
    if not card.reductions or not set(card.reductions) <= set(allowed):
        raise LossDeclarationError(
            f"{card.name} may have the reductions {', '.join(allowed)}, at least one"
        )
    if any(item.dtype not in ("int32", "float32") for item in card.inputs):
        raise LossDeclarationError(f"an input of {card.name} is neither int32 nor float32")
