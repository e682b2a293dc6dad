"""Token ids as text, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_KEPT = 6
"""Tokens that are decoded along with new ones: some tokenizers drop a space at a text's start."""
_WINDOW, _LONGEST_WINDOW = 16, 64
_CHARACTER = 4
"""Most bytes of a character, and so most tokens."""


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
        self._window = self._tail(list(prompt))
        # What of the window's text has been given, the prompt's part included. A character that
        # the prompt leaves unfinished may become the completion's.
        text = self._decode(self._window)
        self._given = text.rstrip(_REPLACEMENT)
        self._doubtful = text[len(self._given) :]

    def add(self, token: int) -> str:
        """The text that has become certain with the next token."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            certain = text.rstrip(_REPLACEMENT)
            # Some decoders mark all of a run of bytes as long as its last character is not whole.
            return self._beyond(certain) if certain.startswith(self._given) else ""
        fresh = self._beyond(text)
        if len(self._window) > _WINDOW:
            self._shorten()
        return fresh

    def _shorten(self) -> None:
        tail = self._tail(self._window)
        text = self._decode(tail)
        if _REPLACEMENT not in text or len(self._window) > _LONGEST_WINDOW:
            self._window, self._given = tail, text

    def finish(self) -> str:
        """What is left at the end: the bytes of unfinished characters, as replacement marks."""
        return self._beyond(self._decode(self._window))

    def _beyond(self, text: str) -> str:
        if len(text) > len(self._given) and text.startswith(self._given + self._doubtful):
            self._given += self._doubtful  # it was the prompt's after all
            self._doubtful = ""
        # Where bytes turned out to be no characters, other text may stand in the place of what was
        # given; that stays as it is.
        fresh = text[len(self._given) :]
        self._given = text
        return fresh

    def _tail(self, tokens: list[int]) -> list[int]:
        """The last few, from the beginning of a character on where that can be seen."""
        unfinished = None
        for count in range(_KEPT, _KEPT + _CHARACTER):
            tail = tokens[-count:]
            text = self._decode(tail)
            if _REPLACEMENT not in text:
                return tail
            if unfinished is None and _REPLACEMENT not in text.rstrip(_REPLACEMENT):
                unfinished = tail  # nothing but its last character is not whole
        return tokens[-_KEPT:] if unfinished is None else unfinished

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
