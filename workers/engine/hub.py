"""Whether the model hub has a model."""

from __future__ import annotations

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError

_ANSWER_S = 10.0


class HubError(Exception):
    """The hub cannot give a model, and why."""


def check_there(model_id: str) -> None:
    """Asks once. A load asks for each of a model's files and tries each again and again, which
    takes more than a minute where the hub is out of reach.

    What is in the local cache needs no hub.

    Raises:
        HubError: it has no such model, or does not answer within 10 s.
    """
    if isinstance(try_to_load_from_cache(model_id, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{model_id} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub")
    try:
        HfApi().model_info(model_id, timeout=_ANSWER_S)
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no model {model_id}, or shows it only to those whom HF_TOKEN names"
        ) from error
    except Exception as error:  # what a transport raises differs from version to version
        raise HubError(f"the hub did not answer for {model_id}: {error}") from error
