"""`tensafe train sft` on a model without a tokenizer."""

from __future__ import annotations

from typing import cast

import pytest

from tensafe_client import ConfigError, ServiceClient
from tensafe_client.cli.train.run_options import tokenizer_of


class Bare:
    """A service whose model has no tokenizer, as the mock backend's."""

    def tokenizer_files(self, model_ref: str) -> dict[str, bytes]:
        return {}


def test_the_remedy_is_one_of_the_command_line():
    with pytest.raises(ConfigError, match="'some-model' has no tokenizer") as caught:
        tokenizer_of(cast(ServiceClient, Bare()), "some-model")
    assert "tensafe up --backend torch --model" in str(caught.value)
    assert "Datum" not in str(caught.value)
