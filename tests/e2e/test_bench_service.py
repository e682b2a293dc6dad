"""The service's benchmark runs, and its ratios are those of what was measured."""

from __future__ import annotations

import json

import bench_service
import pytest

pytestmark = pytest.mark.slow


def record(monkeypatch, tmp_path, *options: str) -> dict:
    path = tmp_path / "record.json"
    own = ["bench_service.py", "--rounds", "1", *options, "--json", str(path)]
    monkeypatch.setattr("sys.argv", own)
    bench_service.main()
    return json.loads(path.read_text())


def test_eight_clients_against_one(monkeypatch, tmp_path):
    found = record(monkeypatch, tmp_path, "--part", "company", "--steps", "1")
    raw, ratios = found["raw"], found["ratios"]
    assert len(ratios) == 4
    for cell in ("8x16, each step awaited", "8x64, a step ahead"):
        one, every = raw[f"{cell}/one"], raw[f"{cell}/all"]
        assert len(one) == len(every) == 1
        assert ratios[f"{cell}: all/one"] == pytest.approx(8 * one[0] / every[0])


def test_an_operation_against_an_echo(monkeypatch, tmp_path):
    found = record(monkeypatch, tmp_path, "--part", "latency", "--operations", "60")
    raw = {name: cell for name, (cell,) in found["raw"].items()}
    assert found["ratios"] == pytest.approx(
        {
            "operation_p50/echo_p50": raw["operation_p50_s"] / raw["echo_p50_s"],
            "one_rpc_each/echo_rate": raw["one_rpc_each_rate"] / raw["echo_rate"],
            "futures/echo_rate": raw["futures_rate"] / raw["echo_rate"],
        }
    )
    assert raw["operation_p50_s"] > raw["echo_p50_s"]
