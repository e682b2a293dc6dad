"""Where to connect: argument, then environment, then profile."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensafe.wire.tls import Address, parse_address, read_authorities
from tensafe_client.checks import check_fields, check_number, check_path, check_string
from tensafe_client.errors import ConfigError
from tensafe_client.profiles import Profile, ProfileFile, read_profiles

DEFAULT_TIMEOUT_S = 30.0

_KEY = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class ClientConfig:
    """How to reach a coordinator.

    Attributes:
        target: `HOST:PORT` or `grpc://HOST:PORT` (plain text), or `grpcs://HOST:PORT` (TLS). None:
            `TENSAFE_TARGET`, else the profile's.
        api_key: secret of a key, `ts_…`. None: `TENSAFE_API_KEY`, else that of a profile with the
            same target (a key is never sent to another server than it was saved for).
        profile: name of the profile. None: `TENSAFE_PROFILE`, else the file's default.
        timeout_s: longest time of one call, retries included, seconds. Operations may take longer:
            they run on the server, and futures wait for them.
        ca: PEM file of the authority that signed the server's certificate, for `grpcs://`. None:
            `TENSAFE_CA`, else that of a profile with the same target, else the well-known ones.
    """

    target: str | None = None
    api_key: str | None = field(default=None, repr=False)
    profile: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    ca: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("target", "api_key", "profile"):
            value = getattr(self, name)
            if value is not None:
                check_string(name, value)
        if self.ca is not None:
            object.__setattr__(self, "ca", check_path("ca", self.ca))
        object.__setattr__(self, "timeout_s", check_number("timeout_s", self.timeout_s))
        if not self.timeout_s > 0:
            raise ConfigError.of("timeout_s", f"must be above 0, got {self.timeout_s}")

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
        raise ConfigError.of(
            "config",
            f"must be a target string, a dict or a ClientConfig, got {type(config).__name__}",
        )


@dataclass(frozen=True)
class Connection:
    """A resolved target and key.

    Attributes:
        authorities: who may have signed the server's certificate, PEM. None: the well-known ones.
        ca: the file that they were read from.
    """

    address: Address
    api_key: str | None = field(repr=False)
    timeout_s: float
    authorities: bytes | None = field(default=None, repr=False)
    ca: Path | None = None

    @property
    def host_port(self) -> str:
        """`HOST:PORT`."""
        return self.address.host_port


def resolve(config: ClientConfig) -> Connection:
    """Fills in from environment and profiles what the config leaves open.

    Raises:
        ConfigError: if no target is known, or target, key or certificate authority cannot be used.
    """
    file = read_profiles()
    named = config.profile or os.environ.get("TENSAFE_PROFILE")
    if named and named not in file.profiles:
        known = ", ".join(sorted(file.profiles)) or "none"
        raise ConfigError.of("profile", f"must be one of yours ({known}), got {named!r}")
    profile = file.profiles.get(named or file.default_profile)
    # A profile that the caller names stands above the environment's target.
    target = config.target or (
        profile.target
        if profile and config.profile
        else os.environ.get("TENSAFE_TARGET") or (profile.target if profile else None)
    )
    if not target:
        raise ConfigError.of(
            "target",
            "is not known: pass one (ServiceClient('HOST:PORT')), set TENSAFE_TARGET, or start a "
            "service here with `tensafe up`, which saves a profile",
        )
    address = parse_target(target)
    saved = _same_address(file, named or file.default_profile, address)
    api_key = config.api_key or os.environ.get("TENSAFE_API_KEY")
    if not api_key:
        api_key = next((one.api_key for one in saved if one.api_key), None)
    ca = _authority_file(config, saved, address)
    return Connection(
        address, _checked_key(api_key), config.timeout_s, _authorities(ca) if ca else None, ca
    )


def parse_target(target: str) -> Address:
    """Reads `grpcs://HOST:PORT` (TLS), `grpc://HOST:PORT` or `HOST:PORT` (plain text).

    Raises:
        ConfigError: for another scheme, or a missing or impossible port.
    """
    try:
        return parse_address(target)
    except ValueError as error:
        raise ConfigError.of("target", str(error)) from None


def _authority_file(config: ClientConfig, saved: list[Profile], address: Address) -> Path | None:
    if not address.secure:
        if config.ca is not None:
            raise ConfigError.of(
                "ca",
                f"has no effect on {address}, which is plain text",
                remedy=f"use TLS by the target grpcs://{address.host_port}, or leave ca out",
            )
        return None
    named = config.ca or os.environ.get("TENSAFE_CA")
    found = named or next((one.ca for one in saved if one.ca), None)
    return Path(found).expanduser() if found else None


def _authorities(ca: Path) -> bytes:
    try:
        return read_authorities(ca)
    except ValueError as error:
        raise ConfigError.of(
            "ca",
            "must be an authority's PEM file",
            message=str(error),
            remedy="name the authority's PEM file in ca=, --ca or TENSAFE_CA",
        ) from error


def _checked_key(api_key: str | None) -> str | None:
    """Strips what copying or a file's last line adds; gRPC takes printable ASCII only."""
    key = (api_key or "").strip()
    if key and not _KEY.fullmatch(key):
        raise ConfigError.of(
            "api_key",
            "has characters outside printable ASCII (0x21 to 0x7e)",
            remedy="pass the secret as it was shown, `ts_…`, without quotes or line breaks in it",
        )
    return key or None


def _same_address(file: ProfileFile, first: str, address: Address) -> list[Profile]:
    """The profiles of an address, `first` before the others; TLS and plain text are two."""
    names = sorted(file.profiles, key=lambda name: name != first)
    profiles = [file.profiles[name] for name in names]
    return [one for one in profiles if parse_target(one.target) == address]
