"""Which losses there are: the built-in ones, and those that an operator plugs in by name.

A plug-in is named where the worker is started, `--loss NAME=module:function`, or `--loss NAME` for
an entry point of that name in the group `tensafe.losses`. Nothing is loaded that is not named.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from tensafe.wire.losses import LossCard, no_such_loss
from workers.losses.cispo import cispo
from workers.losses.cross_entropy import cross_entropy
from workers.losses.declaration import Loss
from workers.losses.dpo import dpo
from workers.losses.dro import dro
from workers.losses.gspo import gspo
from workers.losses.importance_sampling import importance_sampling
from workers.losses.kl import kl
from workers.losses.linear import linear
from workers.losses.ppo import ppo

ENTRY_POINTS = "tensafe.losses"
BUILT_IN = (cross_entropy, importance_sampling, ppo, cispo, dro, gspo, dpo, kl, linear)


class LossLoadError(Exception):
    """A plug-in that cannot be had: what is wrong with it, and what to do."""


class LossRegistry:
    """Losses by name; no two have the same."""

    def __init__(self, losses: Iterable[Loss] = BUILT_IN) -> None:
        self._losses = {item.name: item for item in losses}

    def find(self, name: str, field: str = "loss.name") -> Loss:
        """The loss of a name.

        Raises:
            TenSafeFault: UNSUPPORTED_OPTION.
        """
        found = self._losses.get(name)
        if found is None:
            raise no_such_loss(name, self._losses, field)
        return found

    def cards(self) -> list[LossCard]:
        """All of them, by name."""
        return [self._losses[name].card for name in sorted(self._losses)]


def load_losses(plug_ins: Sequence[str]) -> LossRegistry:
    """The built-in losses and these plug-ins.

    Args:
        plug_ins: each `NAME=module:function`, or the `NAME` of an entry point.

    Raises:
        LossLoadError: one cannot be had, has a name that is taken, or contradicts another.
    """
    losses = list(BUILT_IN)
    for text in plug_ins:
        found = _plug_in(text)
        if any(found.name == other.name for other in losses):
            raise LossLoadError(f"there are two losses {found.name!r}; give the plug-in another")
        losses.append(found)
    _check_metrics(losses)
    return LossRegistry(losses)


def _plug_in(text: str) -> Loss:
    name, _, target = text.partition("=")
    if not name.isidentifier() or not name.islower():
        raise LossLoadError(f"--loss {text}: {name!r} is no name; use lower_snake_case")
    value = _import(text, target) if target else _entry_point(text)
    if not isinstance(value, Loss):
        raise LossLoadError(
            f"--loss {text}: it is a {type(value).__name__}, not a loss; decorate the function "
            "with workers.losses.loss(…), which says what it takes"
        )
    return value.named(name)


def _import(text: str, target: str) -> object:
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise LossLoadError(f"--loss {text}: it must be NAME=module:function")
    try:
        value: object = importlib.import_module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise LossLoadError(
            f"--loss {text} cannot be imported: {type(error).__name__}: {error}; the module must "
            "be installed, or on PYTHONPATH, where the worker runs"
        ) from error
    return value


def _entry_point(name: str) -> object:
    found = entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        there = ", ".join(sorted(entry_points(group=ENTRY_POINTS).names)) or "none"
        raise LossLoadError(
            f"--loss {name}: no installed package has an entry point {name!r} in the group "
            f"{ENTRY_POINTS}; there is {there}; or name it as NAME=module:function"
        )
    if len(found) > 1:
        raise LossLoadError(
            f"--loss {name}: several packages have this entry point; name one as "
            "NAME=module:function"
        )
    (point,) = found
    try:
        return point.load()
    except Exception as error:
        raise LossLoadError(
            f"--loss {name}: its entry point {point.value} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_metrics(losses: Sequence[Loss]) -> None:
    """A window may have calls of several losses: a metric's name means one way to combine."""
    combines: dict[str, tuple[str, str]] = {}
    for item in losses:
        for metric in item.card.metrics:
            combine, owner = combines.setdefault(metric.name, (metric.combine, item.name))
            if combine != metric.combine:
                raise LossLoadError(
                    f"{item.name} combines the metric {metric.name} as {metric.combine}, and "
                    f"{owner} as {combine}; rename it"
                )
