"""Looking after a file: check it, upgrade it, back it up, restore it, see where its bytes are, shrink it.

What only reads uses read-only connections and short transactions, and so works while a server writes. What changes
the file takes the ownership lock first. Every error is an `OpenError`, or a `StorageError` for what SQLite refuses.
"""

from dspex_persist.state.store.maintenance.backups import BackupReport, backup
from dspex_persist.state.store.maintenance.checks import MOST_PROBLEMS, CheckReport, check
from dspex_persist.state.store.maintenance.opening import refuse_files_of, refuse_owned
from dspex_persist.state.store.maintenance.pruning import PrunedReport, PruneInUseError, prune
from dspex_persist.state.store.maintenance.reading import open_audit, open_recording
from dspex_persist.state.store.maintenance.restores import RestoreReport, restore
from dspex_persist.state.store.maintenance.revisions import RevisionReport, UpgradeReport, current, upgrade
from dspex_persist.state.store.maintenance.sizes import Share, StatsReport, StoredTable, sqlite_warning, stats
from dspex_persist.state.store.maintenance.vacuums import VacuumReport, vacuum

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
