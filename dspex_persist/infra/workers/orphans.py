"""Keeps worker processes from outliving the process that started them.

Each worker is started by a tiny launcher, which has the system kill the worker when its parent ends, however that ends.
What workers start in turn may escape from that. So the environment of all of them names the run that they belong to,
which is one life of the process that started them, and the worker. They are found by that, and nothing else is ended.
This needs Linux. Elsewhere workers only end with the pool.
"""

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from dspex_persist.infra import forks, holder
from dspex_persist.infra.listen import UNIX_PATH_MAX_BYTES
from dspex_persist.infra.logs import get_logger

RUN: Final = "DSPEX_RUN"
"""The environment variable of a worker that names its run: a hash of the subject, the id, and the owner."""
WORKER: Final = "DSPEX_WORKER"
"""The environment variable of a worker with its id."""

_OWNER: Final = "owner"
_DIRECTORY: Final = re.compile("dspex-[0-9a-f]{16}-[0-9a-f]{16}")
_ROUNDS: Final = 10
_LONGEST_NAME: Final = 32

# Runs in the child, before the worker's own program. Signals and their mask would be inherited from Python and from the
# server. If memory runs out, the system shall end a worker rather than the server.
_LAUNCH: Final = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            least = min(int(file.read()) + 300, 1000)
            file.seek(0)
            file.write(str(least))
    except (OSError, ValueError):
        pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    os.write(2, f"cannot start {sys.argv[2]}: {error.strerror}\\n".encode(errors="replace"))
    os._exit(127)
"""

_logger: Final = get_logger(__name__)


def launched(argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` in a process that ends when the calling thread or process does."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *argv]


class Run:
    """One life of the process that starts workers: their environment, and a private directory for their sockets.

    Usable from several threads.

    Attributes:
        id: Identifies the run.
        directory: A directory that only this user can enter.
    """

    def __init__(self, subject: str) -> None:
        """Make the directory.

        Args:
            subject: What the workers work on, such as the path of a database. At most one process at a time may work
                on it: `sweep` ends what is left of runs of the same subject whose process has ended.

        Raises:
            OSError: The directory cannot be made.
        """
        self.id = secrets.token_hex(8)
        self._subject = hashlib.sha256(subject.encode(errors="surrogateescape")).hexdigest()[:16]
        self._owner = holder.own_text().strip().decode()
        self._numbers = itertools.count(1)
        self.directory = _base() / f"dspex-{self._subject}-{self.id}"
        self.directory.mkdir(mode=0o700)
        (self.directory / _OWNER).write_text(self._owner)
        self._is_ours = True
        forks.register(self)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`. The workers are the parent's."""
        self._is_ours = False

    def new_number(self) -> int:
        """Return a number that no worker of this run has had."""
        return next(self._numbers)

    def environment(self, worker: str) -> dict[str, str]:
        """Return the variables that the environment of a worker has to have."""
        return {RUN: f"{self._subject} {self.id} {self._owner}", WORKER: worker}

    def sweep(self) -> list[int]:
        """End what older runs of the subject have left, if the process that started it has ended.

        Directories of all runs whose process has ended are removed: nobody may come for those of other subjects.

        Blocks while it looks at all processes; call it once, before workers are started.

        Returns:
            The ids of the processes that were ended.
        """
        ended = self._end(self._is_left) if self._is_ours else []
        if ended:
            _logger.warning("ended workers that an earlier process had left", pids=ended)
        for directory in self.directory.parent.glob("dspex-*-*"):
            if _DIRECTORY.fullmatch(directory.name) and _is_left(directory):
                shutil.rmtree(directory, ignore_errors=True)
        return ended

    def end_worker(self, worker: str) -> list[int]:
        """End the processes that a worker of this run has started and left, and return their ids. Blocks."""
        mine = self.environment(worker)
        return self._end(lambda found: found == mine) if self._is_ours else []

    def close(self) -> None:
        """End all that is left of this run's workers, and remove the directory. Blocks. May be called again."""
        if not self._is_ours:
            return
        mine = self.environment("")[RUN]
        self._end(lambda found: found.get(RUN) == mine)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._is_ours = False
        forks.unregister(self)

    def _is_left(self, found: dict[str, str]) -> bool:
        subject, _, rest = found.get(RUN, "").partition(" ")
        run, _, owner = rest.partition(" ")
        return subject == self._subject and run != self.id and holder.has_ended(owner.encode(errors="surrogateescape"))

    @staticmethod
    def _end(belongs: Callable[[dict[str, str]], bool]) -> list[int]:
        """Kill until nothing is found: a process may fork while we look."""
        spared, ended = set(_ancestors()), set[int]()
        for _ in range(_ROUNDS):
            found = {pid for pid in _processes() if pid not in spared and pid not in ended and _kill(pid, belongs)}
            if not found:
                break
            ended |= found
        return sorted(ended)


def _base() -> Path:
    """Where the directory is made: a short path, because those of Unix sockets are limited."""
    for candidate in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        room = UNIX_PATH_MAX_BYTES - len(os.fsencode(candidate)) - len("/dspex--/") - 32
        if candidate and room >= _LONGEST_NAME and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return Path("/tmp")


def _is_left(directory: Path) -> bool:
    try:
        status = directory.lstat()
        return status.st_uid == os.getuid() and holder.has_ended((directory / _OWNER).read_bytes())
    except OSError:
        return False


def _processes() -> Iterator[int]:
    """The processes of this machine that are visible; none where the system has no /proc."""
    with contextlib.suppress(OSError):
        yield from [int(each) for each in os.listdir("/proc") if each.isdecimal()]  # noqa: PTH208 - names only


def _ancestors() -> Iterator[int]:
    """This process, its parent, and so on."""
    pid = os.getpid()
    while pid > 0:
        yield pid
        fields = holder.fields_of(pid)
        pid = int(fields[1]) if fields else 0


def _marks(pid: int) -> dict[str, str]:
    """The variables of a run in the environment with which a process began; {} if they cannot be read."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    if RUN.encode() not in content:
        return {}
    pairs = (each.decode(errors="surrogateescape").partition("=") for each in content.split(b"\0"))
    return {name: text for name, _, text in pairs if name in (RUN, WORKER)}


def _kill(pid: int, belongs: Callable[[dict[str, str]], bool]) -> bool:
    """Kill a process if it belongs to what is ended, and return whether it did."""
    marks = _marks(pid)
    if not marks or not belongs(marks):
        return False
    try:
        # The descriptor stays with the process, whereas the number could be another one's by now.
        descriptor = os.pidfd_open(pid)
    except OSError:
        # It is gone, or the system has no such descriptors.
        descriptor = None
    try:
        if _marks(pid) != marks:
            return False
        if descriptor is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return True
