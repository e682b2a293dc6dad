"""A run's state as files: what `peft` loads, and beside it what continuing needs.

    adapter_config.json, adapter_model.safetensors   the adapter, as `peft` writes it
    state.json                                       counters, configuration, fingerprint
    optimizer.safetensors                            `<moment>.<tensor>`, and counters
    accumulator.safetensors                          the open window's gradient, if one is open

The last two are there only if everything was saved. No pickle anywhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.adapters import Adapter
from workers.engine.optimizers import moment_names
from workers.engine.peft_folders import is_peft_folder, peft_state
from workers.engine.run import Run
from workers.operations import LoadOutcome, LoraSettings, OptimizerSettings, SaveOutcome

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ACCUMULATOR_FILE = "accumulator.safetensors"
_FORMAT = "tensafe-run-1"
_WEIGHTS_ALONE = "; include_optimizer=False loads the weights alone"


@dataclass(frozen=True, slots=True)
class Captured:
    """A run's state at one moment, in memory of its own: the run may go on while it is written.

    Attributes:
        tensors: file name → tensors, on the CPU.
        state: content of `state.json`.
        reference: what `peft` is told of the base model.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    lora: LoraSettings
    reference: str

    @property
    def step(self) -> int:
        """Applied updates."""
        return int(self.state["step"])

    def write(self, directory: Path) -> None:
        """Writes the files into an existing directory."""
        for name, tensors in self.tensors.items():
            save_file(tensors, directory / name, metadata={"format": "pt"})
        _peft_config(self.lora, self.reference).save_pretrained(str(directory))
        (directory / STATE_FILE).write_text(json.dumps(self.state, indent=1) + "\n")


def save(run: Run, directory: Path, complete: bool, fingerprint: dict[str, str]) -> SaveOutcome:
    """Writes the adapter and, if `complete`, all of the run's state, for whoever may read it.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION: the run is private, and its window open.
    """
    if complete and run.private is not None and (run.window.is_open or run.accumulator is not None):
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            "the run's accumulation window holds a gradient without noise, which no artifact may "
            "have; save after optim_step, or with include_optimizer=False",
            field="save_state.include_optimizer",
        )
    capture(run, complete, fingerprint).write(directory)
    return SaveOutcome(run.window.step, run.model.name)


def capture(run: Run, complete: bool, fingerprint: dict[str, str]) -> Captured:
    """Copies the adapter and, if `complete`, all of the run's state; nothing is written."""
    adapter = run.adapter
    tensors = {ADAPTER_FILE: _own(adapter.named())}
    state: dict[str, Any] = {
        "format": _FORMAT,
        "complete": complete,
        "model": run.model.name,
        "step": run.window.step,
        "seed": run.seed,
        "deterministic": run.settings.deterministic,
        "lora": asdict(adapter.settings),
        "fingerprint": fingerprint,
    }
    if complete:
        state |= {
            "run_id": run.run_id,
            "run": run.settings.as_json(),
            "backwards": run.backwards,
            "window": run.window.as_json(),
        }
        if run.private is not None:
            state["private"] = run.private.as_json()
        tensors[OPTIMIZER_FILE] = _own(_optimizer_tensors(run))
        if run.accumulator is not None:
            tensors[ACCUMULATOR_FILE] = _own(adapter.named(run.accumulator))
    reference = run.model.references[0] if run.model.references else run.model.name
    return Captured(tensors, state, adapter.settings, reference)


def _peft_config(lora: LoraSettings, reference: str) -> Any:
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=reference,
        inference_mode=True,
    )


def load(run: Run, directory: Path, include_optimizer: bool | None) -> LoadOutcome:
    """Replaces the run's weights and, if asked and there, everything else.

    Weights alone drop the open accumulation window, poisoned or not: its gradient belongs to the
    weights that are gone. Step, optimizer and seed stay. Everything is read and checked before
    anything is replaced. A private run takes an open window from a private run's snapshot alone:
    another's gradient may be larger than any bound.

    Raises:
        TenSafeFault: ARTIFACT_MISMATCH.
    """
    state = read_state(directory, run.model.name)
    if state["model"] != run.model.name:
        raise _mismatch(f"it was saved from {state['model']} and the run is on {run.model.name}")
    _check_shape(lora_settings(state), run.adapter.settings)
    complete = bool(state["complete"])
    if include_optimizer and not complete:
        raise TenSafeFault(
            "ARTIFACT_MISMATCH",
            "the artifact was saved without optimizer state; load it with include_optimizer=False",
            field="load_state.include_optimizer",
        )
    weights = read_weights(run.adapter, directory)
    restore = complete if include_optimizer is None else include_optimizer
    if restore:
        _load_rest(run, directory, state)
    else:
        run.drop_window()
    with torch.no_grad():
        run.adapter.weights.copy_(weights)
    return LoadOutcome(run.window.step, restore)


def read_state(directory: Path, model: str) -> dict[str, Any]:
    """`state.json`, its format checked; what stands in for it if the adapter came from elsewhere,
    for the model of this name."""
    if is_peft_folder(directory):
        return peft_state(directory, model)
    path = directory / STATE_FILE
    state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("format") != _FORMAT:
        raise _mismatch("it was not saved by the torch backend")
    return state


def lora_settings(state: dict[str, Any]) -> LoraSettings:
    """The saved adapter's shape."""
    lora = dict(state["lora"])
    lora["target_modules"] = tuple(lora["target_modules"])
    return LoraSettings(**lora)


def read_weights(adapter: Adapter, directory: Path) -> Tensor:
    """float32 [P], laid out like the adapter's weights; all finite."""
    weights = adapter.vector(load_file(directory / ADAPTER_FILE))
    if not torch.isfinite(weights).all():
        raise TenSafeFault(
            "ARTIFACT_MISMATCH",
            "the artifact's weights hold NaN or infinite numbers; load an earlier one",
            field="artifact_id",
        )
    return weights


def _load_rest(run: Run, directory: Path, state: dict[str, Any]) -> None:
    saved = state["run"]["optimizer"]["name"]
    if saved != run.settings.optimizer.name:
        raise _mismatch(
            f"its optimizer is {saved} and the run's is {run.settings.optimizer.name}"
            f"{_WEIGHTS_ALONE}"
        )
    moments = _split_moments(run.adapter, load_file(directory / OPTIMIZER_FILE))
    _check_moments(moments, run.settings.optimizer)
    path = directory / ACCUMULATOR_FILE
    accumulator = run.adapter.vector(load_file(path)) if path.is_file() else None
    if run.private is not None:
        own = state["run"].get("privacy") == run.settings.as_json()["privacy"]
        if not own and (accumulator is not None or state["window"]["backwards"]):
            raise _mismatch(
                "its accumulation window is open, and the run is private; save it after "
                "optim_step, or load it with include_optimizer=False"
            )
        run.private.clear()
        if own:
            run.private.restore(state["private"])
    run.window.restore(state["window"])
    run.optimizer.restore(moments)
    run.accumulator = accumulator
    run.seed = int(state["seed"])
    run.backwards = int(state["backwards"])


def _optimizer_tensors(run: Run) -> dict[str, Tensor]:
    tensors = {}
    for moment, value in run.optimizer.state().items():
        if value.ndim == 0:
            tensors[moment] = value
        else:
            tensors |= {f"{moment}.{key}": part for key, part in run.adapter.named(value).items()}
    return tensors


def _split_moments(adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    grouped: dict[str, dict[str, Tensor]] = {}
    moments = {}
    for name, tensor in tensors.items():
        moment, _, key = name.partition(".")
        if key:
            grouped.setdefault(moment, {})[key] = tensor
        else:
            moments[moment] = tensor
    return moments | {moment: adapter.vector(parts) for moment, parts in grouped.items()}


def _check_moments(moments: dict[str, Tensor], settings: OptimizerSettings) -> None:
    """Updates rely on it, and look at nothing afterwards."""
    if moments and set(moments) != set(names := moment_names(settings)):
        raise _mismatch(f"its optimizer has {sorted(moments)} instead of {names}{_WEIGHTS_ALONE}")
    for name, value in moments.items():
        if name == "step" and (value.ndim or value.dtype != torch.float32):
            raise _mismatch(f"its step is no float32 number{_WEIGHTS_ALONE}")
        if not torch.isfinite(value).all():
            raise _mismatch(f"its {name} holds NaN or infinite numbers{_WEIGHTS_ALONE}")
        if name in ("exp_avg_sq", "step") and (value < 0).any():
            raise _mismatch(f"its {name} holds negative numbers{_WEIGHTS_ALONE}")


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, apart from the run's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _check_shape(saved: LoraSettings, own: LoraSettings) -> None:
    if saved.rank != own.rank:
        raise _mismatch(f"its rank is {saved.rank} and the run's is {own.rank}")
    if saved.alpha != own.alpha:
        raise _mismatch(f"its alpha is {saved.alpha} and the run's is {own.alpha}")
    if set(saved.target_modules) != set(own.target_modules):
        raise _mismatch(
            f"its target_modules are {sorted(saved.target_modules)} and the run's are "
            f"{sorted(own.target_modules)}"
        )


def _mismatch(text: str) -> TenSafeFault:
    return TenSafeFault(
        "ARTIFACT_MISMATCH",
        f"the artifact does not fit: {text}; load it into a run like the one that was saved",
        field="artifact_id",
    )
