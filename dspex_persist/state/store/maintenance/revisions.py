"""The revision of a file's schema, and its upgrade."""

from dataclasses import dataclass
from pathlib import Path

from dspex_persist.state.store import migrate, recovery
from dspex_persist.state.store.maintenance.opening import (
    find_revision,
    owning,
    read_anchor,
    refuse_missing,
    translated_errors,
)
from dspex_persist.state.store.schema import REVISION


@dataclass(frozen=True, slots=True)
class RevisionReport:
    """The revision of a file's schema (None if it is empty), this release's (`head`), and whether they are the same."""

    path: Path
    revision: str | None
    head: str
    is_head: bool


def current(path: Path) -> RevisionReport:
    """Return the revision of the file's schema; raise `NewerSchemaError` if it is newer than this release's."""
    with translated_errors(path):
        refuse_missing(path)
        revision = find_revision(path)
    return RevisionReport(path, revision, REVISION, revision == REVISION)


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """An upgrade from the revision `found` (None if the file was empty) to `revision`, and the backup made before."""

    path: Path
    found: str | None
    revision: str
    backup: Path | None


def upgrade(path: Path) -> UpgradeReport:
    """Upgrade the file's schema to this release's revision, whole or not at all, after a backup next to the file."""
    with owning(path) as writer:
        upgraded = migrate.upgrade(writer, path)
        with writer.begin() as connection:
            recovery.recover(connection, read_anchor(path), path)
    return UpgradeReport(path, upgraded.revision, REVISION, upgraded.backup)
