"""What adapters add to a layer's output and what their gradients are, several adapters at once.

Shapes: N tokens, K inputs, O outputs, r rank; of one segment n tokens, of all adapters R = Σ r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """One segment at one layer.

    Attributes:
        begin, end: its tokens.
        a, b: [r, K] and [O, r].
        scale: what their product is multiplied by: alpha / rank, over 1 − p under dropout.
        grad_a, grad_b: where gradients are added; None in a pass that trains nothing.
    """

    begin: int
    end: int
    a: Tensor
    b: Tensor
    scale: float
    grad_a: Tensor | None
    grad_b: Tensor | None

    def add_gradients(
        self, grad_low_t: Tensor, inputs: Tensor, slope_t: Tensor, low: Tensor
    ) -> None:
        """Adds scale·[r, n]·[n, K] and scale·[O, n]·[n, r]."""
        if self.grad_a is None or self.grad_b is None:
            return
        if self.grad_a.dtype == inputs.dtype:
            self.grad_a.addmm_(grad_low_t, inputs, alpha=self.scale)
            self.grad_b.addmm_(slope_t, low, alpha=self.scale)
        else:
            self.grad_a.add_(grad_low_t @ inputs, alpha=self.scale)
            self.grad_b.add_(slope_t @ low, alpha=self.scale)


class Product(Protocol):
    """One way to compute them. All tensors but a layer's outputs have the parts' type."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        """Adds to a layer's outputs, and returns what `backward` wants again.

        Args:
            inputs: [N, K], dropped out.
            outputs: [N, O], in the parts' type or a narrower one.
        """

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        """Adds to the parts' gradients; if wanted, returns what is added to the gradient of the
        dropped-out inputs [N, K].

        Args:
            grad: [N, O].
        """


class SegmentLoop:
    """One segment after another: the plain meaning, and the reference for the others."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        same = outputs.dtype == inputs.dtype
        added = outputs if same else tokens_like(inputs, parts, *outputs.shape)
        narrow = []
        for part in parts:
            low = inputs[part.begin : part.end] @ part.a.t()
            # With beta = 0 it writes whatever was there.
            added[part.begin : part.end].addmm_(low, part.b.t(), beta=int(same), alpha=part.scale)
            narrow.append(low)
        if not same:
            # Cast apart: adding another type in place is slower.
            outputs += added.to(outputs.dtype)
        return narrow

    def backward(
        self, inputs: Tensor, parts: list[Part], narrow: list[Tensor], grad: Tensor, wants: bool
    ) -> Tensor | None:
        grad_inputs = tokens_like(grad, parts, len(grad), inputs.shape[1]) if wants else None
        for part, low in zip(parts, narrow, strict=True):
            tokens = slice(part.begin, part.end)
            slope = grad[tokens]
            grad_low = slope @ part.b
            part.add_gradients(grad_low.t(), inputs[tokens], slope.t(), low)
            if grad_inputs is not None:
                grad_inputs[tokens].addmm_(grad_low, part.a, beta=0, alpha=part.scale)
        return grad_inputs


def tokens_like(like: Tensor, parts: Sequence[Part], count: int, width: int) -> Tensor:
    """[count, width] to be filled by the parts; zeros where none is."""
    covered = sum(min(part.end, count) - part.begin for part in parts)
    return (like.new_empty if covered == count else like.new_zeros)(count, width)
