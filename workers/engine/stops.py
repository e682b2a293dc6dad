"""When a completion ends before its length limit."""

from __future__ import annotations

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.operations import Stop


class StopRule:
    """End tokens and stop texts of one call.

    Args:
        stop: None for the model's own end tokens; else exactly what it names.
    """

    def __init__(self, model: BaseModel, stop: Stop | None) -> None:
        self._end_tokens = model.end_tokens if stop is None else frozenset(stop.tokens)
        self._texts = () if stop is None else stop.strings
        self._tokenizer = model.tokenizer
        if self._texts and self._tokenizer is None:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"model {model.name} has no tokenizer, so it knows no stop strings; use "
                "stop.tokens",
                field="params.stop.strings",
            )
        # A token holds at least one byte of text, so a text that was just completed lies within
        # that many tokens; a few more for a character that is spread over several.
        longest = max((len(text.encode()) for text in self._texts), default=0)
        self._reach = longest + 8

    def is_end_token(self, token: int) -> bool:
        """Whether this token ends the completion."""
        return token in self._end_tokens

    def completes_text(self, tokens: list[int]) -> bool:
        """Whether the newest token completed a stop text."""
        if not self._texts:
            return False
        tail = self._tokenizer.decode(
            tokens[-self._reach :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """The text before the first stop text in it."""
        ends = [at for stop in self._texts if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text
