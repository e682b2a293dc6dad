"""Page tokens: opaque to callers, a position to us."""

from __future__ import annotations

import re

from tensafe.wire.status import TenSafeFault
from tensafe_server.store.base import Page

_DEFAULT_SIZE = 100
_POSITION = re.compile(r"[0-9]{1,19}")
_LAST_POSITION = 2**63 - 1


def page(size: int, token: str) -> Page:
    """The page that a request asks for.

    Raises:
        TenSafeFault: INVALID_PAGE_TOKEN.
    """
    if not token:
        return Page(size or _DEFAULT_SIZE)
    kind, _, position = token.partition(".")
    if kind != "p1" or not _POSITION.fullmatch(position) or int(position) > _LAST_POSITION:
        raise TenSafeFault(
            "INVALID_PAGE_TOKEN",
            "page_token is not one that this server made; begin without one",
            field="page_token",
        )
    return Page(size or _DEFAULT_SIZE, int(position))


def token(page: Page, found: int, last_position: int) -> str:
    """The token of the page after one with `found` rows; empty at the end."""
    return f"p1.{last_position}" if found == page.size else ""
