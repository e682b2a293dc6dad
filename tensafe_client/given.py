"""What every configuration class has: it knows which of its fields were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Self

from tensafe_client.checks import check_fields
from tensafe_client.errors import ConfigError


class Given:
    """A configuration that remembers the names of the fields that the caller passed."""

    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        given = frozenset(names[: len(args)]) | kwargs.keys()
        object.__setattr__(self, "_given", given)
        return self

    def given(self, name: str) -> bool:
        """Tells whether the caller passed this field."""
        return name in self._given

    def given_fields(self) -> dict[str, Any]:
        """The fields that the caller passed."""
        return {name: getattr(self, name) for name in self._given}

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with other values; fields that were not given stay so.

        Raises:
            ConfigError: for an unknown field or a wrong type.
        """
        check_fields(type(self).__name__, changes, type(self))
        return type(self)(**{**self.given_fields(), **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Builds the config from a dict; nested configs may be dicts too.

        Raises:
            ConfigError: for an unknown field, naming the closest valid one, or a wrong type.
        """
        if not isinstance(values, Mapping):
            shown = path.rstrip(".") or cls.__name__
            raise ConfigError.of(shown, f"must be of type {cls.__name__} or a dict, got {values!r}")
        check_fields(cls.__name__, values, cls, path)
        for field_ in fields(cls):  # type: ignore[arg-type]
            required = field_.default is MISSING and field_.default_factory is MISSING
            if required and field_.name not in values:
                raise ConfigError.of(f"{path}{field_.name}", f"is required in a {cls.__name__}")
        return cls(**values)

    def _check(self, name: str, check: Any, **options: Any) -> None:
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, check(f"{type(self).__name__}.{name}", value, **options))

    def _nest(self, name: str, config: type[Given]) -> None:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            object.__setattr__(self, name, config.from_dict(value, f"{name}."))
        elif value is not None and not isinstance(value, config):
            raise ConfigError.of(
                name, f"must be of type {config.__name__} or a dict, got {value!r}"
            )


def present(message: Any, *names: str) -> dict[str, Any]:
    """The set scalars of a message, by name."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
