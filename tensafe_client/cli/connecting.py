"""From the global options to a client."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import click

from tensafe_client import ServiceClient
from tensafe_client.connection import ClientConfig
from tensafe_client.profiles import read_profiles

ADMIN_SUFFIX = "-admin"


@dataclass(frozen=True)
class Connection:
    """What --target, --api-key, --profile and --ca said; None where they did not."""

    target: str | None = None
    api_key: str | None = field(default=None, repr=False)
    profile: str | None = None
    ca: Path | None = None

    def client(self) -> ServiceClient:
        """A client for a tenant's commands."""
        return ServiceClient(ClientConfig(self.target, self.api_key, self.profile, ca=self.ca))

    def admin_client(self) -> ServiceClient:
        """A client for an operator's commands.

        Without a key or a profile named by the caller, the profile `NAME-admin` is taken, which
        `tensafe up` saves beside the profile NAME.
        """
        if self.api_key or self.profile or os.environ.get("TENSAFE_API_KEY"):
            return self.client()
        file = read_profiles()
        admin = (os.environ.get("TENSAFE_PROFILE") or file.default_profile) + ADMIN_SUFFIX
        if admin not in file.profiles:
            return self.client()
        target = self.target or os.environ.get("TENSAFE_TARGET")
        return ServiceClient(ClientConfig(target, profile=admin, ca=self.ca))


def connection_of(ctx: click.Context) -> Connection:
    """The global options of the command that runs."""
    connection = ctx.find_root().obj
    assert isinstance(connection, Connection)
    return connection


def connect(ctx: click.Context) -> ServiceClient:
    """A tenant's client that is closed when the command ends."""
    return ctx.with_resource(connection_of(ctx).client())


def connect_admin(ctx: click.Context) -> ServiceClient:
    """An operator's client that is closed when the command ends."""
    return ctx.with_resource(connection_of(ctx).admin_client())
