"""What a failed command prints and exits with."""

from __future__ import annotations

import click

from tensafe_client import errors

SERVICE_FAULT = 10
DOES_NOT_REPRODUCE = 11
INTERRUPTED = 130

# The first class that fits counts. Stable: docs/cli.md lists these numbers.
_EXIT_STATUS: tuple[tuple[type[errors.TenSafeError], int], ...] = (
    (errors.ConnectionFailedError, 3),
    (errors.RequestTimeoutError, 3),
    (errors.OperationTimeoutError, 3),
    (errors.AuthenticationError, 4),
    (errors.PermissionDeniedError, 4),
    (errors.NotFoundError, 5),
    (errors.InvalidArgumentError, 6),
    (errors.OutOfRangeError, 6),
    (errors.PreconditionError, 7),
    (errors.ConflictError, 7),
    (errors.ResourceExhaustedError, 8),
    (errors.OperationCancelledError, 9),
    (errors.DeadlineExceededError, 9),
)


def exit_status(error: errors.TenSafeError) -> int:
    """Exit status for an error of the SDK; SERVICE_FAULT where no cause is known."""
    return next((status for kind, status in _EXIT_STATUS if isinstance(error, kind)), SERVICE_FAULT)


class ServiceFailure(click.ClickException):
    """An error of the SDK, as the command line shows it: one message on stderr."""

    def __init__(self, error: errors.TenSafeError) -> None:
        super().__init__(str(error))
        self.exit_code = exit_status(error)  # type: ignore[misc]  # click reads it per instance
