"""JSONL files in the ecosystem's conventions (those of TRL's SFT trainer).

Each line is one JSON object with one of

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"prompt": [{"role": "user", …}], "completion": [{"role": "assistant", …}]}
    {"text": "…"}

and, for private runs that protect more than single examples, `"unit_id": "…"`: whose it is.

Other columns (ids, sources, …) are passed over, but for those that are part of what a model reads
in other conventions, such as `system` and `tools`: a line that has one is refused, and so is one
that has a key twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tensafe_client.checks import check_path
from tensafe_client.data.datum import unit_id_of
from tensafe_client.errors import BatchError

Message = dict[str, str]

# Columns that chat templates render, or that others put before or beside the prompt.
_CHANGES_THE_PROMPT = (
    *("system", "system_prompt", "instruction", "input", "context"),
    *("tools", "functions", "documents", "chat_template_kwargs"),
    *("images", "videos", "audio"),
)


@dataclass(frozen=True)
class Example:
    """One training example: exactly one of the three forms.

    Attributes:
        messages: a conversation; the assistant's turns are learned.
        prompt: text before `completion`, which alone is learned.
        completion: text after `prompt`.
        text: text that is learned whole.
        prompt_messages: how many of `messages` are the prompt, so that assistant turns among them
            are not learned; 0 if every assistant turn is.
        line: number of its line in the file it was read from; None if it was not. Examples that
            differ in it alone are equal.
        unit_id: whose it is, for private runs whose privacy unit is "unit_id"; others pass it over.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    prompt_messages: int = 0
    line: int | None = field(default=None, compare=False)
    unit_id: str | None = None


def read_jsonl(path: str | Path) -> list[Example]:
    """Reads a file; empty lines are passed over.

    Raises:
        BatchError: naming the number of a bad line and what is wrong with it.
        ConfigError: if `path` is no path.
        FileNotFoundError: if there is no such file.
    """
    examples = list(_read(check_path("path", path)))
    if not examples:
        raise BatchError(f"{path} has no examples")
    return examples


def parse_example(record: Mapping[str, Any]) -> Example:
    """Reads one object.

    Raises:
        BatchError: if it is none of the forms, or mixes them.
    """
    unit_id = record.get("unit_id")
    if unit_id is not None:
        unit_id_of("`unit_id`", unit_id)
    example = _content(record)
    for name in _CHANGES_THE_PROMPT:
        if record.get(name):
            raise BatchError(
                f"`{name}` would not be read; put it into the messages (or the prompt) as text, or "
                "leave it out"
            )
    return replace(example, unit_id=unit_id)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that comes twice, Python and others take different ones."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BatchError(f"has the key {twice!r} twice in one object")
    return record


def _content(record: Mapping[str, Any]) -> Example:
    keys = {"messages", "prompt", "completion", "text"} & record.keys()
    if keys == {"messages"}:
        return Example(messages=_messages("messages", record["messages"], learned=True))
    if keys == {"prompt", "completion"}:
        return _prompt_completion(record["prompt"], record["completion"])
    if keys == {"text"}:
        return Example(text=_string("text", record["text"]))
    found = ", ".join(sorted(map(str, record))) or "nothing"
    raise BatchError(f"needs `messages`, `prompt` and `completion`, or `text`; it has {found}")


def check_characters(what: str, text: str) -> None:
    """Refuses half of a surrogate pair: JSON can spell it, and no tokenizer can read it.

    Raises:
        BatchError: naming `what` and the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BatchError(
            f"{what} has half of a surrogate pair, {half}, at character {error.start}"
        ) from None


def _read(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_once)
                if not isinstance(record, dict):
                    raise BatchError("is not a JSON object")
                yield replace(parse_example(record), line=number)
            except BatchError as error:
                raise BatchError(f"{path}, line {number}: {error.message}") from error
            except json.JSONDecodeError as error:  # whose own text counts lines within the line
                where = f"{path}, line {number}"
                raise BatchError(
                    f"{where}: is no JSON: {error.msg}, at character {error.pos + 1}"
                ) from error
            except ValueError as error:
                raise BatchError(f"{path}, line {number}: is no JSON: {error}") from error
            except RecursionError:  # its traceback is as deep as the line: not chained
                raise BatchError(f"{path}, line {number}: is nested too deeply") from None


def _prompt_completion(prompt: Any, completion: Any) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        check_characters("`prompt`", prompt)
        return Example(prompt=prompt, completion=_string("completion", completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages("prompt", prompt, learned=False)
        after = _messages("completion", completion, learned=True)
        return Example(messages=before + after, prompt_messages=len(before))
    raise BatchError("`prompt` and `completion` must both be strings, or both lists of messages")


def _messages(field: str, value: Any, *, learned: bool) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BatchError(f"`{field}` must be a list of messages, not empty")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BatchError(f"`{field}[{index}]` must be an object with `role` and `content`")
        for key in ("role", "content"):
            if not isinstance(item.get(key), str):
                raise BatchError(f"`{field}[{index}].{key}` must be a string")
            check_characters(f"`{field}[{index}].{key}`", item[key])
        extra = item.keys() - {"role", "content"}
        if extra:
            raise BatchError(f"`{field}[{index}]` has {sorted(extra)}, which is not supported")
        messages.append({"role": item["role"], "content": item["content"]})
    roles = {message["role"] for message in messages}
    if learned and "assistant" not in roles:
        raise BatchError(
            f"`{field}` has no message of the role 'assistant', only of {sorted(roles)}, so there "
            "is nothing to learn"
        )
    return tuple(messages)


def _string(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BatchError(f"`{field}` must be a string, not empty")
    check_characters(f"`{field}`", value)
    return value
