"""Configuration: presence, dicts, errors that name the field."""

from __future__ import annotations

import copy
import stat
from pathlib import Path
from typing import Any

import pytest

from tensafe.wire.tls import Address
from tensafe_client import (
    ClientConfig,
    ConfigError,
    DPConfig,
    InvalidArgumentError,
    LoRAConfig,
    OptimizerConfig,
    ServiceClient,
    TrainingConfig,
    read_profiles,
    save_profile,
)
from tensafe_client.connection import parse_target, resolve


def test_unset_stays_unset() -> None:
    message = TrainingConfig("m").to_proto()
    assert [field.name for field, _ in message.ListFields()] == ["model_ref"]


def test_zero_is_not_unset() -> None:
    message = TrainingConfig("m", lora_config=LoRAConfig(dropout=0), seed=0).to_proto()
    assert message.lora.HasField("dropout")
    assert message.lora.dropout == 0
    assert message.HasField("seed")
    assert not message.lora.HasField("rank")


def test_betas_that_the_user_set_reach_the_server_and_default_ones_do_not() -> None:
    plain = OptimizerConfig(name="sgd", momentum=0.9).to_proto()
    assert not plain.HasField("beta1")
    assert not plain.HasField("eps")
    given = OptimizerConfig(name="sgd", betas=(0.9, 0.999)).to_proto()
    assert (given.beta1, given.beta2) == (0.9, 0.999)


def test_none_is_unset() -> None:
    config = OptimizerConfig(betas=None, eps=None)  # type: ignore[arg-type]
    assert not config.to_proto().ListFields()
    nested = TrainingConfig.of({"model_ref": "m", "optimizer": {"betas": None}}).to_proto()
    assert not nested.optimizer.ListFields()


def test_profiles_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        monkeypatch.setenv("TENSAFE_CONFIG", str(path))
        with pytest.raises(ConfigError, match="TENSAFE_CONFIG") as caught:
            read_profiles()
        assert str(path) in str(caught.value)


def test_replace_and_copies_keep_presence() -> None:
    config = OptimizerConfig(name="sgd").replace(learning_rate=0.1)
    for made in (config, copy.copy(config), copy.deepcopy(config)):
        message = made.to_proto()
        assert (message.name, message.learning_rate) == ("sgd", 0.1)
        assert not message.HasField("beta1")


def test_nested_dicts_and_back() -> None:
    values: dict[str, Any] = {
        "model_ref": "meta-llama/Llama-3-8B",
        "lora_config": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": ["q_proj"]},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "betas": [0.8, 0.9]},
        "batch_size": 8,
    }
    config = TrainingConfig.of(values)
    assert config.optimizer.betas == (0.8, 0.9)
    assert TrainingConfig.from_proto(config.to_proto()) == config
    assert config.to_proto().lora.target_modules == ["q_proj"]


def test_dp_without_enabled_means_enabled() -> None:
    assert DPConfig(noise_multiplier=1.0).to_proto().enabled
    assert not DPConfig(enabled=False).to_proto().enabled


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_ref": "m", "lora_confg": {}}, ["lora_confg", "lora_config"]),
        ({"model_ref": "m", "lora_config": {"rnk": 4}}, ["lora_config.rnk", "'rank'"]),
        ({"model_ref": "m", "optimizer": {"lr": 4}}, ["optimizer.lr", "learning_rate"]),
        ({"model_ref": "m", "optimizer": {"learning_rate": "1e-4"}}, ["learning_rate", "number"]),
        ({"model_ref": "m", "optimizer": {"betas": 0.9}}, ["betas"]),
        ({"model_ref": "m", "lora_config": {"rank": 1.5}}, ["rank", "integer"]),
        ({"model_ref": "m", "lora_config": {"rank": True}}, ["rank"]),
        ({"model_ref": "m", "lora_config": {"rank": -1}}, ["rank"]),
        ({"model_ref": "m", "lora_config": {"target_modules": "q_proj"}}, ["target_modules"]),
        ({"model_ref": "m", "lora_config": {"target_modules": []}}, ["target_modules"]),
        ({"model_ref": "m", "lora_config": 16}, ["lora_config"]),
        ({"model_ref": 3}, ["model_ref"]),
        ({"batch_size": 8}, ["model_ref"]),
    ],
)
def test_errors_name_the_field(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.of(values)
    assert all(name in str(caught.value) for name in named), str(caught.value)
    assert isinstance(caught.value, InvalidArgumentError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("target", ["127.0.0.1:50051", "grpc://127.0.0.1:50051/"])
def test_targets(target: str) -> None:
    assert parse_target(target) == Address("127.0.0.1", 50051)
    assert parse_target("[::1]:1").host_port == "[::1]:1"
    assert parse_target("grpcs://a.example:1") == Address("a.example", 1, secure=True)


@pytest.mark.parametrize("target", ["localhost", "http://a:1", "a:0", "a:99999", "a b:1", ""])
def test_bad_targets(target: str) -> None:
    with pytest.raises(ConfigError):
        parse_target(target)


def test_argument_then_environment_then_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensafe up"):
        resolve(ClientConfig())
    save_profile("default", "grpc://127.0.0.1:1", "ts_saved")
    assert resolve(ClientConfig()).host_port == "127.0.0.1:1"
    assert resolve(ClientConfig()).api_key == "ts_saved"
    monkeypatch.setenv("TENSAFE_TARGET", "other:2")
    monkeypatch.setenv("TENSAFE_API_KEY", "ts_env")
    found = resolve(ClientConfig())
    assert (found.host_port, found.api_key) == ("other:2", "ts_env")
    found = resolve(ClientConfig.of({"target": "third:3", "api_key": "ts_arg"}))
    assert (found.host_port, found.api_key) == ("third:3", "ts_arg")
    assert "ts_arg" not in repr(found) + repr(ClientConfig(api_key="ts_arg"))


def test_a_saved_key_goes_to_its_own_target_only() -> None:
    save_profile("default", "grpc://127.0.0.1:1", "ts_saved")
    assert resolve(ClientConfig("127.0.0.1:1")).api_key == "ts_saved"
    assert resolve(ClientConfig("evil.example:1")).api_key is None
    assert resolve(ClientConfig("grpcs://127.0.0.1:1")).api_key is None


def test_profiles_are_private_and_keep_each_other() -> None:
    first = save_profile("default", "a:1", 'ts_"quoted\\')
    save_profile("default-admin", "a:1", "ts_admin")
    save_profile("other", "b:2", None, make_default=True)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    file = read_profiles()
    assert file.default_profile == "other"
    assert file.profiles["default"].api_key == 'ts_"quoted\\'
    assert file.profiles["other"].api_key is None
    assert resolve(ClientConfig(profile="default-admin")).api_key == "ts_admin"
    with pytest.raises(ConfigError, match="default-admin"):
        resolve(ClientConfig(profile="nobody"))
    with pytest.raises(ConfigError):
        save_profile("a.b", "a:1", None)


def test_a_broken_profile_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("profiles = 3\nx = [")
    monkeypatch.setenv("TENSAFE_CONFIG", str(path))
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        read_profiles()


def test_service_client_takes_every_form() -> None:
    forms: list[Any] = ["a:1", {"target": "a:1"}, ClientConfig("a:1")]
    for config in forms:
        assert ServiceClient(config).connection.host_port == "a:1"
    assert ServiceClient("a:1", target="b:2", timeout_s=3).connection.timeout_s == 3
    with pytest.raises(ConfigError, match="did you mean 'target'"):
        ServiceClient({"targt": "a:1"})
    with pytest.raises(ConfigError):
        ServiceClient(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        ServiceClient("a:1", timeout_s=0)


def test_privacy_is_on_or_off_and_never_left_open() -> None:
    """None means the default elsewhere, and unset is off on the wire."""
    assert DPConfig().enabled
    assert DPConfig(enabled=False, noise_multiplier=None).given_fields()["enabled"] is False
    with pytest.raises(ConfigError, match=r"DPConfig.noise_multiplier has no effect"):
        DPConfig(enabled=False, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="enabled"):
        TrainingConfig.of({"model_ref": "m", "dp_config": {"enabled": None}})
