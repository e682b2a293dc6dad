"""Token ids as text, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_PROMPT_TAIL = 8
"""Tokens of the prompt that are decoded along: some tokenizers drop a space at a text's start."""
_WINDOW = 16
_KEPT = 6


class TextStream:
    """The text that tokens add to a prompt, without special tokens.

    What has been given is never taken back: the bytes of a character that is not whole yet wait for
    the rest of it. Only the newest tokens are decoded, so that a token costs the same wherever it
    stands.

    Args:
        tokenizer: of `transformers`; None gives no text.
        prompt: token ids.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_PROMPT_TAIL:])
        # What of the window's text has been given, the prompt's part included. A character that
        # the prompt leaves unfinished may become the completion's.
        text = self._decode()
        self._given = text.rstrip(_REPLACEMENT)
        self._doubtful = text[len(self._given) :]

    def add(self, token: int) -> str:
        """The text that has become certain with the next token."""
        self._window.append(token)
        text = self._decode()
        fresh = self._beyond(text.rstrip(_REPLACEMENT))
        whole = not text.endswith(_REPLACEMENT)
        if whole and len(self._window) > _WINDOW:
            self._window = self._window[-_KEPT:]
            self._given = self._decode()
        return fresh

    def finish(self) -> str:
        """What is left at the end: the bytes of unfinished characters, as replacement marks."""
        return self._beyond(self._decode())

    def _beyond(self, text: str) -> str:
        if len(text) > len(self._given) and text.startswith(self._given + self._doubtful):
            self._given += self._doubtful  # it was the prompt's after all
            self._doubtful = ""
        fresh = text[len(self._given) :]
        self._given += fresh
        return fresh

    def _decode(self) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
