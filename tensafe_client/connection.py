"""Where to connect: argument, then environment, then profile."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensafe_client.checks import check_fields, check_number, check_string
from tensafe_client.errors import ConfigError
from tensafe_client.profiles import ProfileFile, read_profiles

DEFAULT_TIMEOUT_S = 30.0

_KEY = re.compile(r"[\x21-\x7e]+")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class ClientConfig:
    """How to reach a coordinator.

    Attributes:
        target: `HOST:PORT` or `grpc://HOST:PORT`. None: `TENSAFE_TARGET`, else the profile's.
        api_key: secret of a key, `ts_…`. None: `TENSAFE_API_KEY`, else that of a profile with the
            same target (a key is never sent to another server than it was saved for).
        profile: name of the profile. None: `TENSAFE_PROFILE`, else the file's default.
        timeout_s: longest time of one call, retries included, seconds. Operations may take longer:
            they run on the server, and futures wait for them.
    """

    target: str | None = None
    api_key: str | None = field(default=None, repr=False)
    profile: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        for name in ("target", "api_key", "profile"):
            value = getattr(self, name)
            if value is not None:
                check_string(name, value)
        object.__setattr__(self, "timeout_s", check_number("timeout_s", self.timeout_s))
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, got {self.timeout_s}")

    @classmethod
    def of(cls, config: ClientConfig | Mapping[str, Any] | str | None) -> ClientConfig:
        """Takes what `ServiceClient` takes: nothing, a target, a dict or a config.

        Raises:
            ConfigError: for an unknown field, or a value of the wrong type.
        """
        if isinstance(config, cls):
            return config
        if config is None:
            return cls()
        if isinstance(config, str):
            return cls(target=config)
        if isinstance(config, Mapping):
            check_fields("the client's config", config, cls)
            return cls(**config)
        raise ConfigError(
            f"config must be a target string, a dict or a ClientConfig, got {type(config).__name__}"
        )


@dataclass(frozen=True)
class Connection:
    """A resolved target and key."""

    host_port: str
    api_key: str | None = field(repr=False)
    timeout_s: float

    @property
    def is_loopback(self) -> bool:
        """Whether the target is this machine."""
        host = self.host_port.rsplit(":", 1)[0].strip("[]")
        return host in {"localhost", "::1"} or host.startswith("127.")


def resolve(config: ClientConfig) -> Connection:
    """Fills in from environment and profiles what the config leaves open.

    Raises:
        ConfigError: if no target is known, or target or key cannot be read.
    """
    file = read_profiles()
    named = config.profile or os.environ.get("TENSAFE_PROFILE")
    if named and named not in file.profiles:
        known = ", ".join(sorted(file.profiles)) or "none"
        raise ConfigError(f"no profile {named!r} (profiles: {known})")
    profile = file.profiles.get(named or file.default_profile)
    # A profile that the caller names stands above the environment's target.
    target = config.target or (
        profile.target
        if profile and config.profile
        else os.environ.get("TENSAFE_TARGET") or (profile.target if profile else None)
    )
    if not target:
        raise ConfigError(
            "no target: pass one (ServiceClient('HOST:PORT')), set TENSAFE_TARGET, or start a "
            "service here with `tensafe up`, which saves a profile"
        )
    host_port = parse_target(target)
    api_key = config.api_key or os.environ.get("TENSAFE_API_KEY")
    if not api_key:
        api_key = _saved_key(file, named or file.default_profile, host_port)
    return Connection(host_port, _checked_key(api_key), config.timeout_s)


def parse_target(target: str) -> str:
    """Turns `grpc://HOST:PORT` or `HOST:PORT` into `HOST:PORT`.

    Raises:
        ConfigError: for another scheme, or a missing or impossible port.
    """
    text = target.strip().removeprefix("grpc://").rstrip("/")
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"target {target!r} is not HOST:PORT or grpc://HOST:PORT")
    return text


def _checked_key(api_key: str | None) -> str | None:
    """Strips what copying or a file's last line adds; gRPC takes printable ASCII only."""
    key = (api_key or "").strip()
    if key and not _KEY.fullmatch(key):
        raise ConfigError(
            "the API key has characters outside printable ASCII (0x21 to 0x7e)",
            remedy="pass the secret as it was shown, `ts_…`, without quotes or line breaks in it",
        )
    return key or None


def _saved_key(file: ProfileFile, first: str, host_port: str) -> str | None:
    for name in sorted(file.profiles, key=lambda name: name != first):
        profile = file.profiles[name]
        if profile.api_key and parse_target(profile.target) == host_port:
            return profile.api_key
    return None
