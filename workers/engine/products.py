"""What adapters add to a layer's output and what their gradients are, several adapters at once.

Shapes: N tokens, K inputs, O outputs, r rank; of one segment n tokens, of all adapters R = Σ r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from workers.engine.dropout import masked


@dataclass(frozen=True, slots=True)
class Part:
    """One segment at one layer.

    Attributes:
        begin, end: its tokens.
        a, b: [r, K] and [O, r], in the activations' type.
        scale: alpha / rank, over 1 − p under dropout.
        grad_a, grad_b: where gradients are added; None in a pass that trains nothing.
    """

    begin: int
    end: int
    a: Tensor
    b: Tensor
    scale: float
    grad_a: Tensor | None
    grad_b: Tensor | None


class Product(Protocol):
    """One way to compute them."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        """Adds to `outputs` [N, O] and returns the narrow products that `backward` wants.

        Args:
            inputs: [N, K], dropped out.
        """

    def backward(
        self,
        inputs: Tensor,
        parts: list[Part],
        narrow: list[Tensor],
        grad: Tensor,
        grad_inputs: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Adds to the parts' gradients and, if wanted, to `grad_inputs` [N, K].

        Args:
            grad: [N, O].
            mask: int16 [N, K], the bits that dropout kept.
        """


class SegmentLoop:
    """One segment after another: the plain meaning, and the fastest for few or long segments."""

    def forward(self, inputs: Tensor, parts: list[Part], outputs: Tensor) -> list[Tensor]:
        narrow = []
        for part in parts:
            low = inputs[part.begin : part.end] @ part.a.t()
            outputs[part.begin : part.end].addmm_(low, part.b.t(), alpha=part.scale)
            narrow.append(low)
        return narrow

    def backward(
        self,
        inputs: Tensor,
        parts: list[Part],
        narrow: list[Tensor],
        grad: Tensor,
        grad_inputs: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        for part, low in zip(parts, narrow, strict=True):
            tokens = slice(part.begin, part.end)
            slope = grad[tokens]
            grad_low = (slope @ part.b).mul_(part.scale)
            if part.grad_a is not None and part.grad_b is not None:
                part.grad_a.add_(grad_low.t() @ inputs[tokens])
                part.grad_b.add_(slope.t() @ low, alpha=part.scale)
            if grad_inputs is None:
                continue
            if mask is None:
                grad_inputs[tokens].addmm_(grad_low, part.a)
            else:
                grad_inputs[tokens].add_(masked(grad_low @ part.a, mask[tokens]))
