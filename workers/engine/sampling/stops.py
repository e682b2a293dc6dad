"""When a completion ends before its length limit."""

from __future__ import annotations

from typing import Any

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.operations import Stop


class StopRule:
    """End tokens and stop texts of one call.

    A stop text that is one of the tokenizer's special tokens, such as `<|im_end|>`, means that
    token: it never shows in a completion's text.

    Args:
        stop: what ends a completion beside the model's own end tokens; an empty one: nothing does,
            not even those.

    Attributes:
        texts: what ends a completion when it shows in its text.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION: stop texts for a model without tokenizer.
    """

    def __init__(self, model: BaseModel, stop: Stop | None) -> None:
        self._end_tokens = model.end_tokens
        if stop is not None:
            named = frozenset(stop.tokens)
            self._end_tokens = self._end_tokens | named if named or stop.strings else named
        self.texts: tuple[str, ...] = ()
        if stop is None or not stop.strings:
            return
        if model.tokenizer is None:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"model {model.name} has no tokenizer, so it knows no stop strings; use "
                "stop.tokens",
                field="params.stop.strings",
            )
        special = _special_tokens(model.tokenizer)
        self._end_tokens |= {special[text] for text in stop.strings if text in special}
        self.texts = tuple(text for text in stop.strings if text not in special)
        self._longest = max((len(text) for text in self.texts), default=0)

    def is_end_token(self, token: int) -> bool:
        """Whether this token ends the completion."""
        return token in self._end_tokens

    def find(self, text: str, fresh: int) -> int | None:
        """Where the first stop text begins; None if none is there.

        Args:
            fresh: how many characters at the end were not there at the last call.
        """
        if not self.texts or not fresh:
            return None
        begin = max(0, len(text) - fresh - self._longest + 1)
        places = [place for stop in self.texts if (place := text.find(stop, begin)) >= 0]
        return min(places, default=None)

    def held_back(self, text: str) -> int:
        """How many characters at the end may yet turn out to begin a stop text."""
        longest = 0
        for stop in self.texts:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """All that a text is decoded without, also those that have no role, such as `<|eot_id|>` in a
    base model's tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {token.content: number for number, token in added if token.special}
    roles = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**marked, **dict(roles)}
