"""Addresses of stores."""

import pytest

from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.valkey.address import Address


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://h", {"host": "h", "port": 6379, "db": 0}),
        ("valkey://h:7000/3", {"host": "h", "port": 7000, "db": 3}),
        ("redis://ada:p%40ss@h", {"username": "ada", "password": "p@ss"}),
        ("redis://:secret@[::1]:6379", {"host": "::1", "password": "secret"}),
        (f"rediss://h?ssl_ca_certs={__file__}", {"ssl": True, "ssl_ca_certs": __file__}),
        ("redis+unix:///run/valkey.sock?db=2", {"unix_socket_path": "/run/valkey.sock", "db": 2}),
    ],
)
def test_what_an_address_says(url: str, options: dict[str, object]) -> None:
    assert options.items() <= Address.of(url).options.items()


def test_its_parameters() -> None:
    address = Address.of("redis://h?prefix=team-a&assume=durable")
    assert (address.prefix, address.assumes_durable) == ("team-a", True)
    assert (Address.of("redis://h").prefix, Address.of("redis://h").assumes_durable) == ("dspex", False)


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:s3cret@h?prefix=a b",
        "redis://ada:s3cret@h:port",
        "redis://ada:s3cret@h:0",
        "redis://ada:s3cret@h:99999",
        "rediss://ada:s3cret@h?ssl_ca_certs=/not/there.pem",
        "redis://ada:s3cret@h/first",
        "redis://ada:s3cret@h?socket_timeout=3",
        "redis://ada:s3cret@h?assume=nothing",
        "redis://ada:s3cret@/0",
        "redis+unix://ada:s3cret@h/socket",
        "http://ada:s3cret@h",
        "redis://ada:s3@cret@h:x",
        "redis://ada:12/s3cret@h",
        "redis://ada:12?s3cret=1@h",
    ],
)
def test_what_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        Address.of(url)
    assert "cret" not in str(refused.value)
    assert "cret" not in repr(refused.value)


def test_a_password_is_not_shown() -> None:
    address = Address.of("redis://ada:s3cret@h:6379/1")
    assert address.name == "redis://ada:***@h:6379/1"
    assert "s3cret" not in repr(address)
