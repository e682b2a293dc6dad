"""`tensafe profiles`: the services that this user knows."""

from __future__ import annotations

import click

from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_json, print_table
from tensafe_client.profiles import config_path, read_profiles, save_profile


@click.group()
def profiles() -> None:
    """List the services you use and pick the default.

    A profile is a target and a key under a name, in one file that only you can read.
    """


@examples("tensafe profiles list", "tensafe profiles list --json")
@profiles.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the profiles, without their keys."""
    file = read_profiles()
    rows = [
        {
            "name": name,
            "target": profile.target,
            "has_key": profile.api_key is not None,
            "default": name == file.default_profile,
        }
        for name, profile in sorted(file.profiles.items())
    ]
    if as_json:
        print_json(rows)
        return
    click.echo(f"{config_path()}")
    print_table(
        ("", "NAME", "TARGET", "KEY"),
        [
            (
                "*" if row["default"] else " ",
                row["name"],
                row["target"],
                "yes" if row["has_key"] else "no",
            )
            for row in rows
        ],
    )


@examples("tensafe profiles use staging", "tensafe profiles use staging --json")
@profiles.command()
@click.argument("name")
@json_option
def use(name: str, as_json: bool) -> None:
    """Make NAME the profile that commands take when none is named."""
    file = read_profiles()
    profile = file.profiles.get(name)
    if profile is None:
        known = ", ".join(sorted(file.profiles)) or "none"
        raise click.BadParameter(f"no profile {name!r} (profiles: {known})", param_hint="NAME")
    save_profile(name, profile.target, profile.api_key, make_default=True)
    if as_json:
        print_json({"name": name, "target": profile.target, "default": True})
        return
    click.echo(f"Commands now use {name} ({profile.target}).")
