"""Maintenance of a database file: check, upgrade, back up, restore, measure, prune and shrink it.

Functions that only read use read-only connections and short transactions, so they work while a server writes. Functions
that change the file take the ownership lock first. They raise an `OpenError` if the file cannot be used, and a
`StorageError` if SQLite or the disk fails.
"""

from dspex_persist.state.store.maintenance.backups import BackupReport, backup
from dspex_persist.state.store.maintenance.checks import CheckReport, check
from dspex_persist.state.store.maintenance.opening import refuse_files_of, refuse_owned
from dspex_persist.state.store.maintenance.pruning import PrunedReport, PruneInUseError, prune
from dspex_persist.state.store.maintenance.reading import open_audit, open_recording
from dspex_persist.state.store.maintenance.restores import RestoreReport, restore
from dspex_persist.state.store.maintenance.revisions import RevisionReport, UpgradeReport, current, upgrade
from dspex_persist.state.store.maintenance.sizes import Share, StatsReport, StoredTable, sqlite_warning, stats
from dspex_persist.state.store.maintenance.vacuums import VacuumReport, vacuum
from dspex_persist.state.store.verify import MOST_PROBLEMS

__all__ = [
    "MOST_PROBLEMS",
    "BackupReport",
    "CheckReport",
    "PruneInUseError",
    "PrunedReport",
    "RestoreReport",
    "RevisionReport",
    "Share",
    "StatsReport",
    "StoredTable",
    "UpgradeReport",
    "VacuumReport",
    "backup",
    "check",
    "current",
    "open_audit",
    "open_recording",
    "prune",
    "refuse_files_of",
    "refuse_owned",
    "restore",
    "sqlite_warning",
    "stats",
    "upgrade",
    "vacuum",
]
