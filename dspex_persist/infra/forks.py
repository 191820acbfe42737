"""Keeps forked children from sharing descriptors, locks and half-finished work with their parent.

A child gets a copy of everything except the other threads. Descriptors that are owned here become /dev/null in it, and
registered objects are notified that they are in a child now. A fork waits a moment for critical sections (`busy`) to
finish, so that the child does not inherit them half done.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol
from weakref import WeakSet

STRAY_CHILD: Final = 70
"""The exit code of a child whose code returns into its parent's thread pool or event loop."""
_PATIENCE_S: Final = 0.5
"""How long a fork waits for critical sections. Some read a whole file, which takes longer than a fork may wait."""


class ForkListener(Protocol):
    """An object that has to change in a child process."""

    def forked(self, *, quiet: bool) -> None:
        """Adapt to being in a child process, whose only thread is the calling one.

        Locks may be held by threads that no longer exist, so make new ones.

        Args:
            quiet: No thread was in a critical section during the fork. Otherwise the objects that such a section uses
                are in an undefined state and must not be touched.
        """


_listeners: WeakSet[ForkListener] = WeakSet()
_descriptors: set[int] = set()
_turn = threading.Condition()
_forkers = 0
_quiet = True
_process = os.getpid()
_guarded: tuple[signal.Signals, ...] = ()
_mask: set[int] = set()


def process() -> int:
    """Return the number of this process, without a system call."""
    return _process


def register(listener: ForkListener) -> None:
    """Have `listener.forked` called in each child. Keeps only a weak reference."""
    _listeners.add(listener)


def unregister(listener: ForkListener) -> None:
    """Undo `register`."""
    _listeners.discard(listener)


class Lock:
    """A lock that is free in a forked child, where a thread that held it does not exist. Use it in a `with` block."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        register(self)

    def forked(self, *, quiet: bool) -> None:
        """See `ForkListener`."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def keep_forever(thing: object) -> None:
    """Never free `thing`, not even at the end of the interpreter; for objects whose end would affect the parent."""
    # A reference without an owner, which nothing can drop.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def own(descriptor: int) -> int:
    """Hide an open descriptor from children, and return it. Close it with `close`."""
    _descriptors.add(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    """Close a descriptor that is owned here."""
    _descriptors.discard(descriptor)
    os.close(descriptor)


def blank(descriptor: int) -> None:
    """Replace a descriptor inherited from the parent by /dev/null.

    The number stays in use: code that does not know of the fork may still close it or write to it, which must not hit
    a file opened since.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, descriptor, inheritable=False)
    finally:
        os.close(null)


class _Sections:
    """The critical sections that a thread is in."""

    def __init__(self) -> None:
        self.thread_id = threading.get_ident()
        self.count = 0


class _Here(threading.local):
    """What belongs to the calling thread; it goes with the thread, whose number another one may then get."""

    def __init__(self) -> None:
        self.sections = _Sections()
        _known.add(self.sections)


_known: WeakSet[_Sections] = WeakSet()
_here = _Here()


class _Busy:
    """A critical section. It has no state, so one object serves all, which is cheaper than a generator for each."""

    # No local variable refers to the sections: the traceback of an exception would keep them after the thread.

    def __enter__(self) -> None:
        with _turn:
            while _forkers and not _here.sections.count:
                _turn.wait()
            _here.sections.count += 1

    def __exit__(self, *_: object) -> None:
        with _turn:
            # In a child that was forked during the section it is 0.
            if count := _here.sections.count:
                _here.sections.count = count - 1
                if _forkers and count == 1:
                    _turn.notify_all()


_BUSY: Final = _Busy()


def busy() -> AbstractContextManager[None]:
    """Mark a critical section: forks wait until it ends, and it waits for a fork that is already waiting."""
    return _BUSY


class _Aside:
    """The end of a critical section that begins again."""

    __slots__ = ("_count",)

    def __enter__(self) -> None:
        with _turn:
            self._count, _here.sections.count = _here.sections.count, 0
            if self._count and _forkers:
                _turn.notify_all()

    def __exit__(self, *_: object) -> None:
        with _turn:
            while _forkers:
                _turn.wait()
            _here.sections.count = self._count


def aside() -> AbstractContextManager[None]:
    """Leave the critical sections of this thread while it waits for another one, which may need a fork to end."""
    return _Aside()


def inside() -> set[int]:
    """Return the threads that are in critical sections."""
    with _turn:
        return {each.thread_id for each in _known if each.count}


def guard_signals(*numbers: signal.Signals) -> None:
    """Reset these signals to their default action in children.

    An event loop's wake-up descriptor is shared with the child: a signal that the child writes there would reach the
    parent. So the signals are blocked during the fork, until the child no longer uses the descriptor.
    """
    global _guarded
    _guarded = numbers


def _reset_signals() -> None:
    if _guarded:
        signal.set_wakeup_fd(-1)
    for number in _guarded:
        signal.signal(number, signal.SIG_DFL)


def end_on(loop: asyncio.AbstractEventLoop) -> None:
    """In a child: exit when the code returns to the parent's event loop, before that consumes events of the parent."""
    loop.call_soon(os._exit, STRAY_CHILD)


def blank_sockets(address: object) -> None:
    """In a child: blank the sockets with this address, listening and accepted ones.

    Args:
        address: A port, or the path of a Unix socket.
    """
    for descriptor in [int(each.name) for each in Path("/dev/fd").iterdir()]:
        # The list includes the descriptor of /dev/fd itself, which is closed by now.
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _address_of(descriptor) == address:
                blank(descriptor)


def _address_of(descriptor: int) -> object:
    """A port, or the path of a Unix socket."""
    probe = socket.socket(fileno=descriptor)
    try:
        name = probe.getsockname()
    finally:
        probe.detach()
    return name[1] if isinstance(name, tuple) else name


def _before() -> None:
    global _forkers, _mask, _quiet
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _guarded)
    _turn.acquire()
    _mask = set(mask)
    _forkers += 1
    me = threading.get_ident()
    _turn.wait_for(lambda: not inside() - {me}, _PATIENCE_S)
    # The child no longer knows what the other threads were at.
    _quiet = not inside()


def _after_in_parent() -> None:
    global _forkers
    _forkers -= 1
    mask = _mask
    _turn.notify_all()
    _turn.release()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_in_child() -> None:
    global _process
    _process = os.getpid()
    try:
        _notify_all(quiet=_quiet)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _notify_all(*, quiet: bool) -> None:
    global _turn, _forkers
    _turn, _forkers = threading.Condition(), 0
    _here.sections.count = 0
    _known.clear()
    _known.add(_here.sections)
    for descriptor in _descriptors:
        # It may have been closed without `close`.
        with contextlib.suppress(OSError):
            blank(descriptor)
    _descriptors.clear()
    _reset_signals()
    for listener in list(_listeners):
        listener.forked(quiet=quiet)


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
