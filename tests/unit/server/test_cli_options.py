"""Options of `up` and `server` that are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tensafe.wire.status import TenSafeFault
from tensafe_server.api.pages import page
from tensafe_server.cli import server, up
from tensafe_server.operations.snapshots import RecoveryPolicy


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


@pytest.mark.parametrize("token", ["p1.٣", "p1.-1", "p2.3", "x", "p1." + "9" * 20])
def test_a_page_token_of_another_make_is_refused(token: str):
    with pytest.raises(TenSafeFault) as raised:
        page(0, token)
    assert raised.value.detail.reason == "INVALID_PAGE_TOKEN"
