"""docs/baseline_sft.md is true: its samples run, its tables and output are those of the code."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from baseline_sft_smoke import GOLDEN, GOLDEN_SEED, Measured, goldens, smoke
from local_service import LocalService

from tensafe_client import LoRAConfig, OptimizerConfig, ServiceClient, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/baseline_sft.md").read_text()
SAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.+?) \| .+ \|$", re.M)


OUTPUT = re.search(r"### Expected Output\n\n```\n(.*?)```", PAGE, re.S)
PROMISED = "1b8e40bf54fa355376860af699fb311b139bccb10578c1a26d83c7eadb7e5994"
"""SHA-256 of the samples and the expected output as they were before there was any code."""


@pytest.fixture(scope="module")
def client(service: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(service.target, api_key=service.api_key) as opened:
        yield opened


@pytest.fixture(scope="module")
def measured(client: ServiceClient) -> Measured:
    return smoke(client, seed=GOLDEN_SEED, say=lambda _: None)


@pytest.mark.parametrize("name", ["baseline_sft_metrics.json", "baseline_loss_curve.json"])
def test_golden(measured: Measured, name: str):
    assert goldens(measured)[name] == json.loads((GOLDEN / name).read_text())


def test_the_same_seed_gives_the_same_run(client: ServiceClient, measured: Measured):
    assert smoke(client, seed=GOLDEN_SEED, say=lambda _: None) == measured


def test_runs_without_a_seed_differ(client: ServiceClient):
    first, second = (smoke(client, seed=None, say=lambda _: None) for _ in range(2))
    assert first.losses == second.losses
    assert first.grad_norms != second.grad_norms


def test_the_script_prints_the_expected_output():
    ran = subprocess.run(
        [sys.executable, "scripts/baseline_sft_smoke.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert OUTPUT is not None
    pattern = re.escape(OUTPUT[1].strip())
    pattern = pattern.replace("1\\.5xx", r"1\.5\d\d").replace("art\\-xxx", r"art\-\S+")
    pattern = pattern.replace(re.escape("...\n"), "(?P<between>.*?\n)", 1)
    matched = re.fullmatch(pattern, ran.stdout.strip(), re.S)
    assert matched is not None, ran.stdout
    between = matched["between"].splitlines()
    expected = [
        rf"\[Step {k}/20\] loss={2.5 - 0.01 * k:.3f}, grad_norm=1\.5\d\d" for k in range(3, 20)
    ]
    assert len(between) == len(expected)
    for line, wanted in zip(between, expected, strict=True):
        assert re.fullmatch(wanted, line), line


def test_samples_and_output_are_as_promised():
    assert OUTPUT is not None
    assert hashlib.sha256("".join([*SAMPLES, OUTPUT[1]]).encode()).hexdigest() == PROMISED


def test_every_sample_runs_as_written(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TENSAFE_CONFIG", str(service.directory / "config.toml"))
    monkeypatch.delenv("TENSAFE_TARGET", raising=False)
    monkeypatch.delenv("TENSAFE_API_KEY", raising=False)
    ids = [[1, 2, 3, 4, 5]] * 8
    reader: dict[str, Any] = {
        "config": {"target": service.target, "api_key": service.api_key},
        "dataloader": [{"input_ids": ids, "labels": ids}] * 3,
    }
    *service_samples, reproducibility = SAMPLES
    assert len(service_samples) == 4
    for sample in service_samples:
        exec(compile(sample, "docs/baseline_sft.md", "exec"), reader)
    reader["client"].close()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["Step 1: loss=2.4900", "Step 2: loss=2.4800", "Step 3: loss=2.4700"]
    assert re.fullmatch(r"Saved: art-\S+", printed[3])
    assert printed[4:] == ["Loaded step: 3", " [Mock completion for step 3]"]
    # It changes torch for the whole process, so it gets one of its own.
    subprocess.run([sys.executable, "-c", reproducibility], check=True, timeout=120)


@pytest.mark.parametrize("config", [TrainingConfig, LoRAConfig, OptimizerConfig])
def test_every_table_shows_the_defaults(config: type[Any]):
    section = PAGE.split(f"### {config.__name__}\n")[1].split("\n#")[0]
    rows = ROW.findall(section)
    assert [name for name, *_ in rows] == [field.name for field in fields(config)]
    for field, (_, kind, default) in zip(fields(config), rows, strict=True):
        assert kind in str(field.type)
        if default == "required":
            assert field.default is MISSING
            assert field.default_factory is MISSING
            continue
        made = field.default_factory() if field.default is MISSING else field.default
        if default == "AdamW":
            assert made == OptimizerConfig()
            assert made.name == "adamw"
        else:
            assert made == ast.literal_eval(default)


def test_the_page_names_files_that_exist():
    named = set(re.findall(r"(?:scripts|tests)/[\w/.]+\.(?:py|sh|json)", PAGE))
    assert len(named) >= 5
    assert not [path for path in named if not (ROOT / path).is_file()]
