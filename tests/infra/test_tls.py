"""Certificates: what is wrong with a file, and how new files are noticed."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from dspex_persist.infra.access.tls import Certificates, TlsError, TlsFiles, read_authorities, read_material
from tests.certificates import Authority, Pair
from tests.logs import capture_logs


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def good(authority: Authority) -> Pair:
    return authority.issue("good")


@pytest.fixture(scope="module")
def other(authority: Authority) -> Pair:
    return authority.issue("other")


def files_of(pair: Pair, ca: Path | None = None) -> TlsFiles:
    return TlsFiles(pair.cert, pair.key, ca)


def test_good_files_are_read_as_they_are(authority: Authority, good: Pair) -> None:
    material = read_material(files_of(good, authority.cert))
    assert (material.cert, material.key) == (good.cert.read_bytes(), good.key.read_bytes())
    assert material.ca == read_authorities(authority.cert) == authority.cert.read_bytes()


def broken(content: bytes) -> bytes:
    return content[:100] + b"####" + content[104:]


def locked(_: bytes) -> bytes:
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("spoiled", "change", "reason"),
    [
        ("cert", lambda _: b"", "no certificate in PEM"),
        ("cert", lambda _: b"-----BEGIN PRIVATE KEY-----", "no certificate in PEM"),
        ("cert", broken, "damaged"),
        ("key", lambda _: b"nonsense", "no private key in PEM"),
        ("key", broken, "damaged"),
        ("key", locked, "passphrase"),
        ("key", None, "cannot read it: No such file"),
        ("cert", None, "cannot read it: No such file"),
        ("ca", lambda _: b"nonsense", "no certificate in PEM"),
        ("ca", None, "cannot read it: No such file"),
    ],
)
def test_an_error_names_the_file_and_what_is_wrong_with_it(
    authority: Authority, good: Pair, tmp_path: Path, spoiled: str, change: Callable[[bytes], bytes] | None, reason: str
) -> None:
    originals = {"cert": good.cert, "key": good.key, "ca": authority.cert}
    bad = tmp_path / spoiled
    if change is not None:
        bad.write_bytes(change(originals[spoiled].read_bytes()))
    with pytest.raises(TlsError, match=reason) as raised:
        read_material(TlsFiles(**{**originals, spoiled: bad}))
    assert str(raised.value).startswith(f"{bad}: ")


def test_a_key_of_another_certificate(good: Pair, other: Pair) -> None:
    with pytest.raises(TlsError, match=f"not the key of the certificate in {good.cert}") as raised:
        read_material(TlsFiles(good.cert, other.key))
    assert raised.value.path == str(other.key)


def test_a_certificate_that_has_expired(authority: Authority) -> None:
    expired = authority.issue("expired", days=-1)
    with pytest.raises(TlsError, match="has expired") as raised:
        read_material(files_of(expired))
    assert raised.value.path == str(expired.cert)


def test_new_files_are_noticed_and_bad_ones_leave_the_old_ones(good: Pair, other: Pair, tmp_path: Path) -> None:
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.replace(good)
    certificates = Certificates(files_of(pair))
    assert certificates.changed() is None
    pair.cert.write_bytes(other.cert.read_bytes())
    assert certificates.changed() is None, "the key is not the new one yet"
    pair.key.write_bytes(other.key.read_bytes())
    assert certificates.changed() == read_material(files_of(other)) == certificates.material
    pair.key.unlink()
    assert certificates.changed() is None
    assert certificates.material == read_material(files_of(other))
    pair.replace(good)
    assert certificates.changed() == read_material(files_of(good))
    assert certificates.changed() is None


def test_files_that_the_system_did_not_open_are_read_for_the_next_connection(
    good: Pair, other: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.replace(good)
    certificates = Certificates(files_of(pair))
    pair.replace(other)

    def refused(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as full, capture_logs() as logs:
        full.setattr(Path, "read_bytes", refused)
        assert [certificates.changed() for _ in range(3)] == [None] * 3
    assert [each["reason"] for each in logs] == ["cannot read it: Too many open files"], "once"
    assert certificates.changed() == read_material(files_of(other))
