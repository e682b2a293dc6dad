"""Which model a reference means, and where its files lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.engine.hub import HubError, check_there
from workers.engine.smollm2 import prepare_smollm2


class ModelLoadError(Exception):
    """A model or device that was asked for and is not to be had."""


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
        name: under which it is registered.
        location: a local directory, or a hub id.
        references: other names that mean it.
        remedy: what to do if it does not load.
    """

    name: str
    location: str
    references: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class _Alias:
    reference: str
    prepare: Callable[[], Path]


_ALIASES = {"smollm2-135m": _Alias("HuggingFaceTB/SmolLM2-135M-Instruct", prepare_smollm2)}


def resolve(reference: str) -> ModelSource:
    """Reads `[NAME=]REF`: an alias, a local directory, or a hub id.

    An alias may convert its model into the cache first, once. A directory whose path holds a `=`
    means itself, not a name and a reference.

    Raises:
        ModelLoadError: neither of the three, or a model that the hub does not give.
    """
    given, separator, rest = reference.partition("=")
    if separator and Path(reference).expanduser().is_dir():
        separator = ""
    ref = rest if separator else reference
    for alias, known in _ALIASES.items():
        if ref in (alias, known.reference):
            try:
                directory = known.prepare()
            except (OSError, RuntimeError, ValueError) as error:
                raise ModelLoadError(f"cannot prepare model {alias}: {error}") from error
            name = given if separator else alias
            others = tuple(other for other in (known.reference, alias) if other != name)
            return ModelSource(
                name,
                str(directory),
                others,
                f"Remove {directory} to have it converted anew.",
            )
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path} holds no config.json; give a model's own directory")
        name = given if separator else path.resolve().name
        return ModelSource(name, str(path), (), "Check the directory's files.")
    if path.is_absolute() or ref.startswith((".", "~")):
        raise ModelLoadError(f"there is no directory {path}; check --model {reference}")
    remedy = (
        f"If this machine does not reach the hub, download {ref} elsewhere and give its directory: "
        f"--model {ref.rsplit('/', 1)[-1]}=/path/to/it"
    )
    try:
        check_there(ref)
    except HubError as error:
        raise ModelLoadError(f"cannot load model {ref}: {error}. {remedy}") from error
    return ModelSource(
        given if separator else ref,
        ref,
        (ref,) if separator and given != ref else (),
        remedy,
    )
