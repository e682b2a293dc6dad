"""Profiles: named pairs of target and API key in the user's configuration directory.

default_profile = "default"

[profiles.default]
target = "grpc://127.0.0.1:50051"
api_key = "ts_…"
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from tensafe_client.checks import check_bool, check_path, check_string
from tensafe_client.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Profile:
    """Where to connect, with which key, and for TLS whose signature to trust (a PEM file)."""

    target: str
    api_key: str | None = field(default=None, repr=False)
    ca: str | None = None


@dataclass(frozen=True)
class ProfileFile:
    """The file's content."""

    profiles: dict[str, Profile]
    default_profile: str = "default"


def config_path() -> Path:
    """The file: `TENSAFE_CONFIG`, else `tensafe/config.toml` in the user's configuration folder."""
    named = os.environ.get("TENSAFE_CONFIG")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "tensafe" / "config.toml"


def read_profiles(path: Path | None = None) -> ProfileFile:
    """Reads the file; one that does not exist has no profiles.

    Raises:
        ConfigError: if the file cannot be read, or is not what `save_profile` writes.
    """
    path = config_path() if path is None else check_path("path", path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ProfileFile({})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"the profiles' file {path} cannot be read: {error.strerror}",
            remedy="make it a file that you may read, or name another one in TENSAFE_CONFIG",
        ) from error
    default = document.pop("default_profile", "default")
    tables = document.pop("profiles", {})
    if document or not isinstance(tables, dict) or not isinstance(default, str):
        raise ConfigError(f"{path}: expected default_profile and [profiles.NAME] only")
    return ProfileFile(
        {name: _profile(path, name, table) for name, table in tables.items()}, default
    )


def save_profile(
    name: str,
    target: str,
    api_key: str | None,
    *,
    make_default: bool = False,
    ca: str | Path | None = None,
) -> Path:
    """Writes one profile and keeps the others; the file is readable by its owner only.

    Args:
        name: letters, digits, `-` and `_`.
        target: `grpc://HOST:PORT`, `HOST:PORT`, or `grpcs://HOST:PORT` for TLS.
        api_key: the key's secret.
        make_default: use this profile where none is named. The first one saved is the default.
        ca: PEM file of the authority that signed the server's certificate; saved as a full path.

    Returns:
        The file written.

    Raises:
        ConfigError: for a bad name, or a file that cannot be read or written.
    """
    check_string("target", target)
    if api_key is not None:
        check_string("api_key", api_key)
    check_bool("make_default", make_default)
    authority = None if ca is None else str(check_path("ca", ca).expanduser().resolve())
    if not _NAME.fullmatch(check_string("name", name)):
        raise ConfigError.of("name", f"may only have letters, digits, '-' and '_', got {name!r}")
    path = config_path()
    old = read_profiles(path)
    profiles = {**old.profiles, name: Profile(target, api_key, authority)}
    default = name if make_default or old.default_profile not in profiles else old.default_profile
    lines = [f"default_profile = {_quote(default)}"]
    for key, profile in sorted(profiles.items()):
        lines += ["", f"[profiles.{key}]", f"target = {_quote(profile.target)}"]
        if profile.api_key is not None:
            lines.append(f"api_key = {_quote(profile.api_key)}")
        if profile.ca is not None:
            lines.append(f"ca = {_quote(profile.ca)}")
    try:
        _write_private(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(
            f"the profiles' file {path} cannot be written: {error.strerror or error}",
            remedy="set TENSAFE_CONFIG to a file that you may write; `tensafe up` takes "
            "--no-profile",
        ) from error
    return path


def _profile(path: Path, name: str, table: object) -> Profile:
    if not isinstance(table, dict) or not table.keys() <= {"target", "api_key", "ca"}:
        raise ConfigError(f"{path}: [profiles.{name}] takes target, api_key and ca only")
    target, api_key, ca = table.get("target"), table.get("api_key"), table.get("ca")
    if not (
        isinstance(target, str) and isinstance(api_key, str | None) and isinstance(ca, str | None)
    ):
        raise ConfigError(f"{path}: [profiles.{name}] needs target, and api_key and ca, as strings")
    return Profile(target, api_key, ca)


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but for surrogate pairs, which ensure_ascii=False avoids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".config-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
