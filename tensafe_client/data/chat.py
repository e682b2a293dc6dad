"""Text and conversations to datums, with the model's own tokenizer and chat template.

Needs the extra `tensafe[data]` (tokenizers, jinja2); no transformers. The tokenizer's files come
from the service: `ChatTokenizer(client.tokenizer_files("smollm2-135m"))`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensafe.wire.tensors import Array
from tensafe_client.data.datum import Datum
from tensafe_client.data.jsonl import Example, check_characters
from tensafe_client.errors import (
    BatchError,
    ConfigError,
    MissingExtraError,
    NoChatTemplateError,
)

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Encoding


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Args:
        files: the tokenizer's files by name, as `client.tokenizer_files` returns them:
            `tokenizer.json`, `tokenizer_config.json` and maybe `chat_template.jinja`.

    Raises:
        MissingExtraError: if the extra `tensafe[data]` is not installed.
        ConfigError: if a file is missing or broken.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError.of("tokenising on the client's side", "data") from error
        if "tokenizer.json" not in files:
            raise ConfigError("the model has no tokenizer.json: send token ids (Datum) instead")
        self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        try:
            self._config = json.loads(files.get("tokenizer_config.json", b"{}"))
        except ValueError as error:
            raise ConfigError(f"tokenizer_config.json is no JSON: {error}") from error
        self._special = {
            name: _token_text(self._config.get(name))
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        source = files.get("chat_template.jinja")
        self._source = source.decode() if source else _template(self._config.get("chat_template"))
        self._compiled: Template | None = None
        added = self._tokenizer.get_added_tokens_decoder()
        self._markers = {token for token, kind in added.items() if kind.special}
        self._markers.update(self._end())

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; None if the tokenizer has none."""
        return self._id_of("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Turns text into token ids.

        Raises:
            BatchError: if the text has half of a surrogate pair.
        """
        return list(self._encoding(text, add_special_tokens).ids)

    def decode(self, tokens: Sequence[int] | Array, *, skip_special_tokens: bool = True) -> str:
        """Turns token ids into text."""
        ids = [int(token) for token in tokens]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Applies the chat template.

        Raises:
            NoChatTemplateError: if the model has none.
            BatchError: if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        template = self._template()
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{name: text for name, text in self._special.items() if text is not None},
            )
        except TemplateError as error:
            raise BatchError(f"the chat template refuses the conversation: {error}") from error

    def datum(self, example: Example, *, max_tokens: int | None = None) -> Datum:
        """Encodes one example; only what is to be learned has a weight.

        Of a conversation that is the assistant's turns, each up to and including the special token
        that ends it. White space that the template puts after that token is not learned; where the
        template ends a turn by no special token, all that it puts there is. Of a prompt and
        completion, it is the completion and the end token; of a text, all of it and the end token.

        Args:
            example: what `read_jsonl` gives.
            max_tokens: cut to so many tokens, from the end. None: never cut.

        Raises:
            BatchError: if nothing is left to learn, or the template cannot be masked.
            NoChatTemplateError: for a conversation, if the model has no chat template.
        """
        if example.messages is not None:
            ids, learned = self._conversation(example.messages, example.prompt_messages)
        elif example.text is not None:
            ids = self.encode(example.text, add_special_tokens=True) + self._end()
            learned = [True] * len(ids)
        else:
            before = self.encode(example.prompt or "", add_special_tokens=True)
            after = self.encode(example.completion or "") + self._end()
            ids, learned = before + after, [False] * len(before) + [True] * len(after)
        if max_tokens is not None:
            ids, learned = ids[: max_tokens + 1], learned[: max_tokens + 1]
        if not any(learned[1:]):
            why = "one token has none to be predicted from; make it longer"
            if max_tokens is not None:
                why = f"what is learned comes after the first {max_tokens} tokens; raise max_tokens"
            raise BatchError(f"nothing of the example is left to learn: {why}")
        weights = np.asarray(learned[1:], np.float32)
        return Datum(ids[:-1], ids[1:], weights)

    def _conversation(
        self, messages: Sequence[Mapping[str, str]], prompt_messages: int
    ) -> tuple[list[int], list[bool]]:
        """Renders whole, and finds each assistant turn as what it adds to the text before it."""
        whole = self.render(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < prompt_messages:
                continue
            before = self.render(messages[:index], add_generation_prompt=True) if index else ""
            after = self.render(messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise BatchError(
                    "this chat template changes earlier turns when later ones come, so the "
                    "assistant's turns cannot be told apart; mask the tokens yourself with Datum"
                )
            spans.append((len(before), len(after)))
        encoding = self._encoding(whole, add_special_tokens=False)
        markers = [
            place
            for token, place in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._markers
        ]
        spans = [(start, _turn_end(whole, start, end, markers)) for start, end in spans]
        learned = [
            any(start < end_ and end > start_ for start_, end_ in spans)
            for start, end in encoding.offsets
        ]
        return list(encoding.ids), learned

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        check_characters("the text", text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _end(self) -> list[int]:
        end = self.eos_token_id
        return [] if end is None else [end]

    def _id_of(self, name: str) -> int | None:
        text = self._special[name]
        if text is None:
            return None
        token: int | None = self._tokenizer.token_to_id(text)
        return token

    def _template(self) -> Template:
        if self._source is None:
            raise NoChatTemplateError(
                "the model has no chat template",
                remedy="use prompt/completion or text examples, or a model with a template",
            )
        if self._compiled is None:
            self._compiled = _compile(self._source)
        return self._compiled


def _turn_end(text: str, start: int, end: int, markers: Sequence[tuple[int, int]]) -> int:
    """Where a turn's last special token ends, if nothing but white space follows it there."""
    inside = [stop for first, stop in markers if start <= first and stop <= end]
    return inside[-1] if inside and not text[inside[-1] : end].strip() else end


def _compile(source: str) -> Template:
    """Compiles a template in a sandbox: it is data of the model's author, not our code."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError.of("applying a chat template", "data") from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment.from_string(source)


def _token_text(value: Any) -> str | None:
    """A special token is a string, or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(value: Any) -> str | None:
    """A template is a string, or a list of named ones of which `default` is meant."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
