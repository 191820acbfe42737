"""What a forked child must not share with its parent: descriptors, locks, and whatever threads have in hand.

A child has a copy of everything, and none of the threads. Descriptors that are owned here become /dev/null in it, and
objects that have asked for it are told that they live in a child now. A fork waits, for a moment, until nobody is in
the middle of something (`busy`) that a child could not be given half done.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol
from weakref import WeakSet

STRAY_CHILD: Final = 70
"""How a child ends that would go on as one of its parent's threads."""
_PATIENCE_S: Final = 0.5
"""How long a fork waits for what is under way. Reading a whole file takes longer than a fork can be held up."""


class Heir(Protocol):
    """What has to change in a child."""

    def forked(self, *, quiet: bool) -> None:
        """This process is a child, and the calling thread its only one.

        Not `quiet`: some thread was in the middle of something when the process was forked, so what it had in hand is
        in no state to be touched. Locks may be held by threads that are no more: make new ones.
        """


_heirs: WeakSet[Heir] = WeakSet()
_descriptors: set[int] = set()
_turn = threading.Condition()
_inside: dict[int, int] = {}
_forkers = 0
_guarded: tuple[signal.Signals, ...] = ()
_mask: set[int] = set()


def tell(heir: Heir) -> None:
    """Have `heir` told in each child; it is not kept alive for that."""
    _heirs.add(heir)


def forget(heir: Heir) -> None:
    """Have `heir` told no more."""
    _heirs.discard(heir)


def keep_for_ever(thing: object) -> None:
    """In a child: have nothing free `thing`, not even the end of the interpreter, which would close what it holds."""
    # A reference that nobody has, so that nobody drops it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def own(descriptor: int) -> int:
    """Keep an open descriptor for this process alone. To close it, `close` must be called."""
    _descriptors.add(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    """Close a descriptor that is owned here."""
    _descriptors.discard(descriptor)
    os.close(descriptor)


def blank(descriptor: int) -> None:
    """Let go of a descriptor that came from the parent. Its number stays taken: whoever closes it, or writes to it,
    because he does not know of the fork must not hit what was opened since."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, descriptor, inheritable=False)
    finally:
        os.close(null)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """While this lasts, forks wait; and it waits for a fork that has begun to wait before it."""
    me = threading.get_ident()
    with _turn:
        while _forkers and me not in _inside:
            _turn.wait()
        _inside[me] = _inside.get(me, 0) + 1
    try:
        yield
    finally:
        # Not there any more in a child of a fork in the middle of this.
        with _turn:
            left = _inside.get(me, 1) - 1
            if left:
                _inside[me] = left
            else:
                _inside.pop(me, None)
                _turn.notify_all()


def guard_signals(*numbers: signal.Signals) -> None:
    """Have children end of these signals, whatever this process does with them.

    The descriptor that wakes an event loop is shared with its child: what the child writes there, of a signal that it
    got, is a signal for the parent. So they are held back until the child has let go of it.
    """
    global _guarded
    _guarded = numbers


def _reset_signals() -> None:
    if _guarded:
        signal.set_wakeup_fd(-1)
    for number in _guarded:
        signal.signal(number, signal.SIG_DFL)


def end_on(loop: asyncio.AbstractEventLoop) -> None:
    """In a child: end it when it comes back to its parent's event loop, before it takes away what is for the parent."""
    # Nobody else is left who could.
    loop.call_soon(os._exit, STRAY_CHILD)


def blank_sockets(address: object) -> None:
    """In a child: let go of the sockets with this address, those that listen and those that were accepted there."""
    for descriptor in [int(each.name) for each in Path("/dev/fd").iterdir()]:
        # The folder's own descriptor is closed by now.
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
    global _forkers, _mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _guarded)
    _turn.acquire()
    _mask = set(mask)
    _forkers += 1
    me = threading.get_ident()
    _turn.wait_for(lambda: not _inside.keys() - {me}, _PATIENCE_S)


def _after_in_parent() -> None:
    global _forkers
    _forkers -= 1
    mask = _mask
    _turn.notify_all()
    _turn.release()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_in_child() -> None:
    try:
        _tell_all(quiet=not _inside)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _tell_all(*, quiet: bool) -> None:
    global _turn, _forkers
    _turn, _forkers = threading.Condition(), 0
    _inside.clear()
    for descriptor in _descriptors:
        # It may have been closed by somebody who did not say so.
        with contextlib.suppress(OSError):
            blank(descriptor)
    _descriptors.clear()
    _reset_signals()
    for heir in list(_heirs):
        heir.forked(quiet=quiet)


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
