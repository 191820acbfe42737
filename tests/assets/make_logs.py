"""What the logs of the released databases say, as digests: their bytes never change.

`python -m tests.assets.make_logs` writes `logs/REVISION.json` for each database that has none yet.
"""

import io
import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import SessionPrunedError
from dspex_persist.state.recording import write_recording
from dspex_persist.wiring.recordings import import_session

ASSETS: Final = Path(__file__).parent
LOGS: Final = ASSETS / "logs"
_SESSIONS: Final = "SELECT session_id, started_sequence FROM sessions ORDER BY session_key"


def describe_log(asset: Path, folder: Path) -> dict[str, Any]:
    """Digests of a database's chain, of the export of each session, and of the chain that each import makes.

    Those of single lines and commits are cut: they are there to say where a difference begins.
    """
    path = folder / "copy.db"
    shutil.copyfile(asset, path)
    path.chmod(0o600)
    exports = []
    with EmbeddedState(path) as provider:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            sessions = connection.execute(_SESSIONS).fetchall()
        for session_id, started in sessions:
            stream = io.StringIO()
            try:
                header, commits = provider.record(session_id, started=started, reveal=True)
                # Without the answers that are kept under idempotency keys: recordings had none at first.
                write_recording(header, (replace(commit, answer=None) for commit in commits), stream)
            except SessionPrunedError:
                continue
            exports.append({"session": session_id, "started": started} | _describe_export(stream.getvalue(), folder))
    return {"chain": _chain(path), "exports": exports}


def _describe_export(text: str, folder: Path) -> dict[str, Any]:
    copy = folder / f"{sha256(text.encode()).hexdigest()}.db"
    lines = text.splitlines(keepends=True)
    import_session(copy, lines)
    return {
        "sha256": sha256(text.encode()).hexdigest(),
        "lines": " ".join(sha256(line.encode()).hexdigest()[:8] for line in lines),
        "imported": _chain(copy),
    }


def _chain(path: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        hashes = [row[0].hex() for row in connection.execute("SELECT hash FROM commits ORDER BY sequence")]
    return {"head": hashes[-1], "commits": " ".join(each[:8] for each in hashes)}


def main() -> None:
    """Write the missing logs; existing ones are never rewritten."""
    for asset in sorted(ASSETS.glob("*.db")):
        target = LOGS / f"{asset.stem}.json"
        if not target.exists():
            LOGS.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                described = describe_log(asset, Path(folder))
            target.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(target)


if __name__ == "__main__":
    main()
