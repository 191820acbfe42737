"""The start of a worker, until it answers, and its end. Knows nothing of lending."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Generic

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.workers.errors import setting_of
from dspex_persist.infra.workers.leases import C, Contact
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.worker import Worker, WorkerCommand, WorkerStartError

# How long closing what belongs to a worker may take.
_CLOSE_S: Final = 10.0

_logger: Final = get_logger(__name__)


class Starter(Generic[C]):
    """Starts the workers of a pool, and ends them.

    Args:
        pool: The name of the pool.
        command: How each worker is started.
        contact: Makes what the user of the pool keeps for a worker, given the id of that.
        run: What the workers belong to.
        settings: What the options are called in errors; see `WorkerPool`.
        keep: Runs the end of a worker that did not start, for which nobody waits.
    """

    def __init__(
        self,
        pool: str,
        command: WorkerCommand,
        contact: Callable[[str], C],
        run: Run,
        settings: Mapping[str, str],
        keep: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.command = command
        self._pool = pool
        self._contact = contact
        self._run = run
        self._settings = settings
        self._keep = keep
        self._logger = _logger.bind(pool=pool)

    async def start(self) -> tuple[Worker, C]:
        """Start a worker, and return it with its contact as soon as it answers.

        Raises:
            WorkerStartError: It did not, or not in time.
        """
        worker_id = f"{self._pool}-{self._run.new_number()}"
        contact = self._contact(worker_id)
        worker: Worker | None = None
        try:
            async with asyncio.timeout(self.command.ready_timeout_s):
                placeholders = await contact.open()
                worker = Worker(self.command, self._run, worker_id, placeholders)
                await _get_ready(worker, contact)
        except BaseException as error:
            self._keep(self.end(worker, contact))
            if isinstance(error, WorkerStartError | asyncio.CancelledError):
                raise
            if worker is None and isinstance(error, Exception):
                raise WorkerStartError(worker_id, f"what it needs cannot be opened: {error}") from error
            tail = "" if worker is None else worker.tail
            if isinstance(error, TimeoutError):
                setting = setting_of(self._pool, "ready_timeout_s", self._settings)
                limit = f"within {self.command.ready_timeout_s:g} s ({setting})"
                what = "said that it is ready, but did not answer" if worker and worker.address else "was not ready"
                raise WorkerStartError(worker_id, f"it {what} {limit}", tail) from error
            if isinstance(error, Exception):
                raise WorkerStartError(worker_id, f"it does not answer as it should: {error}", tail) from error
            raise
        return worker, contact

    async def end(self, worker: Worker | None, contact: C) -> None:
        """End a worker, if there is one, and close its contact."""
        try:
            if worker is not None:
                await worker.stop()
        finally:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await contact.close()
            except Exception as error:
                self._logger.error("closing what belongs to a worker failed", exc_info=error)


async def _get_ready(worker: Worker, contact: Contact) -> None:
    address = await worker.ready()
    talking = asyncio.ensure_future(_talk(contact, address))
    either: set[asyncio.Future[Any]] = {talking, worker.exited}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if worker.has_exited:
            raise WorkerStartError(worker.id, worker.ending, worker.tail)
        await talking
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


async def _talk(contact: Contact, address: str) -> None:
    await contact.connect(address)
    await contact.ping()
