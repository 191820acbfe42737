"""The revision of a file's schema, and its upgrade."""

from dataclasses import dataclass
from pathlib import Path

from dspex_persist.state.store import migrate, recovery
from dspex_persist.state.store.maintenance.opening import explained, find_revision, owning, read_anchor, refuse_missing
from dspex_persist.state.store.schema import REVISION


@dataclass(frozen=True, slots=True)
class RevisionReport:
    """The revision of a file's schema (None: it is empty), this release's, and whether they are the same."""

    path: Path
    revision: str | None
    head: str
    is_head: bool


def current(path: Path) -> RevisionReport:
    """The revision of the file's schema. A newer one than this release's is a `NewerSchemaError`."""
    with explained(path):
        refuse_missing(path)
        found = find_revision(path)
    return RevisionReport(path, found, REVISION, found == REVISION)


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """An upgrade: from which revision (None: the file was empty) to which, and the backup that was made before."""

    path: Path
    found: str | None
    revision: str
    backup: Path | None


def upgrade(path: Path) -> UpgradeReport:
    """Bring the schema of the file to this release's revision, after a backup beside it; whole or not at all."""
    with owning(path) as writer:
        upgraded = migrate.upgrade(writer, path)
        with writer.begin() as connection:
            recovery.recover(connection, read_anchor(path), path)
    return UpgradeReport(path, upgraded.revision, REVISION, upgraded.backup)
