"""Options of `up` and `server` that are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tensafe.wire.status import TenSafeFault
from tensafe_server.api.pages import page
from tensafe_server.cli import server, up
from tensafe_server.operations.snapshots import RecoveryPolicy
from workers.cli import worker


@pytest.mark.parametrize("command", [up, server])
@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1", ":50051", "host:port", "a:-1"])
def test_an_address_that_is_none_is_refused(command, listen: str, tmp_path: Path):
    ran = CliRunner().invoke(command, ["--listen", listen, "--data", str(tmp_path / "d")])
    assert ran.exit_code == 2
    assert "HOST:PORT" in ran.output
    assert not (tmp_path / "d").exists()


def test_a_data_directory_that_cannot_be_one_is_refused_in_a_line(tmp_path: Path):
    (tmp_path / "file").touch()
    data = str(tmp_path / "file" / "data")
    ran = CliRunner().invoke(server, ["--listen", "127.0.0.1:0", "--data", data])
    assert ran.exit_code == 1
    assert "choose another with --data" in ran.output


@pytest.mark.parametrize("command", [up, server])
def test_the_recovery_policy_is_what_was_asked_for(command, tmp_path: Path, monkeypatch):
    asked = []

    async def serve(settings, *_) -> None:
        asked.append(getattr(settings, "coordinator", settings).recovery)

    monkeypatch.setattr("tensafe_server.cli.serve", serve)
    monkeypatch.setattr("tensafe_server.cli.serve_locally", serve)
    data = ["--data", str(tmp_path), *(["--backend", "mock"] if command is up else [])]
    options = "--snapshot-steps 3 --snapshot-mib 0.5 --snapshot-replay-s 2 --snapshots-kept 4"
    assert CliRunner().invoke(command, data).exit_code == 0
    given = [*data, *options.split(), "--result-retention-s", "60"]
    assert CliRunner().invoke(command, given).exit_code == 0
    assert asked == [RecoveryPolicy(), RecoveryPolicy(3, 2**19, 2.0, 4, 60.0)]
    policy = asked[1].message()
    assert (policy.steps, policy.payload_bytes, policy.replay_s) == (3, 2**19, 2.0)


def _workers_of(monkeypatch, *options: str) -> list[list[str]]:
    """How `tensafe up` would start its workers."""
    asked = []

    async def serve(local, *_) -> None:
        asked.append(local.worker_arguments)

    monkeypatch.setattr("tensafe_server.cli.serve_locally", serve)
    ran = CliRunner().invoke(up, list(options))
    assert ran.exit_code == 0, ran.output
    return asked[0]


GIVEN = {
    "--group-tokens": "7",
    "--threads": "1",
    "--pass-tokens": "512",
    "--run-memory-mib": "64.5",
    "--sample-memory-mib": "32.0",
    "--loss": "huber=ours:huber",
    "--compile": "off",
    "--cuda-graphs": "off",
    "--operation-limit-s": "9.0",
    "--token-limit-ms": "4.0",
}


def test_up_hands_its_workers_options_on(tmp_path: Path, monkeypatch):
    data = ("--data", str(tmp_path), "--device", "cpu", "--workers", "2")
    plain = _workers_of(monkeypatch, *data)
    pairs = [part for pair in GIVEN.items() for part in pair]
    given = _workers_of(monkeypatch, *data, *pairs, "--loss", "other")
    assert len(given) == 2
    for before, after in zip(plain, given, strict=True):
        assert after[: len(before)] == before
        added = after[len(before) :]
        assert {*zip(added[::2], added[1::2], strict=True)} == {*GIVEN.items(), ("--loss", "other")}
        worker.make_context("worker", ["--connect", "127.0.0.1:1", *after])  # it knows them all


def test_up_takes_the_values_that_a_worker_takes():
    ups, workers = (
        {
            option.opts[0]: tuple(option.type.choices)
            for option in command.params
            if isinstance(option.type, click.Choice)
        }
        for command in (up, worker)
    )
    for name in ("--compile", "--cuda-graphs"):
        assert ups[name] == workers[name]


def test_up_lacks_no_option_of_a_worker():
    """But those that it sets itself."""
    own = {"connect", "ca", "share", "name", "follow-stdin"}
    names = {part.removeprefix("--") for option in worker.params for part in option.opts}
    ups = {part.removeprefix("--") for option in up.params for part in option.opts}
    assert names - ups == own
    assert {f"--{name}" for name in names - own} >= GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_a_mock_takes_no_option_that_it_would_ignore(name: str, tmp_path: Path, monkeypatch):
    given = ["--backend", "mock", "--data", str(tmp_path), name, GIVEN[name]]
    if name in ("--group-tokens", "--threads", "--operation-limit-s", "--token-limit-ms"):
        assert _workers_of(monkeypatch, *given)[0][-2:] == [name, GIVEN[name]]
        return
    ran = CliRunner().invoke(up, given)
    assert ran.exit_code == 2
    assert f"leave {name} out" in ran.output


@pytest.mark.parametrize("token", ["p1.٣", "p1.-1", "p2.3", "x", "p1." + "9" * 20, f"p1.{2**63}"])
def test_a_page_token_of_another_make_is_refused(token: str):
    with pytest.raises(TenSafeFault) as raised:
        page(0, token)
    assert raised.value.detail.reason == "INVALID_PAGE_TOKEN"
