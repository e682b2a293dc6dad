"""Verifying a run, as tenants and operators see it."""

from __future__ import annotations

import sys
from typing import Protocol

import click

from tensafe_client.cli.failures import DOES_NOT_REPRODUCE
from tensafe_client.cli.output import print_json
from tensafe_client.infos import VerifyReport


class _Progress(Protocol):
    def __call__(self, replayed: int, total: int) -> None: ...


class _Verify(Protocol):
    def __call__(self, run_id: str, *, on_progress: _Progress) -> VerifyReport: ...


def show_verification(ctx: click.Context, verify: _Verify, run_id: str, as_json: bool) -> None:
    """Verifies a run, shows how far it is, prints the verdict and exits by it."""
    shows = sys.stderr.isatty()

    def progress(replayed: int, total: int) -> None:
        if shows:
            click.echo(f"\rreplayed {replayed} of {total}", nl=False, err=True)

    report = verify(run_id, on_progress=progress)
    if shows:
        click.echo(err=True)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if not report.reproduces:
        ctx.exit(DOES_NOT_REPRODUCE)


def _print_report(report: VerifyReport) -> None:
    start = f"the snapshot after seq {report.from_seq}" if report.from_seq else "its start"
    if report.from_seq and not report.pruned:
        start = f"the saved state after seq {report.from_seq}"
    click.echo(
        f"Replayed {report.replayed} operations of {report.run_id} from {start} to seq "
        f"{report.to_seq}: {report.exact} compared bit by bit, {report.within_tolerance} within a "
        "tolerance."
    )
    if report.pruned:
        click.echo("Earlier operations are pruned and were not replayed.")
    for one in report.details:
        click.echo(f"  seq {one.seq} ({one.operation_id}): {one.difference}")
    click.echo(_verdict(report))


def _verdict(report: VerifyReport) -> str:
    if not report.reproduces:
        return f"It does not give the recorded results: {report.mismatches} differ."
    if not report.replayed:
        return "Nothing has changed the run since then, so that this shows nothing."
    return "It gives the recorded results."
