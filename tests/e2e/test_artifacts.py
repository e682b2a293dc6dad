"""Artifacts as their tenant has them: kept, expired, deleted, sent back and forth."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from harness.command_line import run_json, run_tensafe
from harness.proxy import TcpProxy
from local_service import LocalService
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tensafe_client import (
    ArtifactExpiredError,
    ArtifactInUseError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    ChecksumMismatchError,
    ConfigError,
    Datum,
    InvalidArgumentError,
    ServiceClient,
    TrainingClient,
    UnknownTargetModuleError,
    UnsupportedOptionError,
)

FILE = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj"]
CONFIG = {
    "model_ref": "tiny",
    "seed": 4,
    "deterministic": True,
    "lora_config": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": TARGETS},
    "optimizer": {"learning_rate": 1e-2},
}


def batch(seed: int) -> list[Datum]:
    tokens = np.random.default_rng(seed).integers(3, 200, (2, 24))
    return [Datum(row[:-1], row[1:], weights=[1.0] * 23) for row in tokens]


def train(tc: TrainingClient, steps: range) -> list[float]:
    futures = [(tc.forward_backward(batch(step)), tc.optim_step()) for step in steps]
    return [passed.result(120).loss for passed, updated in futures if updated.result(120)]


@pytest.fixture
def client(new_tenant: Callable[[], ServiceClient]) -> ServiceClient:
    return new_tenant()


@pytest.fixture(scope="module")
def peft_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that plain `peft` has made and saved, B not zero, in bfloat16."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("made-elsewhere")
    model.save_pretrained(directory)
    return directory


def test_an_adapter_made_elsewhere_computes_what_plain_peft_computes_and_trains_on(
    client: ServiceClient, peft_folder: Path, tiny_model: Path, tmp_path: Path
):
    artifact = client.upload_artifact(peft_folder, "tiny", metadata={"from": "elsewhere"})
    assert (artifact.run_id, artifact.step, artifact.has_optimizer) == ("", 0, False)
    assert artifact.metadata == {"from": "elsewhere"}
    assert (artifact.adapter.rank, artifact.adapter.alpha) == (4, 16)
    assert artifact.adapter.target_modules == tuple(TARGETS)
    files = {file.name: file.sha256 for file in artifact.files}
    assert files == {
        name: hashlib.sha256((peft_folder / name).read_bytes()).hexdigest() for name in files
    }
    assert len(files) == 2

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, peft_folder).eval()
    tokens = torch.tensor([[5, 9, 77, 130, 14, 60, 61, 62]])
    with torch.no_grad():
        expected = torch.log_softmax(plain(tokens).logits, -1)
    expected = expected[0, :-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
    tc = client.create_training_client(from_artifact=artifact.id)
    assert (tc.config.lora_config.rank, tc.config.lora_config.alpha) == (4, 16)
    row = tokens[0].tolist()
    [logprobs] = tc.forward([Datum(row[:-1], row[1:], weights=[1.0] * 7)]).result(120).logprobs
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)

    losses = train(tc, range(6))
    assert losses[-1] != losses[0]
    assert tc.refresh().step == 6
    saved = client.download_artifact(tc.save_state().artifact_id, tmp_path / "saved")
    assert peft.PeftModel.from_pretrained(base, saved)
    sampled = client.sample([row], artifact=artifact.id, max_tokens=4, temperature=0)
    again = client.sample([row], artifact=artifact.id, max_tokens=4, temperature=0)
    assert list(sampled.samples[0].tokens) == list(again.samples[0].tokens)


def test_a_download_mixes_no_two_artifacts(client: ServiceClient, tmp_path: Path):
    run = client.create_training_client(CONFIG)
    train(run, range(1))
    whole = run.save_state().artifact_id
    run.forward_backward([Datum([5, 6], [6, 7])])
    in_a_window = run.save_state().artifact_id
    adapter_alone = run.save_state(include_optimizer=False).artifact_id
    client.download_artifact(whole, tmp_path)
    client.download_artifact(in_a_window, tmp_path)  # has all files that the other has
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for artifact_id in (whole, adapter_alone):
        with pytest.raises(ConfigError, match=r"accumulator\.safetensors of another artifact"):
            client.download_artifact(artifact_id, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_made_from_an_artifact_goes_on_to_the_same_bits(client: ServiceClient):
    whole = client.create_training_client(CONFIG)
    train(whole, range(3))
    saved = whole.save_state().artifact_id
    expected = train(whole, range(3, 6))
    exact = client.create_training_client(from_artifact=saved)
    assert exact.config == whole.config
    assert train(exact, range(3, 6)) == expected
    fresh = client.create_training_client(
        {"optimizer": {"name": "sgd", "learning_rate": 1e-3}},
        from_artifact=saved,
        include_optimizer=False,
    )
    assert fresh.refresh().step == 0
    assert train(fresh, range(3, 4))[0] == pytest.approx(expected[0], rel=0.05)
    assert train(fresh, range(4, 6)) != expected[1:]


def test_a_run_that_cannot_be_made_from_an_artifact_leaves_none(client: ServiceClient):
    saved = train_and_save(client)
    runs = len(client.runs())
    with pytest.raises(ArtifactMismatchError, match="rank"):
        client.create_training_client({"lora_config": {"rank": 8}}, from_artifact=saved)
    with pytest.raises(ArtifactNotFoundError):
        client.create_training_client(from_artifact="art-none")
    with pytest.raises(ConfigError, match="from_artifact"):
        client.create_training_client(CONFIG, include_optimizer=True)
    with pytest.raises(ConfigError, match="from_artifact"):
        client.create_training_client()
    assert len(client.runs()) == runs


def train_and_save(client: ServiceClient, **options) -> str:
    tc = client.create_training_client(CONFIG)
    train(tc, range(1))
    return tc.save_state(**options).artifact_id


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "rank": (lambda f: change_config(f, r=0), "adapter_config.json:r"),
    "other rank": (lambda f: change_config(f, r=8), "is not of rank 8"),
    "alpha": (lambda f: change_config(f, lora_alpha="16"), "lora_alpha"),
    "dropout": (lambda f: change_config(f, lora_dropout=1.5), "lora_dropout"),
    "pattern": (lambda f: change_config(f, target_modules=".*q_proj"), "write a pattern out"),
    "fewer targets": (lambda f: change_config(f, target_modules=["q_proj"]), "target_modules"),
    "no safetensors": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 100),
        "not a safetensors file",
    ),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        "longer or shorter than its header says",
    ),
    "missing half": (lambda f: change_weights(f, lambda t: t.pop(FIRST)), "only one of lora_A"),
    "missing module": (
        lambda f: change_weights(
            f,
            lambda t: [t.pop(name) for name in list(t) if "layers.0.self_attn.q_" in name],
        ),
        "is adapted 1 times, but tiny has 2",
    ),
    "other name": (
        lambda f: change_weights(f, lambda t: t.update(extra=np.zeros((2, 2), np.float32))),
        "is not a LoRA weight",
    ),
    "NaN": (
        lambda f: change_weights(f, lambda t: t[FIRST].__setitem__((0, 0), np.nan)),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sound_adapter_is_refused_and_named(
    case: str, client: ServiceClient, peft_folder: Path, tmp_path: Path
):
    change, says = REFUSED[case]
    folder = shutil.copytree(peft_folder, tmp_path / "bad")
    change(folder)
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        client.upload_artifact(folder, "tiny")
    assert caught.value.violations
    assert client.artifacts() == []


def test_adapters_that_runs_cannot_have_are_refused(
    client: ServiceClient, peft_folder: Path, tmp_path: Path
):
    for number, (changes, error) in enumerate(
        [
            ({"use_dora": True}, UnsupportedOptionError),
            ({"use_rslora": True}, UnsupportedOptionError),
            ({"rank_pattern": {"q_proj": 8}}, UnsupportedOptionError),
            ({"peft_type": "IA3"}, UnsupportedOptionError),
            ({"bias": "all"}, UnsupportedOptionError),
            ({"target_modules": ["q_proj", "nowhere"]}, UnknownTargetModuleError),
        ]
    ):
        folder = shutil.copytree(peft_folder, tmp_path / str(number))
        change_config(folder, **changes)
        with pytest.raises(error):
            client.upload_artifact(folder, "tiny")
    with pytest.raises(InvalidArgumentError, match="can be read"):
        client.upload_artifact(tmp_path / "none", "tiny")


def test_transfers_go_on_after_breaks(
    tiny_service: LocalService, new_key: Callable[[], str], peft_folder: Path, tmp_path: Path
):
    folder = shutil.copytree(peft_folder, tmp_path / "big")
    # Types of 8 bytes, and a long header, make it larger; what it means is the same.
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, metadata={"note": "x" * 24_000_000})
    proxy = TcpProxy(int(tiny_service.target.rpartition(":")[2]))
    with ServiceClient(f"127.0.0.1:{proxy.port}", api_key=new_key()) as client:
        client.models()
        breaks = Breaks(proxy, 6)
        artifact = client.upload_artifact(folder, "tiny")
        assert breaks.made == 6, "it was broken on its way"
        breaks = Breaks(proxy, 6)
        saved = client.download_artifact(artifact.id, tmp_path / "saved")
        assert breaks.made == 6
    assert (saved / FILE).read_bytes() == (folder / FILE).read_bytes()
    proxy.close()


class Breaks:
    """Breaks a proxy's connections each time that so many more bytes have gone through."""

    def __init__(self, proxy: TcpProxy, most: int) -> None:
        self.made = 0
        self._most = most
        proxy.cut_every(3 * 2**20, self._count)

    def _count(self) -> bool:
        self.made += self.made < self._most
        return self.made < self._most


def test_a_damaged_file_is_refused_and_named(
    tiny_service: LocalService, client: ServiceClient, peft_folder: Path, tmp_path: Path
):
    artifact = client.upload_artifact(peft_folder, "tiny")
    stored = tiny_service.directory / "data" / "blobs" / "artifacts" / artifact.id / FILE
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ChecksumMismatchError, match=FILE) as caught:
        client.download_artifact(artifact.id, tmp_path / "saved")
    assert caught.value.metadata["file"] == FILE
    assert not (tmp_path / "saved" / FILE).exists()


def test_deleted_is_gone_and_needed_is_kept(tiny_service: LocalService, client: ServiceClient):
    tc = client.create_training_client(CONFIG)
    train(tc, range(1))
    first = tc.save_state().artifact_id
    with pytest.raises(ArtifactInUseError, match="recovery begins at it"):
        client.delete_artifact(first)
    second = tc.save_state().artifact_id
    client.delete_artifact(first)
    client.delete_artifact(first)
    for use in (
        lambda: client.artifact(first),
        lambda: tc.load_state(first),
        lambda: client.sample(["a"], artifact=first),
        lambda: client.create_training_client(from_artifact=first),
    ):
        with pytest.raises(ArtifactExpiredError, match="was deleted"):
            use()
    assert [artifact.id for artifact in client.artifacts()] == [second]
    files = tiny_service.directory / "data" / "blobs" / "artifacts"
    assert not (files / first).exists()
    assert (files / second).exists()
    with pytest.raises(ArtifactNotFoundError):
        client.delete_artifact("art-none")

    # What a replay would load again is needed too.
    other = client.create_training_client(from_artifact=second)
    train(tc, range(1))
    tc.save_state()
    with pytest.raises(ArtifactInUseError, match="may load it again"):
        client.delete_artifact(second)
    other.delete()
    client.delete_artifact(second)


def test_a_foreign_artifact_cannot_be_deleted(new_tenant: Callable[[], ServiceClient]):
    mine, theirs = new_tenant(), new_tenant()
    artifact = train_and_save(theirs, include_optimizer=False)
    with pytest.raises(ArtifactNotFoundError):
        mine.delete_artifact(artifact)
    assert theirs.artifact(artifact)


def test_a_time_to_live_ends(tiny_service: LocalService, client: ServiceClient):
    tc = client.create_training_client(CONFIG)
    train(tc, range(1))
    base = tc.save_state(ttl_s=1)
    passing = tc.save_state(include_optimizer=False, ttl_s=1)
    kept = tc.save_state(include_optimizer=False, ttl_s=3600)
    assert passing.expires_at is not None
    assert (passing.expires_at - passing.created_at).total_seconds() == pytest.approx(1)
    while passing.artifact_id in {artifact.id for artifact in client.artifacts()}:
        assert client.artifact(kept.artifact_id).expires_at
    with pytest.raises(ArtifactExpiredError, match="time to live is over"):
        client.artifact(passing.artifact_id)
    files = tiny_service.directory / "data" / "blobs" / "artifacts"
    while (files / passing.artifact_id).exists():
        assert client.models()  # it is being removed
    # The base has expired for its tenant, and is there for the run's recovery.
    with pytest.raises(ArtifactExpiredError):
        client.artifact(base.artifact_id)
    assert (files / base.artifact_id).exists()
    tc.save_state()
    while (files / base.artifact_id).exists():
        assert client.models()
    for wrong in (0, 0.5, -1, float("nan"), 1e12):
        with pytest.raises(InvalidArgumentError, match="ttl_s"):
            tc.save_state(ttl_s=wrong)


def test_the_command_line_uploads_and_deletes(
    tiny_service: LocalService, peft_folder: Path, tmp_path: Path
):
    arguments = ["artifacts", "upload", str(peft_folder), "--model", "tiny"]
    uploaded = run_json(tiny_service, *arguments, "--metadata", '{"a": 1}', "--ttl", "1h")
    again = run_json(tiny_service, *arguments, "--metadata", '{"a": 1}', "--ttl", "1h")
    assert again["id"] == uploaded["id"], "the same upload is the same artifact"
    assert uploaded["metadata"] == {"a": 1}
    assert uploaded["expires_at"]
    listed = run_tensafe(tiny_service, "artifacts", "list").stdout
    assert uploaded["id"] in listed
    assert "EXPIRES" in listed
    run_tensafe(tiny_service, "artifacts", "download", uploaded["id"], str(tmp_path / "got"))
    assert (tmp_path / "got" / FILE).read_bytes() == (peft_folder / FILE).read_bytes()
    run_tensafe(tiny_service, "artifacts", "delete", uploaded["id"])
    shown = run_tensafe(tiny_service, "artifacts", "show", uploaded["id"], expect=5)
    assert "was deleted" in shown.stderr
    once_more = run_json(tiny_service, *arguments, "--metadata", '{"a": 1}', "--ttl", "1h")
    assert once_more["id"] != uploaded["id"], "a deleted one is uploaded anew"
    run_tensafe(tiny_service, *arguments, "--ttl", "soon", expect=2)
    run_tensafe(tiny_service, *arguments, "--metadata", "[1]", expect=2)
