"""Copies of databases for tests that change them, and what others may do to a database's file while it is open."""

import os
import shutil
from pathlib import Path


def copy_database(source: Path, target: Path) -> Path:
    """A closed database somewhere else, with its anchor."""
    shutil.copy(source, target)
    shutil.copy(f"{source}.anchor", f"{target}.anchor")
    return target


def remove(file: Path) -> None:
    file.unlink()


def rename(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))


def replace(file: Path) -> None:
    """As `mv` of another file does."""
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    new.replace(file)


def truncate(file: Path) -> None:
    os.truncate(file, 0)
