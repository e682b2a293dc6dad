"""`tensafe admin`: tenants, keys, the disk and everybody's runs, for operators."""

from __future__ import annotations

import click

from tensafe_client.cli.connecting import connect_admin
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_json, print_table
from tensafe_client.cli.verifying import show_verification
from tensafe_client.profiles import save_profile


@click.group()
def admin() -> None:
    """Manage tenants and keys, look at the disk, verify runs; needs an admin key.

    `tensafe up` saves one as the profile NAME-admin, which these commands take by themselves.
    """


@examples("tensafe admin storage", "tensafe admin storage --json")
@admin.command()
@json_option
@click.pass_context
def storage(ctx: click.Context, as_json: bool) -> None:
    """Show what takes how much disk on the server."""
    found = connect_admin(ctx).admin.storage()
    if as_json:
        print_json(found)
        return
    print_table(
        ("WHAT", "COUNT", "BYTES"),
        [
            ("log (operations)", found.log.count, found.log.size_bytes),
            ("  of it free", "", found.log_free_bytes),
            ("payloads", found.payloads.count, found.payloads.size_bytes),
            ("snapshots", found.snapshots.count, found.snapshots.size_bytes),
            ("  found damaged", found.damaged_snapshots, ""),
            ("artifacts", found.artifacts.count, found.artifacts.size_bytes),
            ("other", found.other.count, found.other.size_bytes),
        ],
    )


@admin.group()
def runs() -> None:
    """List and verify runs of any tenant."""


@examples("tensafe admin runs list", "tensafe admin runs list research --json")
@runs.command("list")
@click.argument("tenant", required=False)
@click.option("--all", "include_deleted", is_flag=True, help="Also deleted runs.")
@json_option
@click.pass_context
def list_runs(ctx: click.Context, tenant: str | None, include_deleted: bool, as_json: bool) -> None:
    """List the runs of TENANT, or of all tenants, newest first.

    MISMATCHES above 0: after a recovery the run may differ from what it was.
    """
    found = connect_admin(ctx).admin.runs(tenant, include_deleted=include_deleted)
    if as_json:
        print_json(found)
        return
    print_table(
        ("RUN", "TENANT", "STATUS", "STEP", "MODEL", "MISMATCHES", "CREATED"),
        [
            (
                *(run.id, run.tenant_id, run.status, run.step, run.model),
                *(run.replay_mismatches, run.created_at),
            )
            for run in found
        ],
    )


@examples("tensafe admin runs verify RUN", "tensafe admin runs verify RUN --json > report.json")
@runs.command("verify")
@click.argument("run_id", metavar="RUN")
@json_option
@click.pass_context
def verify_run(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """Replay RUN, of any tenant, from its log, and say whether it gives the recorded results.

    The run itself is not touched. Exit status 0: it does; 11: it does not.
    """
    show_verification(ctx, connect_admin(ctx).admin.verify_run, run_id, as_json)


@admin.group()
def tenants() -> None:
    """Create and list tenants."""


@examples("tensafe admin tenants create research")
@tenants.command("create")
@click.argument("name")
@json_option
@click.pass_context
def create_tenant(ctx: click.Context, name: str, as_json: bool) -> None:
    """Create the tenant NAME (letters, digits, `-`, `_`, `.`)."""
    tenant = connect_admin(ctx).admin.create_tenant(name)
    if as_json:
        print_json(tenant)
        return
    click.echo(f"Created {tenant.name} ({tenant.id}).")
    click.echo(f"Next: tensafe admin keys create {tenant.name}")


@examples("tensafe admin tenants list")
@tenants.command("list")
@json_option
@click.pass_context
def list_tenants(ctx: click.Context, as_json: bool) -> None:
    """List the tenants, by name."""
    found = connect_admin(ctx).admin.tenants()
    if as_json:
        print_json(found)
    else:
        print_table(
            ("TENANT", "NAME", "CREATED"),
            [(tenant.id, tenant.name, tenant.created_at) for tenant in found],
        )


@admin.group()
def keys() -> None:
    """Create, list and revoke keys."""


@examples(
    "tensafe admin keys create research                          prints the secret, once",
    "tensafe admin keys create research --save-profile research  keeps it as a profile",
    "tensafe admin keys create --kind worker                     for TENSAFE_WORKER_KEY",
)
@keys.command("create")
@click.argument("tenant", required=False)
@click.option(
    "--kind",
    type=click.Choice(["tenant", "admin", "worker"]),
    default="tenant",
    show_default=True,
    help="What the key may do.",
)
@click.option("--name", default="", help="Free text for people.")
@click.option("--save-profile", "profile", metavar="NAME", help="Save it as this profile.")
@json_option
@click.pass_context
def create_key(
    ctx: click.Context,
    tenant: str | None,
    kind: str,
    name: str,
    profile: str | None,
    as_json: bool,
) -> None:
    """Create a key; TENANT is a tenant's name or id, and only for keys of that kind.

    The secret is shown now and never again: the service keeps only its hash.
    """
    if (kind == "tenant") != (tenant is not None):
        rule = "a tenant key needs one" if tenant is None else f"a key of kind {kind} has none"
        raise click.BadParameter(rule, param_hint="TENANT")
    client = connect_admin(ctx)
    new = client.admin.create_key(tenant, kind=kind, name=name)
    if profile is not None:
        path = save_profile(profile, client.target, new.secret, ca=client.connection.ca)
        click.echo(f"Saved the profile {profile} in {path}.", err=True)
    if as_json:
        print_json({"key": new.key, "secret": new.secret})
    elif profile is None:
        click.echo(new.secret)
        click.echo(f"({new.key.id}; this is the only time it is shown)", err=True)


@examples("tensafe admin keys list research", "tensafe admin keys list     admin and worker keys")
@keys.command("list")
@click.argument("tenant", required=False)
@json_option
@click.pass_context
def list_keys(ctx: click.Context, tenant: str | None, as_json: bool) -> None:
    """List the keys of TENANT, without their secrets."""
    found = connect_admin(ctx).admin.keys(tenant)
    if as_json:
        print_json(found)
    else:
        print_table(
            ("KEY", "KIND", "NAME", "CREATED", "REVOKED"),
            [(key.id, key.kind, key.name, key.created_at, key.revoked_at) for key in found],
        )


@examples("tensafe admin keys revoke KEY")
@keys.command("revoke")
@click.argument("key_id", metavar="KEY")
@json_option
@click.pass_context
def revoke_key(ctx: click.Context, key_id: str, as_json: bool) -> None:
    """Revoke KEY at once."""
    key = connect_admin(ctx).admin.revoke_key(key_id)
    if as_json:
        print_json(key)
    else:
        click.echo(f"Revoked {key.id}.")
