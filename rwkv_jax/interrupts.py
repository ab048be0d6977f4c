"""Ctrl-C and SIGTERM: everything that handles a signal.

Only the main thread can set signal handlers; in any other these contexts leave them alone.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rwkv_jax.errors import UserError

T = TypeVar("T")


def leave(*_: Any) -> None:
    """A signal handler: ends the process at once with 130."""
    os.write(2, b"\n")
    os._exit(130)


def leave_at_once() -> None:
    """Makes Ctrl-C end the process at once with 130, except inside the contexts below.

    During imports and at exit a KeyboardInterrupt can surface as another error, or abort the
    process. A handler that somebody else has set stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leaving() -> contextlib.AbstractContextManager[None]:
    """`leave_at_once` while the context lasts."""
    return _instead_of(signal.default_int_handler, leave)


def raising() -> contextlib.AbstractContextManager[None]:
    """Ctrl-C raises KeyboardInterrupt again after `leave_at_once`."""
    return _instead_of(leave, signal.default_int_handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt for a Ctrl-C that a library has turned into an error of its own.

    An import that is interrupted raises ImportError, and JAX, while it compares two cache keys,
    ValueError with the traceback in its text.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _caused_by_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def _caused_by_interrupt(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def undropped_interrupts() -> Iterator[None]:
    """Raises KeyboardInterrupt again where Python drops it: in a finaliser, or in a callback of the
    garbage collector, as JAX has one."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, _press).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # else a library has put its own before it
            sys.unraisablehook = before


def _press() -> None:
    main = threading.main_thread().ident
    assert main is not None
    # A signal, unlike `_thread.interrupt_main`, also ends the main thread's system call.
    signal.pthread_kill(main, signal.SIGINT)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Defers the first Ctrl-C: KeyboardInterrupt is raised where the yielded function is called
    next, or at the end of the context. A second Ctrl-C raises at once.

    Python itself raises wherever it happens to be, which may be inside a finaliser, where the
    exception is dropped, or inside a library that turns it into another error, as JAX does. A
    handler that somebody else has set stays.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with _instead_of(signal.default_int_handler, press):
        yield check
    check()


def for_each(items: Iterable[T], act: Callable[[T], object]) -> None:
    """Calls `act` on each item. Ctrl-C raises KeyboardInterrupt between two of them: JAX, which may
    make them, can crash where an interrupt reaches it."""
    with interruptible(), deferred_interrupts() as check:
        for item in items:
            act(item)
            check()


class StopRequest:
    """Whether a signal has asked this process to stop."""

    requested = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the second ends the process at once."""
    stop, signals = StopRequest(), (signal.SIGINT, signal.SIGTERM)

    def request(*_: Any) -> None:
        stop.requested = True
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

    with _handling(request, *signals):
        yield stop


def fatal_interrupts() -> contextlib.AbstractContextManager[None]:
    """Ctrl-C ends the process at once, even while C++ waits and Python would not notice."""
    return _handling(signal.SIG_DFL, signal.SIGINT)


@contextlib.contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Blocks Ctrl-C in this thread; processes started meanwhile never receive one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _instead_of(present: Any, handler: Any) -> contextlib.AbstractContextManager[None]:
    """Sets the handler of SIGINT while the context lasts, if it is `present` now."""
    ours = signal.getsignal(signal.SIGINT) is present
    return _handling(handler, signal.SIGINT) if ours else contextlib.nullcontext()


@contextlib.contextmanager
def _handling(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    """Sets the handler of these signals while the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
