"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.command_line import run_json, run_tensafe
from local_service import LocalService, local_service

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    found = [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
        if containing in text
    ]
    assert len(found) == 1, f"{len(found)} blocks contain {containing!r}"
    return found[0]


def test_buf_curl_by_reflection(service: LocalService, tmp_path: Path):
    buf = shutil.which("buf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert buf is not None, "buf is missing: make setup installs buf-bin"
    script = block("bash", "buf curl")
    script = re.sub(r"^export TENSAFE_API_KEY=.*$", "", script, flags=re.M)
    script = script.replace("127.0.0.1:50051", service.target.removeprefix("grpc://"))
    ran = subprocess.run(
        ["bash", "-euc", script],
        env={
            **os.environ,
            "TENSAFE_API_KEY": service.api_key,
            "PATH": f"{Path(buf).parent}{os.pathsep}{os.environ['PATH']}",
            "BUF_CACHE_DIR": str(tmp_path),
        },
        cwd=tmp_path,  # away from our protos: the schema must come by reflection
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert '"acceptsAnyReference": true' in ran.stdout


def test_the_readme_names_files_and_targets_that_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_example_is_short():
    lines = [line for line in block("python", "ServiceClient()").splitlines() if line.strip()]
    assert len(lines) <= 16


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_example_trains_a_real_model(tmp_path: Path):
    with local_service(backend="torch", models=["smollm2-135m"], directory=tmp_path) as service:
        ran = subprocess.run(
            [sys.executable, "-c", block("python", "ServiceClient()")],
            env=service.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        losses = [
            float(loss) for loss in re.findall(r"^step \d+: loss=([\d.]+)$", ran.stdout, re.M)
        ]
        assert len(losses) == 10
        assert sum(losses[-3:]) < sum(losses[:3])
        assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
        assert run_json(service, "models", "list")[0]["name"] == "smollm2-135m"
        chat = ["sample", "--model", "smollm2-135m", "--chat", "What is the capital of France?"]
        assert "Paris" in run_tensafe(service, *chat, "--temperature", "0").stdout
