"""The one event loop on which all gRPC of this process runs.

grpc.aio dislikes several loops in one process, and users bring their own (or none). So a daemon
thread runs one loop for every client, sync or async; other threads and loops hand coroutines to it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from tensafe_client.errors import ClientClosedError

T = TypeVar("T")
_LOOK_UP_S = 0.5


class _Call(Generic[T]):
    """A coroutine that was handed to the loop, and can be taken back at any moment.

    Attributes:
        future: set once the caller has it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.future: concurrent.futures.Future[T] | None = None
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None
        self._abandoned = False

    async def carry(self) -> T:
        self._task = asyncio.current_task()
        if self._abandoned:
            self._coroutine.close()
            raise asyncio.CancelledError
        return await self._coroutine

    def abandon(self) -> None:
        """Cancels it, also if it has not begun; on the loop."""
        self._abandoned = True
        if self._task is not None:
            self._task.cancel()


class IoLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = _new_event_loop()
        self.used = False
        self._pid = os.getpid()
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._thread = threading.Thread(target=self._main, name="tensafe-io", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and blocks until it is done.

        Raises:
            RuntimeError: on the loop's own thread, where blocking would never end.
            ClientClosedError: if the client was closed meanwhile.
        """
        try:
            self.check_process()
            if self.is_current_thread():
                raise RuntimeError(
                    "a blocking TenSafe call was made inside a done-callback, on the thread that "
                    "would have to answer it; hand the work to another thread"
                )
        except BaseException:
            coroutine.close()
            raise
        call = _Call(coroutine)
        try:
            call.future = asyncio.run_coroutine_threadsafe(call.carry(), self.loop)
            return _result(call.future)
        except concurrent.futures.CancelledError:
            if call.future is not None and call.future.cancelled():
                # Nobody here did it: its channel was closed.
                raise _closed_meanwhile() from None
            raise
        except BaseException:  # Ctrl-C, maybe before the future is ours: leave no call behind
            self.loop.call_soon_threadsafe(call.abandon)
            raise

    async def bridge(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and awaits it from any other one."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        try:
            self.check_process()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller's own task is being cancelled
            raise _closed_meanwhile() from None

    def is_current_thread(self) -> bool:
        """Tells whether the caller runs on the loop's thread."""
        return threading.get_ident() == self._thread.ident

    def check_process(self) -> None:
        """Raises ClientClosedError in a child that was forked after the loop had started."""
        if self._pid != os.getpid():
            raise ClientClosedError(
                "this client was made before the process was forked",
                remedy="make a new ServiceClient in the child process",
            )

    def at_exit(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Registers what to await on the loop before the interpreter ends; twice counts once."""
        self.used = True
        if closer not in self._closers:
            self._closers.append(closer)

    def forget(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Takes back `at_exit`."""
        if closer in self._closers:
            self._closers.remove(closer)

    def stop(self) -> None:
        """Runs the closers, then ends the loop and its thread."""
        if not self._thread.is_alive():
            return
        # Late is no harm: the interpreter ends anyway, and the server notices the closed socket.
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._close_all(), self.loop).result(timeout=2)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=2)

    async def _close_all(self) -> None:
        await asyncio.gather(*(closer() for closer in self._closers), return_exceptions=True)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


def _result(future: concurrent.futures.Future[T]) -> T:
    """Waits, and looks up now and then: a Ctrl-C that comes just as the thread goes to sleep does
    not wake it."""
    while True:
        try:
            return future.result(_LOOK_UP_S)
        except TimeoutError:
            if future.done():  # by now, or with an error of this kind
                return future.result()


def _closed_meanwhile() -> ClientClosedError:
    return ClientClosedError(
        "the client was closed while this call went on", remedy="make a new ServiceClient"
    )


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


_lock = threading.Lock()
_instance: IoLoop | None = None
_forked_in_use = False


def io_loop() -> IoLoop:
    """Returns this process's loop; the first call starts it.

    Raises:
        ClientClosedError: in a child that was forked after its parent had connected. gRPC does not
            survive that: every call would hang.
    """
    global _instance  # noqa: PLW0603 - one per process is the point
    with _lock:
        if _forked_in_use:
            raise ClientClosedError(
                "this process was forked after its parent had connected to a service, and gRPC "
                "does not work in such a child",
                remedy="connect after the fork, or start the process by spawn or forkserver",
            )
        if _instance is None:
            _instance = IoLoop()
        return _instance


def _stop_at_exit() -> None:
    if _instance is not None:
        _instance.stop()


def _forget_in_child() -> None:
    # Threads do not survive a fork: the child starts its own loop when it needs one.
    global _instance, _lock, _forked_in_use  # noqa: PLW0603
    _forked_in_use = _forked_in_use or (_instance is not None and _instance.used)
    _instance, _lock = None, threading.Lock()


atexit.register(_stop_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
