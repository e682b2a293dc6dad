"""What a wrong argument gets, for every parameter of every public function and method.

The cases come from the signatures: a parameter that is added is covered, and one that nobody has
said how to get wrong fails the first test.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fake_server import API_KEY, FakeCoordinator

import tensafe_client
from tensafe_client import (
    AsyncServiceClient,
    Datum,
    InvalidArgumentError,
    ServiceClient,
    data,
)
from tensafe_client.futures import OperationFuture

NONSENSE = object()
TEXT = [0, 5, b"bytes", NONSENSE, "\ud800"]
FLAG = [0, "yes", NONSENSE]
COUNT = [-1, 1.5, True, "3", math.nan, 2**64, NONSENSE]
NUMBER = ["0.1", True, 10**400, NONSENSE]
PLACE = [5, b"bytes", NONSENSE]
MAPPING = [5, "text", NONSENSE]
TIME_S = ["1", True, -1, math.nan, NONSENSE]
BATCH = [5, "text", None, [], [5], {}, NONSENSE]
TOKENS = [5, "text", [1.5], [-1], [2**40], ["a"], None, NONSENSE]

# How to get a parameter wrong, by its name.
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(["artifact_id", "run_id", "operation_id", "model_ref", "key_id"], TEXT),
    **dict.fromkeys(["artifact", "from_artifact", "model", "tenant", "name", "kind"], TEXT),
    **dict.fromkeys(["loss_fn", "reduction", "target", "api_key", "profile", "bias"], TEXT),
    **dict.fromkeys(["include_deleted", "include_optimizer", "follow", "drop_last"], FLAG),
    **dict.fromkeys(["make_default", "enabled", "deterministic", "stream"], FLAG),
    "prompt_logprobs": FLAG,
    "top_logprobs": COUNT,
    **dict.fromkeys(["limit", "since", "max_tokens", "top_k", "seed", "num_samples"], COUNT),
    **dict.fromkeys(["step", "batch_size", "epochs", "start", "warmup_steps"], COUNT),
    **dict.fromkeys(["total_steps", "rank", "gradient_accumulation_steps", "max_steps"], COUNT),
    **dict.fromkeys(["learning_rate", "weight_decay", "grad_clip_norm", "temperature"], NUMBER),
    **dict.fromkeys(["top_p", "min_p", "final_learning_rate", "alpha", "dropout"], NUMBER),
    **dict.fromkeys(["eps", "momentum", "noise_multiplier", "max_grad_norm"], NUMBER),
    **dict.fromkeys(["target_epsilon", "target_delta", "held_out"], NUMBER),
    **dict.fromkeys(["sample_rate", "expected_batch_size", "max_loss"], NUMBER),
    **dict.fromkeys(["loss_noise_multiplier"], NUMBER),
    **dict.fromkeys(["max_participation", "test_seed", "steps"], COUNT),
    **{name: [*TEXT, "prv"] for name in ("accountant_type", "sampling", "privacy_unit")},
    **{name: [*TEXT, "all"] for name in ("adjacency", "metrics")},
    **dict.fromkeys(["dataset_id", "unit_id"], TEXT),
    "source": [5, None, NONSENSE],
    "on_step": [5, "text", NONSENSE],
    **dict.fromkeys(["directory", "path", "ca"], PLACE),
    **dict.fromkeys(["metadata", "lora_config", "optimizer", "dp_config"], MAPPING),
    **dict.fromkeys(["timeout", "timeout_s"], TIME_S),
    "ttl_s": [*TIME_S, 0.0],
    "deadline_s": [*TIME_S, 0.0],
    "on_progress": [5, "text", NONSENSE],
    "fn": [5, "text", None, NONSENSE],
    "loss_config": [*MAPPING, {5: 1}, {"x": None}, {"x": [1]}, {"reference": 5}],
    "batch": BATCH,
    **dict.fromkeys(["tokens", "target_tokens", "input_ids", "labels"], TOKENS),
    "weights": ["text", [1.0, 2.0], ["a"], NONSENSE, 5],
    "prompts": [5, None, [], [None], NONSENSE],
    "stop": [1.5, [1.5], [None], [-1], NONSENSE],
    "config": [5, NONSENSE, ["a"]],
    "items": [5, NONSENSE, {}],
    "pairs": [5, NONSENSE, [5]],
    "modules": [5, "abc", [5], NONSENSE],
    "target_modules": [5, "q_proj", [5], [], NONSENSE],
    "betas": [0.9, [0.9], ["a", "b"], NONSENSE],
}

# What to pass for parameters without a default.
RIGHT: dict[str, Any] = {
    "artifact_id": "art-1",
    "directory": "never-written",
    "api_key": "ts_key",
    "batch": [Datum([1], [2])],
    "config": {"model_ref": "m"},
    "dataset_id": "ds-1",
    "source": "never-read",
    "steps": 1,
    "fn": lambda logprobs: (0.0, list(logprobs)),
    "input_ids": [1, 2],
    "items": [1, 2, 3],
    "key_id": "key-1",
    "kind": "linear",
    "labels": [1, 2],
    "learning_rate": 0.1,
    "model_ref": "m",
    "name": "acme",
    "operation_id": "op-1",
    "pairs": [],
    "path": "never-read",
    "prompts": "text",
    "run_id": "run-1",
    "step": 1,
    "target": "127.0.0.1:1",
    "target_tokens": [2],
    "tokens": [1],
    "total_steps": 10,
}

# Calls that need one of two optional arguments.
OF_OTHER_WEIGHTS = {
    f"{kind}.{name}"
    for kind in ("ServiceClient", "AsyncServiceClient")
    for name in ("sample", "sample_async")
}


@dataclass(frozen=True)
class Target:
    """One function under test: `find` gets it from the clients that the fixture makes."""

    name: str
    function: Callable[..., Any]
    find: Callable[[Clients], Callable[..., Any]]
    skipped: frozenset[str] = frozenset({"self", "cls"})

    @property
    def parameters(self) -> list[inspect.Parameter]:
        found = inspect.signature(self.function).parameters.values()
        return [
            one for one in found if one.name not in self.skipped and one.kind is not one.VAR_KEYWORD
        ]


@dataclass(frozen=True)
class Clients:
    """What methods are called on."""

    client: ServiceClient
    twin: AsyncServiceClient

    def owner(self, kind: type) -> Any:
        tc = self.client.create_training_client({"model_ref": "m"})
        if kind is tensafe_client.AsyncTrainingClient:
            return asyncio.run(self.twin.training_client(tc.run_id))
        owners: dict[type, Any] = {
            ServiceClient: self.client,
            AsyncServiceClient: self.twin,
            tensafe_client.Admin: self.client.admin,
            tensafe_client.AsyncAdmin: self.twin.admin,
            tensafe_client.TrainingClient: tc,
        }
        if kind is tensafe_client.SampleStream:
            return tc.sample("x", stream=True)
        return owners[kind] if kind in owners else tc.optim_step()


CLIENTS: list[type] = [
    ServiceClient,
    AsyncServiceClient,
    tensafe_client.TrainingClient,
    tensafe_client.AsyncTrainingClient,
    tensafe_client.Admin,
    tensafe_client.AsyncAdmin,
    OperationFuture,
    tensafe_client.SampleStream,
]
BUILT: list[type] = [
    ServiceClient,
    AsyncServiceClient,
    tensafe_client.ClientConfig,
    tensafe_client.TrainingConfig,
    tensafe_client.LoRAConfig,
    tensafe_client.OptimizerConfig,
    tensafe_client.DPConfig,
    tensafe_client.Schedule,
    tensafe_client.DataLoader,
    Datum,
]
FUNCTIONS: list[Callable[..., Any]] = [
    tensafe_client.constant,
    tensafe_client.linear,
    tensafe_client.cosine,
    tensafe_client.read_profiles,
    tensafe_client.save_profile,
    data.encode_batch,
    data.read_jsonl,
    data.docstring_pairs,
    data.split_by_module,
    Datum.from_labels,
    tensafe_client.Schedule("linear", 0.1, 10).__call__,
]
# Classes that the SDK makes and users only read.
READ_ONLY = {
    *("AsyncSampleStream", "DocstringPair", "EncodedBatch", "Example", "Logprobs", "Profile"),
}


def targets() -> Iterator[Target]:
    for kind in CLIENTS:
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            if name.startswith("_") or not function.__module__.startswith("tensafe_client"):
                continue

            def find(clients: Clients, kind: type = kind, name: str = name) -> Callable[..., Any]:
                method: Callable[..., Any] = getattr(clients.owner(kind), name)
                return method

            yield Target(f"{kind.__name__}.{name}", function, find)
    for built in [*BUILT, *FUNCTIONS]:
        yield Target(built.__name__, built, lambda _, built=built: built)


CASES = [
    pytest.param(target, parameter, id=f"{target.name}-{parameter.name}")
    for target in targets()
    for parameter in target.parameters
]


def test_every_parameter_of_the_public_api_has_wrong_values() -> None:
    for target in targets():
        for parameter in target.parameters:
            assert parameter.name in WRONG, f"{target.name}({parameter.name}=…)"


def test_everything_public_that_takes_arguments_is_here() -> None:
    here = {kind.__name__ for kind in [*CLIENTS, *BUILT]} | {one.__name__ for one in FUNCTIONS}
    for module in (tensafe_client, data):
        for name in module.__all__:
            value = getattr(module, name)
            made_by_the_sdk = inspect.isclass(value) and value.__module__ in {
                "tensafe_client.errors",
                "tensafe_client.infos",
                "tensafe_client.dp_metrics",
                "tensafe_client.losses",
                "tensafe_client.privacy_report",
                "tensafe_client.results",
                "tensafe_client.samples",
            }
            assert name in here or name in READ_ONLY or made_by_the_sdk, name


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_CONFIG", str(tmp_path_factory.mktemp("home") / "config.toml"))
        server = FakeCoordinator()
        server.start()
        address = f"127.0.0.1:{server.port}"
        with ServiceClient(address, api_key=API_KEY) as client:
            yield Clients(client, AsyncServiceClient(address, api_key=API_KEY))
        server.stop()


def _shown(value: Any) -> str:
    return "nonsense" if value is NONSENSE else repr(value)


@pytest.mark.parametrize(
    "value", ["text", [1.0, 2.0], ["a"], [[1.0, 2.0]], None, NONSENSE], ids=_shown
)
def test_a_wrong_input_of_a_datum_is_named(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="advantages") as caught:
        Datum([1, 2, 3], [2, 3, 4], advantages=value)
    assert caught.value.violations[0][0] == "advantages"


@pytest.mark.parametrize(("target", "parameter"), CASES)
def test_a_wrong_argument_is_named(
    clients: Clients, target: Target, parameter: inspect.Parameter
) -> None:
    assert WRONG[parameter.name]
    for value in WRONG[parameter.name]:
        refuses(clients, target, parameter, value)


def refuses(clients: Clients, target: Target, parameter: inspect.Parameter, value: Any) -> None:
    given = {one.name: RIGHT[one.name] for one in target.parameters if one.default is one.empty} | {
        parameter.name: value
    }
    if target.name in OF_OTHER_WEIGHTS and parameter.name != "artifact":
        given = {"model": "m", **given}
    with pytest.raises(InvalidArgumentError, match=parameter.name) as caught:
        _finish(target.find(clients)(**given))
    assert caught.value.violations, f"no field is named beside the text: {caught.value}"


def _finish(result: Any) -> None:
    """Gets to the end of what was called: a coroutine, a stream, or nothing more to do."""
    if inspect.iscoroutine(result):
        asyncio.run(result)
    elif inspect.isgenerator(result):
        next(result, None)
