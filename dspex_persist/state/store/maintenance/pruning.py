"""Delete old history from a file that no server has open."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from dspex_persist.state.errors import DatabaseInUseError, Hint, OutcomeUnknownError
from dspex_persist.state.groups import Job
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.history import prune_plan
from dspex_persist.state.store.maintenance.opening import reading, refuse_older
from dspex_persist.state.store.maintenance.sizes import find_scalar
from dspex_persist.state.store.session_store import open_groups


@dataclass(frozen=True, slots=True)
class PrunedReport:
    """What was pruned or, unless `confirmed`, would be. `free_bytes`: the size of the free pages in the file now."""

    path: Path
    confirmed: bool
    sessions: int
    versions: int
    events: int
    markers: int
    denials: int
    free_bytes: int
    duration_s: float


@dataclass(eq=False)
class PruneInUseError(DatabaseInUseError):
    """Another process owns the database to be pruned."""

    advice = Hint.PRUNE_ON_SERVER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.advice = Hint.PRUNE_ON_SERVER


def prune(path: Path, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PrunedReport:
    """Delete the history that `policy` describes, as the owner of the file.

    Args:
        path: The database.
        policy: What to delete.
        confirm: Whether to delete it; if false, only report what would be deleted.
        progress: Called with what was done so far.

    Raises:
        PruneInUseError: Another process owns the file.
        InvalidArgumentError: The policy is invalid, or deletes nothing.
        NotInHistoryError: No session ever had the policy's session id.
    """
    started = time.monotonic()
    with reading(path) as readers:
        refuse_older(path)
        report = None if confirm else prune_plan.run(readers, policy, None, progress)
    if report is None:
        report = _prune(path, policy, progress)
    with reading(path) as readers, snapshot(readers) as connection:
        free = find_scalar(connection, "PRAGMA freelist_count") * find_scalar(connection, "PRAGMA page_size")
    counts = (report.sessions, report.versions, report.events, report.markers, report.denials)
    return PrunedReport(path, confirm, *counts, free, time.monotonic() - started)


def _prune(path: Path, policy: PrunePolicy, progress: Progress) -> PruneReport:
    try:
        groups = open_groups(path)
    except DatabaseInUseError as error:
        raise PruneInUseError(error.path, error.pid, error.address) from None
    try:

        def write(jobs: list[Job]) -> None:
            for outcome in groups.write_group(jobs):
                if outcome.error is not None:
                    raise outcome.error

        report = prune_plan.run(groups.log.readers, policy, write, progress)
        if policy.denials_before is not None:
            report = replace(report, denials=groups.log.forget_denials(policy.denials_before))
    except OutcomeUnknownError:
        groups.abandon()
        raise
    except BaseException:
        groups.close()
        raise
    groups.close()
    return report
