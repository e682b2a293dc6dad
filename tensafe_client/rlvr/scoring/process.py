"""A process that scores: it reads an environment, then problems with completions, until the end."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from typing import Any

from tensafe_client.rlvr.environments import Reply
from tensafe_client.rlvr.rewards.outcomes import plain
from tensafe_client.rlvr.scoring.pipes import PipeClosedError, Pipes, packed
from tensafe_client.rlvr.scoring.pool import Failure


def main() -> None:
    """Answers on what was standard output; whatever prints goes to standard error instead."""
    pipes = Pipes(os.dup(0), os.dup(1))
    os.dup2(2, 1)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - it stays for the process's life
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipes, requests), daemon=True).start()
    environment = requests.get()
    pipes.send(packed(environment if isinstance(environment, Failure) else None))
    while True:
        request = requests.get()
        pipes.send(_answer(environment, request))


def _read(pipes: Pipes, requests: queue.SimpleQueue[Any]) -> None:
    """Ends the process with its parent, even while a reward hangs."""
    while True:
        try:
            requests.put(pipes.receive())
        except PipeClosedError:
            os.killpg(0, signal.SIGKILL)  # and whatever the rewards have started
        except BaseException as error:
            requests.put(_failure(error))


def _answer(environment: Any, request: Any) -> bytes:
    try:
        if isinstance(request, Failure):
            return packed(request)
        return packed(_checked(environment.reply(*request)))
    except Exception as error:
        return packed(_failure(error))


def _checked(reply: Any) -> Reply:
    """With plain numbers: what the trainer reads cannot end it."""
    if not isinstance(reply, Reply):
        raise TypeError(f"an environment's reply must be a Reply, got {reply!r}")
    if reply.then is not None and not isinstance(reply.then, str):
        raise TypeError(f"a Reply's then must be text or None, got {reply.then!r}")
    # A subclass of str may be pickled as anything, and UTF-8 cannot hold half a surrogate pair.
    then = None if reply.then is None else reply.then.encode().decode()
    return Reply(plain(reply.reward), then)


def _failure(error: BaseException) -> Failure:
    try:
        told = str(error)
    except Exception as broken:
        told = f"it has no text: {type(broken).__name__}"
    return Failure("error", f"{type(error).__name__}: {told}")


if __name__ == "__main__":
    main()
