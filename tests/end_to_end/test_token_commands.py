"""The commands about who may call a server: those on the file of tokens, and `audit denials`."""

import json
import subprocess
from pathlib import Path

from dspex_persist.infra.access.tokens import Allowance, Tokens
from dspex_persist.state.denials import Refused
from dspex_persist.state.embedded import SqliteState
from tests.deadline import within
from tests.end_to_end.test_db_commands import clean_environment
from tests.prepared import commands


def run(*words: str, cwd: Path, code: int = 0) -> str:
    done: subprocess.CompletedProcess[str] = commands().run(
        list(words), cwd=cwd, env=clean_environment(), timeout_s=within(60)
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_tokens_with_limits_and_an_end(tmp_path: Path) -> None:
    limits = ("--rate", "30/min", "--inflight", "5", "--sessions", "2", "--bytes", "1GiB", "--expires", "2000-01-01")
    token = run("token", "new", "old", "--scopes", "read,write", *limits, "--token-file", "t", cwd=tmp_path).strip()
    (tmp_path / "t").write_text((tmp_path / "t").read_text() + "ci admin cert:ci.example.org\n")
    tokens = Tokens(tmp_path / "t")
    assert tokens.find(token) is None, "it has expired"
    assert tokens.allowance_of("old") == Allowance(0.5, 5, 2, 1024**3)
    assert run("token", "list", "--token-file", "t", cwd=tmp_path).splitlines() == [
        "old  read,write  rate=0.5/s  inflight=5  sessions=2  bytes=1,073,741,824  expires=2000-01-01T00:00:00Z"
        "  (expired)",
        "ci  admin  certificate=ci.example.org",
    ]
    listed = json.loads(run("token", "list", "--json", "--token-file", "t", cwd=tmp_path))["tokens"]
    assert listed[0] | {"name": "", "scopes": []} == {
        "name": "",
        "scopes": [],
        "rate": 0.5,
        "inflight": 5,
        "sessions": 2,
        "bytes": 1024**3,
        "expires": "2000-01-01T00:00:00Z",
        "expired": True,
    }
    refused = run("token", "new", "a", "--scopes", "read", "--rate", "9", "--token-file", "t", cwd=tmp_path, code=1)
    assert "rate=9: it must be a number of calls in a time, such as 100/s" in refused


def test_refused_calls(tmp_path: Path) -> None:
    with SqliteState(tmp_path / "a.db") as state:
        for missing in ("scope write", "scope write", "scope admin"):
            state.denials.note(Refused("ada", "ipv4:10.0.0.7", "a.B.Call", "s", missing))
        state.denials.note(Refused("", "unix", "a.B.Ping", "", "=no token"))
    table = run("audit", "denials", "--db", "a.db", "--identity", "a*", cwd=tmp_path)
    assert [line.split()[2:] for line in table.splitlines()[2:]] == [
        ["ada", "ipv4:10.0.0.7", "Call", "s", "scope", "admin", "1"],
        ["ada", "ipv4:10.0.0.7", "Call", "s", "scope", "write", "2"],
    ]
    (line,) = run("audit", "denials", "s", "--db", "a.db", "--json", "--limit", "1", cwd=tmp_path).splitlines()
    assert json.loads(line)["missing"] == "scope admin"
    assert "'=no token" in run("audit", "denials", "--db", "a.db", "--csv", "--rpc", "Ping", cwd=tmp_path)
    assert run("audit", "denials", "--db", "a.db", "--until", "1h", cwd=tmp_path).strip() == "no calls were refused"
