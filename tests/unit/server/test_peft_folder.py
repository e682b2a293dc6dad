"""Which configurations of `peft` are taken as they are, and which are refused."""

from __future__ import annotations

import json

import peft
import pytest

from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe_server.uploads.peft_folder import read_config

MODEL = Model(name="tiny")


def config(**changes: object) -> bytes:
    """As this version of `peft` writes it, all its fields in it."""
    made = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    fields = {name: sorted(v) if isinstance(v, set) else v for name, v in made.to_dict().items()}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"fan_in_fan_out": True, "inference_mode": True, "revision": "main"},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(changes):
    shape = read_config(config(**changes), MODEL)
    assert (shape.rank, shape.alpha, shape.target_modules) == (4, 6, ["q_proj"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        # The base that such an adapter was trained on is not the base that is here.
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("kasa_config", {"beta": 1.0}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_rslora", True),
        ("alpha_pattern", {"q_proj": 2}),
        ("qalora_group_size", 8),
        ("a_field_of_next_year", True),
    ],
)
def test_what_would_change_the_adapter_or_is_unknown_is_refused(field, value):
    with pytest.raises(TenSafeFault, match=field) as caught:
        read_config(config(**{field: value}), MODEL)
    assert caught.value.detail.reason == "UNSUPPORTED_OPTION"
    read_config(config(a_field_of_next_year=None, another={}), MODEL)
