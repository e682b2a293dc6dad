"""Errors of ours that nobody foresaw: what a caller is told, and where the rest is found."""

from __future__ import annotations

import logging
import secrets

from tensafe.wire.status import TenSafeFault


def unexpected(log: logging.Logger, what: str, error: Exception) -> TenSafeFault:
    """INTERNAL with an error id, under which the log has the exception; its text stays here.

    Args:
        what: what failed, for the log.
    """
    error_id = secrets.token_hex(6)
    log.error("%s failed, error id %s", what, error_id, exc_info=error)
    return TenSafeFault(
        "INTERNAL",
        f"the server failed, error id {error_id}; its log says why",
        error_id=error_id,
    )
