"""The file of tokens: what is in it, what is wrong with it, and what a change does."""

import hashlib
from pathlib import Path

import pytest

from dspex_persist.infra.tokens import SCOPES, Identity, TokenFileError, Tokens, add, listed, revoke


def line(name: str, scopes: str, token: str) -> str:
    return f"{name} {scopes} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.touch(0o600)
    file.write_text(f"# who\n\n{line('a', 'read,write', 'one')}{line('b', 'admin', 'two')}{line('b', 'read', 'new')}")
    return file


def test_a_token_is_found_by_its_hash(path: Path) -> None:
    tokens = Tokens(path)
    assert tokens.find("one") == Identity("a", frozenset({"read", "write"}))
    assert tokens.find("new") == Identity("b", frozenset({"read"})), "one identity may have several tokens"
    for wrong in ("", "on", "one ", "é", "\udcff", hashlib.sha256(b"one").hexdigest()):
        assert tokens.find(wrong) is None


def test_admin_has_all_scopes_and_no_other_scope_has_another() -> None:
    assert all(Identity("a", frozenset({"admin"})).may(scope) for scope in SCOPES)
    for given in ("read", "write", "execute"):
        assert [scope for scope in SCOPES if Identity("a", frozenset({given})).may(scope)] == [given]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a read", "line 1: a line is NAME SCOPES sha256:HASH"),
        ("\na b c d", "line 2: a line is NAME"),
        (line("a", "reed", "x"), "there is no scope 'reed': the scopes are read, write, execute, admin"),
        (line("a", "read,", "x"), "there is no scope ''"),
        (line("a;b", "read", "x"), "a name has at most 64"),
        (line("a" * 65, "read", "x"), "a name has at most 64"),
        ("a read sha256:12", "64 hexadecimal digits"),
        (f"a read {'0' * 64}", "64 hexadecimal digits"),
        (line("a", "read", "x") + line("b", "admin", "x"), "line 2: the token of another line"),
    ],
)
def test_a_line_that_is_wrong_at_the_start(path: Path, text: str, reason: str) -> None:
    path.write_text(text)
    with pytest.raises(TokenFileError, match=reason) as raised:
        Tokens(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "sha256:12" not in str(raised.value)


@pytest.mark.parametrize("mode", [0o620, 0o604, 0o602, 0o644])
def test_a_file_that_others_may_read_or_change_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(TokenFileError, match=f"its mode is {mode:04o}.*: chmod 600 {path}"):
        Tokens(path)
    path.chmod(0o640)
    assert Tokens(path).find("one")


def test_what_is_not_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="No such file"):
        Tokens(tmp_path / "missing")
    with pytest.raises(TokenFileError, match="directory"):
        Tokens(tmp_path)
    binary = tmp_path / "binary"
    binary.touch(0o600)
    binary.write_bytes(b"\xff")
    with pytest.raises(TokenFileError, match="not UTF-8"):
        Tokens(binary)


def test_a_token_is_revoked_by_editing_the_file(path: Path) -> None:
    tokens = Tokens(path)
    before = path.read_text()
    path.write_text(line("b", "admin", "two"))
    assert (tokens.find("one"), tokens.find("two")) == (None, Identity("b", frozenset({"admin"})))
    path.write_text(before)
    assert tokens.find("one")
    path.write_text(line("a", "read", "one") + "nonsense\n")
    assert (tokens.find("one"), tokens.find("two")) == (Identity("a", frozenset({"read"})), None)
    path.chmod(0o666)
    assert tokens.find("one") is None, "nobody knows who wrote it"
    path.chmod(0o600)
    assert tokens.find("one")
    path.unlink()
    assert tokens.find("one") is None


def test_tokens_are_added_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    first = add(file, "a", ["read", "write"])
    assert (file.stat().st_mode & 0o777, first in file.read_text()) == (0o600, False)
    file.chmod(0o640)
    file.write_text(file.read_text() + "# kept: a")
    tokens = Tokens(file)
    second, third = add(file, "b", ["admin"]), add(file, "a", ["execute"])
    assert [tokens.find(each) for each in (first, second, third)] == listed(file)
    assert [each.name for each in listed(file)] == ["a", "b", "a"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert (revoke(file, "a"), revoke(file, "a")) == (2, 0)
    assert [tokens.find(each) for each in (first, second, third)] == [None, listed(file)[0], None]
    assert "# kept: a" in file.read_text()
    for name, scopes in (("a b", ["read"]), ("a", ["reed"]), ("", ["read"]), ("a\n", ["read"]), ("a#", ["read"])):
        with pytest.raises(TokenFileError):
            add(file, name, scopes)
    assert [each.name for each in tmp_path.iterdir()] == ["tokens"]
    with pytest.raises(TokenFileError, match="cannot write it: No such file"):
        add(tmp_path / "missing" / "tokens", "a", ["read"])
