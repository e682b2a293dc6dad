"""TLS over real processes: client, command line and worker, and what a mismatch is told."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from local_service import (
    LocalService,
    isolated_environment,
    local_service,
    tensafe_command,
)

from tensafe_client import ConfigError, ConnectionFailedError, ServiceClient, save_profile
from tensafe_client.connection import ClientConfig, resolve

BATCH = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}


@dataclass(frozen=True)
class Files:
    """Certificates of one authority, as PEM files."""

    ca: Path
    other_ca: Path
    cert: Path
    key: Path
    elsewhere: tuple[Path, Path]

    @property
    def options(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    stranger.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    for name, identity in (("here", "127.0.0.1"), ("elsewhere", "elsewhere.example")):
        made = authority.issue_cert(identity)
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        for blob in made.cert_chain_pems:
            blob.write_to_path(str(folder / f"{name}.pem"), append=True)
    return Files(
        folder / "ca.pem",
        folder / "other-ca.pem",
        folder / "here.pem",
        folder / "here.key",
        (folder / "elsewhere.pem", folder / "elsewhere.key"),
    )


@pytest.fixture(scope="module")
def service(files: Files) -> Iterator[LocalService]:
    with local_service(options=(*files.options, "--local-listen", "127.0.0.1:0")) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[LocalService]:
    with local_service() as running:
        yield running


def tensafe(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        tensafe_command(*arguments),
        env={**isolated_environment(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_training_over_tls(service: LocalService, files: Files) -> None:
    assert service.target.startswith("grpcs://127.0.0.1:")
    with ServiceClient(service.target, api_key=service.api_key, ca=files.ca) as client:
        assert client.target == service.target
        run = client.create_training_client({"model_ref": "any"})
        run.forward_backward(BATCH)
        assert run.optim_step().result(timeout=30).step == 1
        assert [step.step for step in run.metrics()] == [1]


def test_the_profile_of_up_needs_no_certificate(service: LocalService) -> None:
    listed = tensafe(service.directory, "runs", "list")
    assert listed.returncode == 0, listed.stderr


def test_the_command_line_over_tls(service: LocalService, files: Files, tmp_path: Path) -> None:
    at = ("--target", service.target)
    named = tensafe(
        tmp_path, *at, "--ca", str(files.ca), "runs", "list", TENSAFE_API_KEY=service.api_key
    )
    assert named.returncode == 0, named.stderr
    ambient = {"TENSAFE_API_KEY": service.admin_key, "TENSAFE_CA": str(files.ca)}
    saved = tensafe(
        tmp_path, *at, "admin", "keys", "create", "local", "--save-profile", "mine", **ambient
    )
    assert saved.returncode == 0, saved.stderr
    listed = tensafe(tmp_path, "--profile", "mine", "runs", "list")
    assert listed.returncode == 0, listed.stderr
    text = (tmp_path / "config.toml").read_text()
    assert f'target = "{service.target}"' in text
    assert f'ca = "{files.ca}"' in text


@pytest.mark.parametrize("trusts", ["nobody", "another"])
def test_an_authority_that_is_not_trusted(service: LocalService, files: Files, trusts: str) -> None:
    ca = files.other_ca if trusts == "another" else None
    with (
        ServiceClient(service.target, api_key="ts_x", ca=ca) as client,
        pytest.raises(ConnectionFailedError, match=r"certificate that is not accepted.*\n.*--ca"),
    ):
        client.runs()


def test_a_certificate_for_another_host(files: Files) -> None:
    cert, key = map(str, files.elsewhere)
    options = ("--tls-cert", cert, "--tls-key", key, "--local-listen", "127.0.0.1:0")
    with (
        local_service(options=options) as running,
        ServiceClient(running.target, api_key="ts_x", ca=files.ca) as client,
        pytest.raises(ConnectionFailedError, match=r"IP address mismatch.*\n.*host name"),
    ):
        client.runs()


def test_a_plain_client_meets_tls(service: LocalService) -> None:
    target = service.target.replace("grpcs://", "grpc://")
    with (
        ServiceClient(target, api_key="ts_x") as client,
        pytest.raises(ConnectionFailedError, match=rf"speaks TLS only\n.*{service.target}.*--ca"),
    ):
        client.runs()


def test_a_tls_client_meets_plain_text(plain: LocalService, files: Files) -> None:
    target = plain.target.replace("grpc://", "grpcs://")
    with (
        ServiceClient(target, api_key="ts_x", ca=files.ca) as client,
        pytest.raises(ConnectionFailedError, match=rf"does not speak TLS\n.*{plain.target}"),
    ):
        client.runs()


def test_a_worker_over_tls(files: Files, tmp_path: Path) -> None:
    """`tensafe server` and `tensafe worker`, as on two machines."""
    environment = isolated_environment(tmp_path)
    server = subprocess.Popen(
        tensafe_command(
            "server", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "d"), *files.options
        ),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers: list[subprocess.Popen[str]] = []
    try:
        assert server.stdout is not None
        assert server.stderr is not None
        target = server.stdout.readline().removeprefix("ready: ").strip()
        lines = iter(server.stderr.readline, "")
        secret = next(line for line in lines if "admin key" in line).split()[-1]
        with ServiceClient(target, api_key=secret, ca=files.ca) as admin:
            admin.admin.create_tenant("acme")
            key = admin.admin.create_key("acme").secret
            worker_key = admin.admin.create_key(kind="worker").secret
        workers.append(
            subprocess.Popen(
                tensafe_command(
                    *("worker", "--connect", target, "--ca", str(files.ca), "--backend", "mock")
                ),
                env={**environment, "TENSAFE_WORKER_KEY": worker_key},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        told = workers[0].stderr
        assert told is not None
        assert any(f"connected to {target}" in line for line in iter(told.readline, ""))
        with ServiceClient(target, api_key=key, ca=files.ca) as client:
            run = client.create_training_client({"model_ref": "any"})
            run.forward_backward(BATCH)
            assert run.optim_step().result(timeout=60).step == 1
    finally:
        for process in [*workers, server]:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize("case", ["plain meets TLS", "TLS meets plain", "not trusted"])
def test_a_worker_that_cannot_agree_ends_and_says_why(
    service: LocalService, plain: LocalService, files: Files, tmp_path: Path, case: str
) -> None:
    arguments, said = {
        "plain meets TLS": (
            ("--connect", service.target.replace("grpcs", "grpc")),
            f"speaks TLS only; use {service.target}",
        ),
        "TLS meets plain": (
            ("--connect", plain.target.replace("grpc", "grpcs"), "--ca", str(files.ca)),
            f"does not speak TLS; use {plain.target}",
        ),
        "not trusted": (
            ("--connect", service.target, "--ca", str(files.other_ca)),
            "certificate that is not accepted",
        ),
    }[case]
    ended = tensafe(tmp_path, "worker", "--backend", "mock", *arguments, TENSAFE_WORKER_KEY="ts_x")
    assert ended.returncode == 1
    assert said in ended.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tls-cert", "cert"), "belong together"),
        (("--tls-cert", "cert", "--tls-key", "other-key"), "cannot serve with"),
        (("--tls-cert", "missing", "--tls-key", "key"), "No such file"),
        (("--tls-cert", "ca-as-key", "--tls-key", "ca-as-key"), "cannot serve with"),
        (("--local-listen", "127.0.0.1:0"), "--tls-cert"),
        (("--local-listen", "0.0.0.0:0"), "loopback"),
    ],
)
def test_options_that_cannot_be_served_with(
    files: Files, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    places = {
        "cert": files.cert,
        "key": files.key,
        "other-key": files.elsewhere[1],
        "missing": tmp_path / "missing.pem",
        "ca-as-key": files.ca,
    }
    arguments = [str(places.get(option, option)) for option in options]
    ended = tensafe(tmp_path, "up", "--backend", "mock", "--data", str(tmp_path / "d"), *arguments)
    assert ended.returncode != 0
    assert said in re.sub(r"\s+", " ", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "d").exists()


def test_an_authority_that_would_have_no_effect_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca has no effect.*\n.*grpcs://a\.example:1"):
        resolve(ClientConfig("a.example:1", ca=files.ca))
    for bad in (tmp_path / "missing.pem", files.key):
        with pytest.raises(ConfigError, match=bad.name):
            resolve(ClientConfig("grpcs://a.example:1", ca=bad))
    ended = tensafe(
        tmp_path,
        *("worker", "--backend", "mock", "--connect", "a.example:1", "--ca", str(files.ca)),
        TENSAFE_WORKER_KEY="ts_x",
    )
    assert "--ca has no effect" in ended.stderr


def test_a_profile_keeps_its_authority_for_its_own_target(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSAFE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.delenv("TENSAFE_TARGET", raising=False)
    save_profile("mine", "grpcs://a.example:1", "ts_a", ca=os.path.relpath(files.ca))
    assert resolve(ClientConfig()).authorities == files.ca.read_bytes()
    assert resolve(ClientConfig("grpcs://b.example:1")).authorities is None
    plain = resolve(ClientConfig("grpc://a.example:1"))
    assert (plain.authorities, plain.api_key) == (None, None)
