"""How many parts a message has: counted before rules are applied to each of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from buf.validate import validate_pb2


def crowded_field(message: Message, most: int, *, scalars: int = 1) -> str:
    """Finds the list with which a message comes to hold more parts than it may.

    Parts are what lies in its lists and maps, and in those of the messages in it, but for fields
    whose rules are applied elsewhere. Counting ends at the first list that is too long: it costs by
    `most`, not by what was sent.

    Args:
        most: parts that are still right.
        scalars: how many numbers or texts count as one part, as one message does.

    Returns:
        The list, such as `sample.prompts`; empty if there are not so many parts.
    """
    counted = 0.0
    waiting: list[tuple[str, Message]] = [("", message)]
    while waiting:
        prefix, found = waiting.pop()
        for field, value in found.ListFields():
            if _is_checked_elsewhere(field):
                continue
            path = f"{prefix}{field.name}"
            if field.message_type is not None and not field.is_repeated:
                waiting.append((f"{path}.", value))
            elif field.is_repeated:
                counted += len(value) if field.message_type is not None else len(value) / scalars
                if counted > most:
                    return path
                if field.message_type is not None:
                    waiting += _inner(path, value)
    return ""


@cache
def _is_checked_elsewhere(field: FieldDescriptor) -> bool:
    rules = field.GetOptions().Extensions[validate_pb2.field]
    ignored = validate_pb2.IGNORE_ALWAYS
    return bool(ignored in (rules.ignore, rules.repeated.items.ignore))


def _inner(path: str, value: Any) -> list[tuple[str, Message]]:
    items = value.items() if hasattr(value, "items") else enumerate(value)
    # A map's values may be scalars too.
    return [(f"{path}[{key}].", item) for key, item in items if isinstance(item, Message)]
