"""The commands about who may call a server: those on the file of tokens, and `audit denials`."""

import json
import subprocess
from pathlib import Path

from dspex_persist.infra.access.tokens import Allowance, Tokens, add
from dspex_persist.state.access import ACCESS, AccessRule, access_control
from dspex_persist.state.denials import Refused
from dspex_persist.state.embedded import SqliteState
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.connecting import connect
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
    limits = ("--rate", "30/min", "--inflight", "5", "--sessions", "2", "--bytes", "1GiB", "--expires", "9000-01-01")
    token = run("token", "new", "old", "--scopes", "read, write", *limits, "--token-file", "t", cwd=tmp_path).strip()
    lines = (tmp_path / "t").read_text().replace("=9000-01-01T00:00:00Z", "=2000-01-01")
    (tmp_path / "t").write_text(f"{lines}ci admin cert:ci.example.org\n")
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
    past = ("--scopes", "read", "--expires", "2020-01-01", "--token-file", "t")
    assert "expires=2020-01-01: it is over already" in run("token", "new", "a", *past, cwd=tmp_path, code=1)


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


def test_a_server_without_tokens_says_which_rules_it_ignores(tmp_path: Path) -> None:
    file, warning = tmp_path / "t", "sessions have rules that do not hold here"
    token = add(file, "ann", ["read", "write"])
    with ServedDatabase(tmp_path / "a.db", {"token_file": file}) as served:
        with connect(served.url, token=token) as state:
            state.initialize_session("ruled", access_control([AccessRule("bob", "read")]))
            state.initialize_session("open")
            state.initialize_session("was ruled", access_control([]))
            state.initialize_session("was ruled", {ACCESS: ""})
            state.initialize_session("ended", access_control([]))
            state.cleanup_session("ended")
        assert served.stop() == 0
    assert warning not in served.process.stderr_tail
    with ServedDatabase(tmp_path / "a.db") as served:
        # It has looked by the time it has ended.
        assert served.stop() == 0
    (logged,) = (json.loads(line) for line in served.process.stderr_tail.splitlines() if warning in line)
    assert (logged["level"], logged["sessions"]) == ("warning", 1)
    with ServedDatabase(tmp_path / "b.db") as served:
        assert served.stop() == 0
    assert warning not in served.process.stderr_tail


def test_more_refused_calls_than_a_table_has(tmp_path: Path) -> None:
    long = "the token is not valid here: it is wrong, or it was revoked, or it has never been there at all"
    with SqliteState(tmp_path / "a.db") as state:
        for number in range(52):
            state.denials.note(Refused(f"n{number}", "unix", "a.B.Call", "", long))
    asked = ("audit", "denials", "--db", "a.db")
    *table, whole, cause, more = run(*asked, cwd=tmp_path).splitlines()
    assert (len(table), whole, cause) == (52, "in full:", long)
    assert more == "more than these 50 rows: --limit 0 shows all"
    assert "more than" not in run(*asked, "--limit", "52", cwd=tmp_path)
    assert len(run(*asked, "--limit", "2", "--csv", cwd=tmp_path).splitlines()) == 3
    assert len(run(*asked, "--json", cwd=tmp_path).splitlines()) == 52
    prune = ("db", "prune", "--older-than", "0s", "--db", "a.db")
    counted = "0 versions and 0 events of 0 sessions, and 51 entries about refused calls"
    assert f"{counted}, would be deleted" in run(*prune, cwd=tmp_path)
    assert f"{counted}, deleted" in run(*prune, "--confirm", cwd=tmp_path)
    assert json.loads(run(*prune, "--json", "--confirm", cwd=tmp_path))["denials"] == 0
