"""What a dataset's ledger is made of: lines, each a kind of release with a number of uses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from tensafe_server.privacy.mechanisms import Composition, Mechanism
from tensafe_server.store.charges import LedgerRow

Sampling = Literal["server_poisson", "client_attested"]
Unit = Literal["example", "unit_id"]


@dataclass(frozen=True, slots=True)
class Line:
    """Releases that are counted together.

    Steps that the server draws are alike whichever run makes them. Steps of a client's batches are
    counted run by run, since the bound on a unit's uses is the run's.

    Attributes:
        noise_multiplier: σ of all that a step releases.
        sample_rate: q; for a client's batches only attested, None where not even that.
        run_id: the run; empty for server_poisson.
        max_participation: steps that a unit may be in; None: any number.
        test_mode: the noise came from a seed that somebody knows.
        unit: whose contribution was bounded.
    """

    sampling: Sampling
    noise_multiplier: float
    sample_rate: float | None
    run_id: str = ""
    max_participation: int | None = None
    test_mode: bool = False
    unit: Unit = "example"

    def to_json(self) -> str:
        """One text for one line, as it stands in the ledger."""
        values = asdict(self)
        if self.unit == "example":  # as it was written before there was another
            del values["unit"]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Line:
        return cls(**json.loads(text))

    @property
    def is_drawn(self) -> bool:
        """Whether the server drew its batches."""
        return self.sampling == "server_poisson"

    @property
    def mechanism(self) -> Mechanism:
        """What a use is worth with no more assumed than was enforced."""
        if self.is_drawn:
            return Mechanism(self.noise_multiplier, self.sample_rate or 0.0)
        return Mechanism(self.noise_multiplier)

    def most_in_one_unit(self, uses: int) -> int:
        """In how many of so many steps a unit was at most."""
        return uses if self.max_participation is None else min(uses, self.max_participation)


Lines = Mapping[Line, int]
"""Uses of each line of a dataset's ledger."""


def uses_of_lines(rows: Iterable[LedgerRow]) -> dict[Line, int]:
    """Of a ledger's entries, in order."""
    newest = {row.line: row.uses for row in rows}
    return {Line.from_json(line): uses for line, uses in newest.items()}


def enforced(lines: Lines) -> Composition:
    """What a dataset's ledger is worth with no more assumed than was enforced."""
    total: Counter[Mechanism] = Counter()
    for line, uses in lines.items():
        total[line.mechanism] += line.most_in_one_unit(uses)
    return total


def all_drawn(lines: Lines) -> bool:
    """Whether the server drew the batches of all that counts."""
    return all(line.is_drawn for line, uses in lines.items() if uses)


def if_poisson(lines: Lines) -> Composition | None:
    """What it would be worth if every batch had been drawn by Poisson sampling at the attested
    rate; None where one was not attested."""
    total: Counter[Mechanism] = Counter()
    for line, uses in lines.items():
        if line.sample_rate is None:
            if uses:
                return None
            continue
        total[Mechanism(line.noise_multiplier, line.sample_rate)] += uses
    return total
