"""Which addresses may be called."""

import pytest

from dspex_persist.infra.access.allowed import AllowedAddresses
from dspex_persist.infra.listen import ListenError


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("10.1.0.0/16", ("10.1.2.3:1", "10.1.255.255:65535"), ("10.2.0.1:1", "host:1", "[::1:2]:3")),
        ("10.1.2.3", ("10.1.2.3:1",), ("10.1.2.4:1",)),
        ("10.1.2.3:50", ("10.1.2.3:50",), ("10.1.2.3:51", "10.1.2.4:50")),
        ("fd00::/8", ("[fd00::5]:1",), ("[fe00::5]:1", "10.1.2.3:1")),
        ("[fd00::5]:7", ("[fd00::5]:7", "[fd00:0::5]:7"), ("[fd00::5]:8",)),
        ("Worker.example", ("worker.example:1", "WORKER.example:2"), ("example:1", "a.worker.example:1")),
        ("worker:7", ("worker:7",), ("worker:8",)),
    ],
)
def test_an_entry_allows_what_it_names(entry: str, allowed: tuple[str, ...], refused: tuple[str, ...]) -> None:
    addresses = AllowedAddresses([entry])
    assert all(map(addresses.allows, allowed))
    assert not any(map(addresses.allows, refused))


def test_without_entries_only_this_machine_is_allowed() -> None:
    addresses = AllowedAddresses([])
    assert all(map(addresses.allows, ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/a.sock", "127.9.9.9:2")))
    assert not any(map(addresses.allows, ("10.0.0.1:1", "example.org:1", "169.254.169.254:80", "0.0.0.0:1")))
    with pytest.raises(ListenError):
        addresses.allows("nonsense")


@pytest.mark.parametrize("entry", ["", " ", "*", "a/b", "10.1.2.3/8", "a:b", "a:99999", "unix:/run/a.sock", "a b"])
def test_what_is_no_entry(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is invalid|needs no entry"):
        AllowedAddresses([entry])
