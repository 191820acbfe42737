"""Addresses: parsing, loopback, and the reasons why one is not available."""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dspex_persist.infra.listen import (
    ListenError,
    TcpAddress,
    UnixAddress,
    is_loopback,
    names_tls,
    parse_callee,
    parse_listen,
    prepare,
    settled,
    target_of,
)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:50051", TcpAddress("127.0.0.1", 50051)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:65535", TcpAddress("::1", 65535)),
        ("unix:a.sock", UnixAddress("a.sock")),
        ("unix:/run/a.sock", UnixAddress("/run/a.sock")),
        ("unix:///run/a.sock", UnixAddress("/run/a.sock")),
        ("UNIX:/run/A.sock", UnixAddress("/run/A.sock")),
    ],
)
def test_addresses_are_parsed(listen: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_listen(listen) == address
    assert parse_listen(str(address)) == address


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("GRPC://127.0.0.1:1", "127.0.0.1:1"),
        ("GRPCs://Host:1", "Host:1"),
        ("Grpc+Unix:///run/A.sock", "unix:/run/A.sock"),
        ("UNIX:/run/A.sock", "unix:/run/A.sock"),
    ],
)
def test_schemes_may_have_capital_letters(url: str, target: str) -> None:
    assert target_of(url) == target
    assert names_tls(url) == url.startswith("GRPCs")


def test_a_callee_may_have_capital_letters_in_its_scheme() -> None:
    assert parse_callee("GRPCS://a:1") == (TcpAddress("a", 1), True)
    with pytest.raises(ListenError, match="has no TLS"):
        parse_callee("Grpcs://UNIX:/run/a.sock")


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "50051",
        ":50051",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "127.0.0.1:٣",
        "127.0.0.1:80\n",
        "::1:80",
        "dns:///localhost:80",
        "unix:",
        "unix://",
        "unix:a\0b",
        "unix-abstract:name",
    ],
)
def test_other_text_is_refused(listen: str) -> None:
    with pytest.raises(ListenError) as caught:
        parse_listen(listen)
    assert caught.value.listen == listen


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("LocalHost:1", True),
        ("unix:/run/a.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
    ],
)
def test_loopback(listen: str, loopback: bool) -> None:
    assert is_loopback(listen) is loopback


def test_a_port_in_use_is_refused_until_it_is_free_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TcpAddress("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ListenError, match=rf"cannot listen on 127\.0\.0\.1:{address.port}: address already"):
            prepare(address)
    prepare(address)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "cannot assign requested address"),  # a documentation address, which no machine has
        ("a" * 64, "the host name is not valid"),
    ],
)
def test_a_host_that_is_not_this_machine_is_refused(host: str, reason: str) -> None:
    with pytest.raises(ListenError) as caught:
        prepare(TcpAddress(host, 0))
    assert caught.value.reason == reason


def test_a_path_may_have_107_bytes_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(UnixAddress("é" * 53 + "s"))
    with pytest.raises(ListenError, match="the path has 108 bytes, a Unix socket's has at most 107"):
        prepare(UnixAddress("é" * 54))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=f"the directory {tmp_path}/missing does not exist"):
        prepare(UnixAddress(f"{tmp_path}/missing/a.sock"))


def test_a_folder_that_is_not_writable_is_named() -> None:
    """gRPC itself would only report that it could not bind."""
    # Not pytest's temporary folder, which only root may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        program = f"""if True:
            import os
            from dspex_persist.infra.listen import ListenError, UnixAddress, prepare
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                prepare(UnixAddress("{folder}/a.sock"))
            except ListenError as error:
                print(error.reason)
        """
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        Path(folder).chmod(0o755)
    assert ran.stdout == f"this user may not create files in {folder}\n"


def test_a_settled_address_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled(UnixAddress("a.sock")) == UnixAddress(f"{tmp_path}/a.sock")
    assert settled(TcpAddress("::1", 0)) == TcpAddress("::1", 0)
    # Too long as an absolute path: a relative one is better than none.
    long = UnixAddress("a" * 100)
    assert settled(long) == long


def test_a_file_that_is_not_a_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    with pytest.raises(ListenError, match="the path exists and is not a socket"):
        prepare(UnixAddress(str(path)))
    assert path.read_text() == "kept"


def test_a_living_socket_is_refused_and_a_dead_one_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    address = UnixAddress(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address.path)
        listener.listen()
        with pytest.raises(ListenError, match="another server is listening there"):
            prepare(address)
        assert path.is_socket()
    prepare(address)
    assert not path.exists()


def test_a_living_socket_too_busy_to_accept_is_refused(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "a.sock"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(address.path)
        listener.listen(0)
        waiting.connect(address.path)
        with pytest.raises(ListenError, match="another server is listening there"):
            prepare(address)
    assert Path(address.path).is_socket()
