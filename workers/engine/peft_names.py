"""Names that plain `peft` takes for something else than a model's linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers


def read_otherwise(module: Any, names: Iterable[str]) -> set[str]:
    """Those under which an adapter that was saved here would compute something else there.

    In models with experts `gate_proj` stands for the experts' joint weights, and not for the layers
    of this name that some of these models have beside them.
    """
    found = set()
    for name in names:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, module, None)
        except ValueError:  # it wants others with it
            found.add(name)
        else:
            if name not in (config.target_modules or ()):
                found.add(name)
    return found
