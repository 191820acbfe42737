"""The file of tokens: what is in it, what is wrong with it, and what a change does."""

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from freezegun import freeze_time

from dspex_persist.infra.access.tokens import (
    SCOPES,
    Allowance,
    Identity,
    TokenFileError,
    Tokens,
    add,
    digest_of,
    listed,
    revoke,
)
from tests.logs import capture_logs


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
        ("a read cert:spiffe://x/a#b", "line 1: a comment begins within the name of a certificate"),
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


def test_the_token_that_was_found_last_is_forgotten_with_the_file(path: Path) -> None:
    tokens = Tokens(path)
    one = tokens.find("one")
    assert [tokens.find(each) for each in ("one", "other", "one", "two", "one")][::2] == [one] * 3
    path.write_text(line("a", "admin", "one"))
    assert [tokens.find("one") for _ in range(2)] == [Identity("a", frozenset({"admin"}))] * 2
    path.write_text(line("a", "admin", "two"))
    assert [tokens.find("one") for _ in range(2)] == [None] * 2


def test_a_file_as_other_systems_write_it(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + line("a", "read", "one").replace("\n", "\r\n").encode())
    assert Tokens(path).find("one") == Identity("a", frozenset({"read"}))


def test_a_file_that_the_system_did_not_open_is_read_by_the_next_call(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(path)
    path.write_text(line("a", "read", "one") + line("b", "admin", "two"))

    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as full, capture_logs() as logs:
        full.setattr(os, "open", refused)
        assert [tokens.find("one") for _ in range(3)] == [None] * 3
    assert [each["reason"] for each in logs] == ["cannot read it: Too many open files"], "once, not for each call"
    assert tokens.find("one")
    assert tokens.find("two")


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


def test_no_change_undoes_another_at_the_same_time(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    add(file, "gone", ["read"])
    with ThreadPoolExecutor(9) as threads:
        added = [threads.submit(add, file, f"n{number}", ["read"]) for number in range(8)]
        revoked = threads.submit(revoke, file, "gone")
    assert revoked.result() == 1
    assert {each.name for each in listed(file)} == {f"n{number}" for number in range(8)}
    tokens = Tokens(file)
    assert all(tokens.find(each.result()) for each in added)


def test_the_file_behind_a_link_is_changed(tmp_path: Path) -> None:
    file, link = tmp_path / "real" / "tokens", tmp_path / "link"
    file.parent.mkdir()
    link.symlink_to(file)
    token = add(link, "a", ["read"])
    tokens = Tokens(link)
    assert tokens.find(token)
    assert revoke(link, "a") == 1
    assert (tokens.find(token), link.is_symlink(), listed(file)) == (None, True, [])
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(TokenFileError, match="link to itself"):
        revoke(loop, "a")


# How much, until when, and certificates


def test_what_may_follow_the_credential(path: Path) -> None:
    words = "rate=6/min inflight=20 sessions=50 bytes=1GiB expires=2027-01-01"
    path.write_text(
        line("a", "read", "one").replace("\n", f" {words} # as agreed\n") + "ci admin cert:ci.example.org\n"
    )
    tokens = Tokens(path)
    ours = tokens.look_up(digest_of("one"))
    assert ours is not None
    assert ours.allowance == Allowance(0.1, 20, 50, 1024**3)
    assert ours.expires_at == datetime(2027, 1, 1, tzinfo=UTC)
    ci = tokens.find_certificate(["other", "ci.example.org"])
    assert ci == Identity("ci", frozenset({"admin"}), certificate="ci.example.org")
    assert tokens.find_certificate(["one", ""]) is None
    assert listed(path) == [ours, ci]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("rate=100", "rate=100: it must be a number of calls in a time, such as 100/s"),
        ("rate=0/s", "calls in a time"),
        ("inflight=0", "whole number above 0"),
        ("inflight=²", "whole number above 0"),
        ("sessions=many", "whole number above 0"),
        ("bytes=1GB", "such as 1GiB"),
        ("expires=soon", "a day or a time"),
        ("expires=2027-01-01 expires=2028-01-01", "expires= is there twice"),
        ("burst=3", "'burst=3' means nothing after the credential: there are rate=, inflight=, sessions=, bytes=, exp"),
        ("alone", "means nothing"),
    ],
)
def test_words_that_mean_nothing(path: Path, word: str, reason: str) -> None:
    path.write_text(line("a", "read", "one").replace("\n", f" {word}\n"))
    with pytest.raises(TokenFileError, match=reason):
        Tokens(path)
    path.write_text(f"a read cert: {word}\n")
    with pytest.raises(TokenFileError, match="line 1: "):
        Tokens(path)


def test_a_token_is_valid_until_it_expires(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with freeze_time(datetime(2026, 3, 1, tzinfo=UTC)) as time:
        token, other = add(file, "a", ["read"], {"expires": "90d"}), add(file, "b", ["read"], {"expires": "2026-04-01"})
        tokens = Tokens(file)
        assert [tokens.find(each) is not None for each in (token, other)] == [True, True]
        time.move_to(datetime(2026, 4, 1, tzinfo=UTC))
        assert [tokens.find(each) is not None for each in (token, other)] == [True, False]
        time.move_to(datetime(2026, 5, 29, 23, 59, 59, tzinfo=UTC))
        assert tokens.find(token)
        time.move_to(datetime(2026, 5, 30, tzinfo=UTC))
        assert tokens.find(token) is None
        assert [each.has_expired for each in listed(file)] == [True, True]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("expires=99999999w", "too long"),
        ("expires=2020-01-01", "it is over already"),
        ("expires=0d", "it is over already"),
        ("expires=soon", "a day or a time"),
        ("rate=0.000001/h", "at least a call in 24 hours"),
        ("rate=1000001/s", "at most 1000000/s"),
        ("rate=5/s\n", "calls in a time"),
        ("rate=5/s inflight=1", "calls in a time"),
        ("inflight=1000001", "at most 1000000 calls"),
        ("sessions=999999999999", "at most"),
        ("bytes=1025TiB", "at most 1024TiB"),
        ("burst=1", "means nothing"),
    ],
)
def test_no_new_token_has_what_makes_no_sense(tmp_path: Path, word: str, reason: str) -> None:
    key, _, text = word.partition("=")
    with pytest.raises(TokenFileError, match=reason):
        add(tmp_path / "tokens", "a", ["read"], {key: text})
    with pytest.raises(TokenFileError, match="no scope 'read write'"):
        add(tmp_path / "tokens", "a", ["read write"])
    assert not list(tmp_path.iterdir())


def test_each_word_of_a_new_token_is_one_word(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    token = add(file, "a", ["read", "write", "read"], {"expires": "2100-01-01 12:00", "rate": "0.042/h"})
    identity = Tokens(file).find(token)
    assert identity is not None
    assert identity.expires_at == datetime(2100, 1, 1, 12, tzinfo=UTC)
    assert file.read_text().split()[:2] == ["a", "read,write"]


def test_several_lines_of_a_name_allow_the_most_of_each(path: Path) -> None:
    lines = [("a", "one", " rate=5/s sessions=3"), ("a", "two", " rate=7/s"), ("b", "three", "")]
    path.write_text("".join(line(name, "read", token).replace("\n", f"{words}\n") for name, token, words in lines))
    tokens = Tokens(path)
    assert tokens.allowance_of("a") == Allowance(rate=7.0)
    assert tokens.allowance_of("b") == tokens.allowance_of("nobody") == Allowance()


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    os.mkfifo(path, 0o600)
    with pytest.raises(TokenFileError, match="it is not a file"):
        Tokens(path)
