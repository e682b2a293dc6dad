"""Private training from the command line: upload text, train, stop, resume, report."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from harness.command_line import run_json, run_tensafe, start_tensafe
from local_service import LocalService

from tensafe_client import ServiceClient
from tensafe_client.data import Datum
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.data.jsonl import read_jsonl

LINES = [
    *({"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(20)),
    *(
        {
            "messages": [
                {"role": "user", "content": f"double {n}"},
                {"role": "assistant", "content": f"{2 * n}"},
            ]
        }
        for n in range(20)
    ),
]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return written(tmp_path / "text.jsonl", LINES)


def upload(service: LocalService, path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = run_json(service, "datasets", "upload", str(path), *options)
    return found


def train(service: LocalService, *arguments: str) -> list[dict[str, Any]]:
    ran = run_tensafe(service, "train", "private", *arguments, "--json")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def row(datum: Datum) -> dict[str, Any]:
    return {
        "tokens": datum.tokens.tolist(),
        "target_tokens": datum.target_tokens.tolist(),
        "weights": datum.weights.tolist(),
    }


def test_text_and_its_tokens_are_one_dataset(
    tiny_service: LocalService, text: Path, tmp_path: Path
):
    """Its hash is of tokens, targets and weights, so that prompts are masked as in an SFT."""
    with ServiceClient(tiny_service.target, api_key=tiny_service.api_key) as client:
        tokenizer = ChatTokenizer(client.tokenizer_files("tiny"))
    datums = [tokenizer.datum(example) for example in read_jsonl(text)]
    assert all(0 < datum.weights.sum() < len(datum) for datum in datums)
    rows = written(tmp_path / "rows.jsonl", [row(datum) for datum in datums])
    found = upload(tiny_service, text, "--model", "tiny", "--name", "sums")
    assert found["examples"] == 40
    assert found["unit_ids"] is None
    assert upload(tiny_service, rows)["id"] == found["id"]


def test_trains_reports_stops_and_resumes(tiny_service: LocalService, text: Path):
    dataset = upload(tiny_service, text, "--model", "tiny")["id"]
    events = train(
        tiny_service,
        dataset,
        *("--model", "tiny", "--steps", "6", "--batch-size", "8", "--epsilon", "20"),
        *("--lr", "0.01", "--rank", "2", "--loss-noise-multiplier", "8"),
        *("--accountant", "rdp", "--max-grad-norm", "0.5", "--delta", "1e-4"),
    )
    assert [event["event"] for event in events] == ["start", *["step"] * 6, "saved"]
    start, *steps, saved = events
    assert start["sample_rate"] == pytest.approx(8 / 40)
    spent = [event["dp"]["total_epsilon"] for event in steps]
    assert spent == sorted(spent)
    assert 19 < spent[-1] <= 20
    assert {event["dp"]["delta"] for event in steps} == {1e-4}
    assert all(event["dp"]["noised_loss"] is not None for event in steps)
    assert run_json(tiny_service, "artifacts", "show", saved["artifact_id"])["step"] == 6
    report = run_json(tiny_service, "privacy", "report", start["run_id"])
    assert (report["steps"], report["steps_left"], report["sampling"]) == (6, 0, "server_poisson")
    assert (report["accountant"], report["max_grad_norm"]) == ("rdp", 0.5)
    # The dataset's ledger is spent, whoever asks.
    refused = run_tensafe(
        tiny_service,
        *("train", "private", dataset, "--model", "tiny", "--noise-multiplier", "5"),
        *("--epsilon", "20", "--delta", "1e-4", "--accountant", "rdp"),
        expect=7,
    )
    assert "DP_BUDGET_EXCEEDED" in refused.stderr
    assert "Saved art-" in refused.stdout


def test_an_interrupted_training_goes_on(tiny_service: LocalService, text: Path):
    dataset = upload(tiny_service, text, "--model", "tiny")["id"]
    process = start_tensafe(
        tiny_service,
        *("train", "private", dataset, "--model", "tiny", "--noise-multiplier", "2"),
        *("--steps", "60", "--json"),
    )
    assert process.stdout is not None
    start = json.loads(process.stdout.readline())
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert f"--resume {start['run_id']}" in told
    done = json.loads([first, *rest.splitlines()][-2])["step"]
    events = train(tiny_service, dataset, "--resume", start["run_id"])
    assert events[0]["step"] >= done
    assert [event["step"] for event in events[1:-1]] == list(range(events[0]["step"] + 1, 61))


def test_units_of_text(tiny_service: LocalService, tmp_path: Path):
    lines = [line | {"unit_id": f"person {n % 10}"} for n, line in enumerate(LINES)]
    path = written(tmp_path / "units.jsonl", lines)
    found = upload(tiny_service, path, "--model", "tiny")
    assert (found["examples"], found["unit_ids"]) == (40, 10)
    events = train(
        tiny_service,
        found["id"],
        *("--model", "tiny", "--steps", "1", "--batch-size", "2"),
        *("--noise-multiplier", "3", "--unit", "unit_id"),
    )
    assert events[0]["sample_rate"] == pytest.approx(2 / 10)
    some = written(tmp_path / "some.jsonl", [*lines[:3], LINES[3]])
    refused = run_tensafe(
        tiny_service, "datasets", "upload", str(some), "--model", "tiny", expect=6
    )
    assert "unit_id" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ("datasets upload TEXT", 2, "--model MODEL"),
        ("datasets upload ROWS --model tiny", 2, "tokens already"),
        ("datasets upload none.jsonl", 2, "none.jsonl"),
        ("train private ds-none --model tiny", 2, "--epsilon"),
        ("train private ds-none --epsilon 8", 2, "--model"),
        ("train private ds-none --model tiny --epsilon 8", 5, "DATASET_NOT_FOUND"),
    ],
)
def test_mistakes_are_named(
    tiny_service: LocalService, text: Path, tmp_path: Path, arguments: str, status: int, named: str
):
    rows = written(tmp_path / "rows.jsonl", [{"tokens": [1, 2], "target_tokens": [2, 3]}])
    given = arguments.replace("TEXT", str(text)).replace("ROWS", str(rows)).split()
    assert named in run_tensafe(tiny_service, *given, expect=status).stderr
