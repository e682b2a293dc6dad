"""`tensafe up` as a process: how it ends, what it refuses, which keys it tells."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from harness.command_line import run_json, run_tensafe
from harness.processes import worker_pids
from local_service import (
    LocalService,
    LocalServiceError,
    isolated_environment,
    local_service,
    tensafe_command,
)

from tensafe_client import ServiceClient

READY = re.compile(r"ready: (grpc://\S+)\n")
TOLD = re.compile(r"admin key, shown only now: (ts_\S+)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_up_ends_with_0_on_a_signal(tmp_path: Path, number: signal.Signals):
    with local_service(directory=tmp_path) as service:
        run_tensafe(service, "runs", "list")
        assert "fork" not in service.log
        service.process.send_signal(number)
        assert service.process.wait(30) == 0
        assert service.process.stdout is not None
        assert service.process.stdout.read() == "", "it prints one line only"


def test_up_says_that_the_port_is_taken(service: LocalService, tmp_path: Path):
    taken = service.target.removeprefix("grpc://")
    with pytest.raises(LocalServiceError, match=re.escape(f"cannot listen on {taken}")) as caught:
        _start_on(taken, tmp_path)
    assert "Traceback" not in str(caught.value)


def _start_on(listen: str, directory: Path) -> None:
    with local_service(directory=directory, options=["--listen", listen]):
        pass


def own_address() -> str | None:
    """An address of this machine that is not loopback; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        found = str(probe.getsockname()[0])
    return None if found.startswith("127.") else found


@pytest.mark.parametrize("host", ["[::1]", "localhost", "0.0.0.0", "[::]", "an address"])
def test_up_is_found_wherever_it_listens(tmp_path: Path, host: str):
    """By its workers, which dial in before it is ready, and by its profile."""
    if host == "an address":
        host = own_address() or pytest.skip("this machine has no address but loopback")
    if "::" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    options = ["--listen", f"{host}:0"]
    with local_service(directory=tmp_path, options=options, ready_timeout_s=60) as service:
        assert service.target.startswith(f"grpc://{host}:")
        assert run_json(service, "models", "list")[0]["name"] == "mock"
        target = run_json(service, "profiles", "list")[0]["target"]
        assert "0.0.0.0" not in target
        assert "[::]" not in target


def test_a_start_leaves_no_key_of_its_workers_and_ends_none_of_the_operators(tmp_path: Path):
    made = ["admin", "keys", "create", "--kind", "worker", "--name", "local workers"]
    for start in (1, 2):
        with local_service(directory=tmp_path) as service:
            assert run_json(service, "models", "list"), "its own worker serves"
            if start == 1:
                run_json(service, *made)
            keys = run_json(service, "admin", "keys", "list")
            of_workers = [key for key in keys if key["kind"] == "worker"]
            assert [(key["name"], key["revoked_at"]) for key in of_workers] == [
                ("local workers", None)
            ]


def test_what_tenants_store_is_the_owners_alone_in_a_directory_for_all(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    with local_service(directory=tmp_path):
        open_to_others = [path for path in data.rglob("*") if path.stat().st_mode & 0o077]
        assert {path.name for path in open_to_others} == {"lock"}, "which is empty"


def test_a_terminals_ctrl_c_reaches_the_workers_through_up_alone(tmp_path: Path):
    """A terminal signals its whole foreground group: a worker in it would end before its turn."""
    with local_service(directory=tmp_path, workers=2) as service:
        group = os.getpgid(service.process.pid)
        workers = worker_pids(service)
        assert len(workers) == 2
        assert group not in {os.getpgid(pid) for pid in workers}
        os.killpg(group, signal.SIGINT)
        assert service.process.wait(30) == 0
        assert "Traceback" not in service.log


def admin_keys_told(home: Path) -> list[str]:
    """Starts `tensafe up --no-profile` and ends it; each key that it told was tried."""
    command = ["up", "--backend", "mock", "--listen", "127.0.0.1:0", "--data", str(home / "data")]
    log = home / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            tensafe_command(*command, "--no-profile"),
            env=isolated_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        ready = READY.fullmatch(process.stdout.readline())
        assert ready, log.read_text()
        told = TOLD.findall(log.read_text())
        for key in told:
            with ServiceClient(ready[1], api_key=key) as operator:
                assert operator.admin.tenants() == []
        process.terminate()
        assert process.wait(30) == 0
    return told


def test_without_a_profile_an_admin_key_is_told_once(tmp_path: Path):
    assert len(admin_keys_told(tmp_path)) == 1
    assert not (tmp_path / "config.toml").exists()
    assert admin_keys_told(tmp_path) == []


@pytest.mark.parametrize("options", [["--device", "cuda:0"], ["--dtype", "float32"]])
def test_the_mock_takes_no_device(tmp_path: Path, options: list[str]):
    with (
        pytest.raises(LocalServiceError, match="the mock backend computes nothing"),
        local_service(directory=tmp_path, options=options),
    ):
        pass


def test_a_profile_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path):
    nowhere = {"TENSAFE_CONFIG": "/proc/no-such-directory/config.toml"}
    with (
        pytest.raises(LocalServiceError, match="cannot be written") as caught,
        local_service(directory=tmp_path, environment=nowhere),
    ):
        pass
    assert "--no-profile" in str(caught.value)


def test_a_directory_that_cannot_be_written_keeps_the_artifact(
    service: LocalService, tmp_path: Path
):
    with ServiceClient(service.target, api_key=service.api_key) as client:
        saved = client.create_training_client({"model_ref": "any"}).save_state().artifact_id
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "adapter")
    refused = run_tensafe(service, "artifacts", "download", saved, inside, expect=6)
    assert inside in refused.stderr
    assert "choose a directory" in refused.stderr
    run_tensafe(service, "artifacts", "download", saved, str(tmp_path / "adapter"))
    assert (tmp_path / "adapter").is_dir()


def test_profiles_use_changes_the_default(tmp_path: Path):
    with local_service(directory=tmp_path) as service:
        used = run_json(service, "profiles", "use", "local-admin")
        assert used == {"name": "local-admin", "target": service.target, "default": True}
        chosen = {one["name"] for one in run_json(service, "profiles", "list") if one["default"]}
        assert chosen == {"local-admin"}
