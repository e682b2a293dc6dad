"""The `tensafe` command against a real service: train, stop, resume, take away, print JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from harness.command_line import run_json, run_tensafe, start_tensafe
from local_service import LocalService
from plain_peft import PlainPeft

from tensafe_client import Datum, ServiceClient

RUN = re.compile(r"\brun-\w+")
ARTIFACT = re.compile(r"\bart-\w+")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small JSONL file with each of the forms."""
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(10)] + [
        {
            "messages": [
                {"role": "user", "content": f"double {n}"},
                {"role": "assistant", "content": f"{2 * n}"},
            ]
        }
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(service: LocalService, data: Path, *options: str) -> list[dict[str, object]]:
    ran = run_tensafe(service, "train", "sft", str(data), "--model", "tiny", "--json", *options)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_train_evaluates_saves_and_learns(tiny_service: LocalService, data: Path):
    events = train(
        tiny_service,
        data,
        *("--steps", "12", "--lr", "0.01", "--batch-size", "4", "--seed", "3", "--rank", "4"),
        *("--schedule", "cosine", "--warmup", "2", "--save-every", "6", "--name", "sums"),
        *("--eval-data", str(data), "--eval-every", "6"),
    )
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["start", "eval"]
    assert kinds.count("step") == 12
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 6, 12]
    assert [event["step"] for event in events if event["event"] == "saved"] == [6, 12]
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0]
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates[0] == pytest.approx(0.005)
    assert rates[1] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.001
    run = run_json(tiny_service, "runs", "show", str(events[0]["run_id"]))
    assert run["step"] == 12
    assert run["config"]["name"] == "sums"
    assert run["config"]["lora_config"]["rank"] == 4


def test_ctrl_c_saves_and_says_how_to_resume(tiny_service: LocalService, data: Path):
    arguments = ["--model", "tiny", "--steps", "100000", "--seed", "3", "--lr", "0.01"]
    # --profile belongs to the service, so the resuming command must repeat it.
    process = start_tensafe(
        tiny_service, "--profile", "local", "train", "sft", str(data), *arguments
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not lines[-1].startswith("step 3/"):
        assert lines[-1], "it ended before step 3"
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    output = "".join(lines) + rest
    assert "Stopping" in output
    command = shlex.split(output.split("To resume:\n")[1])
    assert command[:6] == ["tensafe", "--profile", "local", "train", "sft", str(data)]
    assert command[command.index("--steps") + 1] == "100000"
    run_id = command[command.index("--resume") + 1]
    run = run_json(tiny_service, "runs", "show", run_id)
    saved = run_json(tiny_service, "artifacts", "list", "--run", run_id)
    assert [artifact["step"] for artifact in saved] == [run["step"]]

    total = str(run["step"] + 3)
    command[command.index("--steps") + 1] = total
    resumed = run_tensafe(tiny_service, *command[1:]).stdout
    assert f"steps {run['step'] + 1} to {total}" in resumed
    assert f"step {total}/{total}" in resumed
    assert run_json(tiny_service, "runs", "show", run_id)["step"] == run["step"] + 3


def test_a_resumed_run_trains_as_if_it_had_not_stopped(tiny_service: LocalService, data: Path):
    options = ["--lr", "0.01", "--seed", "5", "--rank", "4", "--batch-size", "3"]
    whole = [e["loss"] for e in train(tiny_service, data, "--steps", "9", *options) if "loss" in e]
    first = train(tiny_service, data, "--steps", "4", *options)
    again = run_tensafe(
        tiny_service,
        *("train", "sft", str(data), "--steps", "9", "--json"),
        *("--resume", str(first[0]["run_id"]), "--lr", "0.01"),
    )
    second = [json.loads(line) for line in again.stdout.splitlines()]
    assert [e["loss"] for e in [*first, *second] if "loss" in e] == whole


def test_a_run_that_takes_fewer_steps_says_so_before_it_trains(
    tiny_service: LocalService, data: Path
):
    with ServiceClient(tiny_service.target, api_key=tiny_service.api_key) as client:
        made = client.create_training_client({"model_ref": "tiny", "max_steps": 3})
    resume = ("train", "sft", str(data), "--resume", made.run_id)
    ran = run_tensafe(tiny_service, *resume, "--steps", "4", expect=2)
    assert "made for 3 steps" in ran.stderr
    assert run_json(tiny_service, "runs", "show", made.run_id)["step"] == 0
    assert "step 3/3" in run_tensafe(tiny_service, *resume, "--steps", "3").stdout


def test_a_bad_line_is_named(tiny_service: LocalService, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"prompt": "no completion"}\n')
    ran = run_tensafe(tiny_service, "train", "sft", str(path), "--model", "tiny", expect=6)
    assert "line 2" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested"),
        ('{"text": "%s"}' % ("x" * 200), "--max-tokens 128"),
    ],
    ids=["surrogate", "nested", "longer than the context"],
)
def test_a_bad_line_is_named_before_a_run_is_created(
    tiny_service: LocalService, tmp_path: Path, line: str, says: str
):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    before = run_json(tiny_service, "runs", "list")
    ran = run_tensafe(tiny_service, "train", "sft", str(path), "--model", "tiny", expect=6)
    assert "line 3" in ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert run_json(tiny_service, "runs", "list") == before


def test_a_line_that_is_too_long_can_be_cut(tiny_service: LocalService, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "x" * 200}) + "\n")
    events = train(tiny_service, path, "--steps", "1", "--max-tokens", "128")
    assert [event["tokens"] for event in events if event["event"] == "step"] == [128]


def test_held_out_lines_are_measured_too(tiny_service: LocalService, data: Path, tmp_path: Path):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"text": "x" * 200}) + "\n")
    held_out = ["--eval-data", str(path), "--eval-every", "1"]
    ran = run_tensafe(
        tiny_service, "train", "sft", str(data), "--model", "tiny", *held_out, expect=6
    )
    assert "held_out.jsonl: line 1 has 200 tokens" in ran.stderr


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_is_all_warm_up_creates_no_run(
    tiny_service: LocalService, data: Path, schedule: str
):
    before = run_json(tiny_service, "runs", "list")
    options = ["--schedule", schedule, "--warmup", "3", "--steps", "3"]
    ran = run_tensafe(
        tiny_service, "train", "sft", str(data), "--model", "tiny", *options, expect=2
    )
    assert "--warmup" in ran.stderr
    assert run_json(tiny_service, "runs", "list") == before


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["runs", "show", "run-none"], 5, "run-none"),
        (["artifacts", "download", "art-none", "x"], 5, "art-none"),
        (["models", "show", "none"], 5, "none"),
        (["--api-key", "ts_wrong", "runs", "list"], 4, "key"),
        (["--target", "127.0.0.1:1", "runs", "list"], 3, "tensafe up"),
        (["train", "sft", "nothing.jsonl", "--model", "tiny"], 2, "nothing.jsonl"),
        (["sample", "--prompt", "x"], 2, "--run"),
        (["--profile", "local", "admin", "tenants", "list"], 4, "admin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_have_a_message_and_a_status(
    tiny_service: LocalService, arguments: list[str], status: int, says: str
):
    ran = run_tensafe(tiny_service, *arguments, expect=status)
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_downloaded_artifact_loads_in_plain_peft(
    tiny_service: LocalService, tiny_model: Path, data: Path, tmp_path: Path
):
    events = train(tiny_service, data, "--steps", "3", "--lr", "0.01", "--seed", "1")
    artifact_id = str(events[-1]["artifact_id"])
    answer = run_json(tiny_service, "artifacts", "download", artifact_id, str(tmp_path / "adapter"))
    names = {file["name"] for file in answer["artifact"]["files"]}
    assert names == set(os.listdir(tmp_path / "adapter"))
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}

    datum = Datum([5, 6, 7, 8], [6, 7, 8, 9])
    with ServiceClient(tiny_service.target, api_key=tiny_service.api_key) as client:
        run = client.training_client(str(events[0]["run_id"]))
        served = run.forward([datum]).result().logprobs[0]
        fresh = client.create_training_client({"model_ref": "tiny"})
        untrained = fresh.forward([datum]).result().logprobs[0]
    plain = PlainPeft(tiny_model, tmp_path / "adapter")
    loaded = plain.logprobs(datum.tokens, datum.target_tokens)
    assert loaded == pytest.approx(served, abs=1e-5)
    assert abs(served - untrained).max() > 1e-3


def test_sampling(tiny_service: LocalService):
    source = ["--model", "tiny", "--max-tokens", "5", "--seed", "1"]
    one = run_tensafe(tiny_service, "sample", *source, "--prompt", "hello").stdout
    assert (
        run_tensafe(tiny_service, "sample", *source, "--prompt", "-", stdin="hello").stdout == one
    )
    several = run_json(
        tiny_service,
        "sample",
        *source,
        "--chat",
        "hi",
        "--system",
        "be brief",
        "--num-samples",
        "2",
    )
    assert len(several["samples"]) == 2
    assert "be brief" in several["samples"][0]["prompt"]


def test_sampling_token_by_token(tiny_service: LocalService):
    source = ["sample", "--model", "tiny", "--max-tokens", "12", "--seed", "1"]
    one = run_tensafe(tiny_service, *source, "--prompt", "hello")
    assert run_tensafe(tiny_service, *source, "--prompt", "hello", "--stream").stdout == one.stdout
    options = ["--num-samples", "2", "--top-logprobs", "3", "--prompt-logprobs"]
    lines = run_tensafe(
        tiny_service, *source, *options, "--prompt", "hello", "--stream", "--json"
    ).stdout.splitlines()
    *chunks, result = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert len(chunks) >= 2  # how many depends on the pace
    for sample in result["samples"]:
        mine = [chunk for chunk in chunks if chunk["sample_index"] == sample["sample_index"]]
        assert "".join(chunk["text"] for chunk in mine) == sample["completion"]
        assert [token for chunk in mine for token in chunk["tokens"]] == sample["tokens"]
        assert len(sample["top_tokens"][0]) == 3
        assert sample["prompt_logprobs"][0] is None  # nothing comes before it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stream", "--num-samples", "2"], "--json"),
        (["--stream", "--prompt", "y"], "--json"),
        (["--top-logprobs", "2"], "--json"),
        (["--prompt-logprobs"], "--json"),
        (["--top-logprobs", "21", "--json"], "20"),
    ],
)
def test_what_would_not_be_printed_is_refused(
    tiny_service: LocalService, options: list[str], says: str
):
    command = ["sample", "--model", "tiny", "--prompt", "x", *options]
    assert says in run_tensafe(tiny_service, *command, expect=2).stderr


def test_watch_prints_each_step(tiny_service: LocalService, data: Path):
    events = train(tiny_service, data, "--steps", "3", "--seed", "1")
    watched = run_tensafe(
        tiny_service, "runs", "watch", str(events[0]["run_id"]), "--no-follow", "--json"
    )
    steps = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [step["loss"] for step in steps] == pytest.approx(
        [event["loss"] for event in events if event["event"] == "step"]
    )
    later = run_tensafe(
        tiny_service,
        *("runs", "watch", str(events[0]["run_id"]), "--no-follow", "--json"),
        *("--since", str(steps[1]["cursor"])),
    )
    assert [json.loads(line)["step"] for line in later.stdout.splitlines()] == [3]


def test_control_c_ends_a_watch(tiny_service: LocalService, data: Path):
    run_id = str(train(tiny_service, data, "--steps", "1")[0]["run_id"])
    process = start_tensafe(tiny_service, "runs", "watch", run_id)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("step      1")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.stderr.read()


def test_every_list_is_json(tiny_service: LocalService, data: Path):
    run_id = str(train(tiny_service, data, "--steps", "1")[0]["run_id"])
    assert run_id in [run["id"] for run in run_json(tiny_service, "runs", "list")]
    assert run_json(tiny_service, "models", "list")[0]["name"] == "tiny"
    assert "q_proj" in run_json(tiny_service, "models", "show", "tiny")["linear_modules"]
    operations = run_json(tiny_service, "operations", "list", "--run", run_id)
    assert [operation["kind"] for operation in operations] == [
        "save_state",
        "optim_step",
        "forward_backward",
    ]
    shown = run_json(tiny_service, "operations", "show", operations[0]["id"])
    assert shown["state"] == "succeeded"
    cancelled = run_json(tiny_service, "operations", "cancel", operations[0]["id"])
    assert cancelled["cancelled"] is False
    artifact = run_json(tiny_service, "artifacts", "list", "--run", run_id)[0]
    assert run_json(tiny_service, "artifacts", "show", artifact["id"]) == artifact
    assert run_json(tiny_service, "runs", "delete", run_id)["status"] == "deleted"
    assert run_id not in [run["id"] for run in run_json(tiny_service, "runs", "list")]
    profiles = run_json(tiny_service, "profiles", "list")
    assert {profile["name"] for profile in profiles} >= {"local", "local-admin"}
    assert "ts_" not in json.dumps(profiles)


def test_tables_for_people(tiny_service: LocalService, data: Path):
    run_id = str(train(tiny_service, data, "--steps", "1", "--name", "shown")[0]["run_id"])
    for arguments in (
        ["runs", "list"],
        ["runs", "show", run_id],
        ["operations", "list", "--run", run_id],
        ["artifacts", "list", "--run", run_id],
        ["models", "list"],
        ["models", "show", "tiny"],
        ["profiles", "list"],
        ["admin", "tenants", "list"],
        ["admin", "keys", "list"],
        ["admin", "runs", "list"],
        ["admin", "runs", "verify", run_id],
    ):
        printed = run_tensafe(tiny_service, *arguments).stdout
        assert len(printed.splitlines()) >= 2, arguments


def test_an_operator_makes_a_tenant_whose_key_works_until_revoked(
    tiny_service: LocalService, data: Path
):
    tenant = run_json(tiny_service, "admin", "tenants", "create", "made-by-command")
    assert tenant["name"] == "made-by-command"
    made = run_json(tiny_service, "admin", "keys", "create", "made-by-command")
    with_key = ["--api-key", made["secret"]]
    run_id = train(tiny_service, data, "--steps", "1")[0]["run_id"]
    assert json.loads(run_tensafe(tiny_service, *with_key, "runs", "list", "--json").stdout) == []
    assert run_json(tiny_service, "admin", "runs", "list", tenant["id"]) == []
    assert run_id in [run["id"] for run in run_json(tiny_service, "admin", "runs", "list")]
    report = run_json(tiny_service, "admin", "runs", "verify", run_id)
    assert (report["run_id"], report["reproduces"]) == (run_id, True)
    run_tensafe(tiny_service, *with_key, "admin", "runs", "verify", run_id, expect=4)
    key_id = made["key"]["id"]
    assert key_id in [
        k["id"] for k in run_json(tiny_service, "admin", "keys", "list", tenant["id"])
    ]
    run_json(tiny_service, "admin", "keys", "revoke", key_id)
    run_tensafe(tiny_service, *with_key, "runs", "list", expect=4)


def test_run_ids_and_artifact_ids_are_shown(tiny_service: LocalService, data: Path):
    ran = run_tensafe(
        tiny_service, "train", "sft", str(data), "--model", "tiny", "--steps", "2"
    ).stdout
    assert RUN.search(ran)
    assert ARTIFACT.search(ran)
    assert "tensafe artifacts download" in ran
