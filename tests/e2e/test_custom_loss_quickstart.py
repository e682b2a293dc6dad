"""docs/custom_loss_quickstart.md is true: its samples run in order, with its plug-in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from local_service import local_service

from workers.losses import LossRegistry

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/custom_loss_quickstart.md").read_text()
SAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
FILES = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S))


def test_every_sample_runs_as_written(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (option,) = re.findall(r"tensafe up .* --loss (\S+)", PAGE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with local_service(
        backend="torch",
        models=[f"tiny={tiny_model}"],
        options=["--dtype", "float32", "--loss", option],
        environment={"PYTHONPATH": path},
        directory=tmp_path / "service",
    ) as service:
        monkeypatch.setenv("TENSAFE_TARGET", service.target)
        monkeypatch.setenv("TENSAFE_API_KEY", service.api_key)
        reader: dict[str, Any] = {"MODEL": "tiny"}
        for sample in SAMPLES:
            exec(compile(sample, "docs/custom_loss_quickstart.md", "exec"), reader)
        reader["client"].close()
    printed = capsys.readouterr().out
    assert len(SAMPLES) == 11
    for pattern in (
        r"^ppo \['target_tokens', 'weights', 'logprobs', 'advantages'\] \{'clip_low': 0.8",
        r"^huber \['target_tokens', 'weights', 'wanted'\] \{'delta': 1.0\}",
        r"^step 1: loss=5\.\d",
        r"^soft: 5\.\d",
        r"^\{'ratio_max': 1\.\d+, 'clip_fraction': 0\.0, 'entropy': 5\.\d+, 'kl': 0\.\d+\}",
        r"^\[\(12,\), \(12,\), \(12,\), \(12,\)\]",
        r"^margin \d\.\d+, accuracy 1\.00",
        r"^True\nfocal \d+\.\d+, hardest \d\.\d+",
        r"^squared \d+\.\d+",
        r"^ZeroDivisionError\nTrue",
        r"^huber \d\.\d+, distance \d\.\d+",
    ):
        assert re.search(pattern, printed, re.M), f"{pattern} in\n{printed}"


def test_the_table_names_every_loss_with_its_options_and_defaults() -> None:
    cards = {card.name: card for card in LossRegistry().cards()}
    table = PAGE.split("| `loss_fn` |")[1].split("\n\n")[0]
    rows = {cells[1].strip("` "): cells[-2] for cells in map(_cells, table.splitlines()[2:])}
    assert rows.keys() == cards.keys()
    for name, shown in rows.items():
        own = [o for o in cards[name].options if o.name not in ("entropy_coef", "kl_coef")]
        defaults = re.findall(r"`(\w+)`(?: `?([\w.]+)`?)?", shown)
        assert [option for option, _ in defaults] == [option.name for option in own]
        for option, (_, default) in zip(own, defaults, strict=True):
            if isinstance(option.default, str):
                assert default == option.default
            elif option.default is not None:
                assert float(default) == pytest.approx(option.default)


def _cells(line: str) -> list[str]:
    return line.split("|")
