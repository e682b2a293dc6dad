"""Rewards by name, as configuration files and the command line call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from tensafe_client.errors import ConfigError


class RewardFunction(Protocol):
    """Judges a completion.

    Args of a call:
        prompt: the problem's prompt as the environment gave it.
        completion: the generated text, without special tokens.
        meta: the problem's `meta`.

    Returns:
        The reward, higher is better; or a mapping with it under `reward`, whose other numbers are
        reported as metrics.
    """

    def __call__(
        self, prompt: Any, completion: str, meta: Mapping[str, Any]
    ) -> float | Mapping[str, float]: ...


_Factory = TypeVar("_Factory", bound=Callable[..., RewardFunction])
_FACTORIES: dict[str, Callable[..., RewardFunction]] = {}


def register_reward(name: str) -> Callable[[_Factory], _Factory]:
    """Decorates a class or function that makes a reward from options.

    Raises:
        ConfigError: if the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        if name in _FACTORIES:
            raise ConfigError.of("name", f"{name!r} is a reward already; choose another")
        _FACTORIES[name] = factory
        return factory

    return register


def rewards() -> list[str]:
    """The names of all rewards."""
    return sorted(_FACTORIES)


def reward(name: str, **options: Any) -> RewardFunction:
    """Makes a reward by its name.

    Raises:
        ConfigError: for an unknown name or option.
    """
    if name not in _FACTORIES:
        raise ConfigError.of("reward", f"must be one of {', '.join(rewards())}, got {name!r}")
    try:
        return _FACTORIES[name](**options)
    except TypeError as error:
        raise ConfigError.of("reward", f"{name} does not take these options: {error}") from error
