"""What a server remembers of the database on its own disk: its last commit, so that a lost one is found at a start."""

from pathlib import Path

from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.store.anchor import Anchor, Head
from dspex_persist.state.store.engine import open_side_file


class ServerAnchor:
    """A file in a directory, named after the id of the database. It is written after each commit that is learnt.

    Servers of one machine may share the directory. Each writes what it knows, which is in the database in any case.

    Args:
        directory: Where the file is, or will be; it is created if missing, for its owner alone.
        database_id: The id of the database.
        name: How errors name the database.

    Raises:
        NotADatabaseError: The file cannot be opened or created.
    """

    def __init__(self, directory: Path, database_id: str, name: str) -> None:
        self.path = directory / f"{database_id}.anchor"
        self._name = name
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise NotADatabaseError(name, f"its anchor {self.path}: {error.strerror or error}") from error
        self._anchor = Anchor(open_side_file(directory / database_id, ".anchor"))

    def read(self) -> Head | None:
        """Return the commit that was known last; None if there is none."""
        return self._anchor.read()

    def write(self, head: Head) -> None:
        """Remember a commit that is in the database."""
        self._anchor.write(head)

    def close(self) -> None:
        """Close the file."""
        self._anchor.close()
