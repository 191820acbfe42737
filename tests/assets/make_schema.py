"""Writes what the migrations make of an empty file as a script: run `python -m tests.assets.make_schema`."""

from pathlib import Path

import dspex_persist.state.store.migrate as migrations

SCRIPT = Path(migrations.__file__).with_name("schema.sql")


def script() -> str:
    """Return the script."""
    memory = migrations.migrated()
    try:
        with memory.connect() as connection:
            return migrations.script_of(connection)
    finally:
        memory.dispose()


if __name__ == "__main__":
    SCRIPT.write_text(script(), encoding="utf-8")
