"""What a service manager is told, and when it is told nothing."""

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.infra.notify import Notifier, passed_sockets
from tests.service_manager import ALIVE, READY, STOPPING, ServiceManager


# Only Linux has names without a file.
@pytest.fixture(params=["path", "abstract"] if sys.platform == "linux" else ["path"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    address = tmp_path / "notify" if request.param == "path" else f"@dspex-persist-test-{secrets.token_hex(8)}"
    with ServiceManager(address) as manager:
        yield manager


def test_it_says_what_happens(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)
    notifier.status("opening\nthe file")
    notifier.status("opening\nthe file")
    notifier.ready("serving")
    notifier.alive()
    notifier.extend(1.5)
    notifier.stopping("draining: é\ud800")
    assert [manager.next() for _ in range(5)] == [
        # A status that has not changed is not repeated.
        ["STATUS=opening the file"],
        [READY, "STATUS=serving"],
        [ALIVE],
        ["EXTEND_TIMEOUT_USEC=1500000"],
        [STOPPING, "STATUS=draining: é?"],
    ]
    assert manager.waiting() == []


def test_it_is_taken_out_of_the_environment(manager: ServiceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {**manager.environment(3), "WATCHDOG_PID": str(os.getpid())}.items():
        monkeypatch.setenv(name, text)
    notifier = Notifier.of_process()
    assert (notifier.is_on, notifier.watchdog_s) == (True, 3)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert not Notifier.of_process().is_on


@pytest.mark.parametrize(
    ("name", "text"), [("WATCHDOG_PID", "1"), ("WATCHDOG_USEC", "0"), ("WATCHDOG_USEC", "soon"), ("WATCHDOG_USEC", "")]
)
def test_a_watchdog_of_another_process_or_none(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    for each, value in {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "3", name: text}.items():
        monkeypatch.setenv(each, value)
    assert Notifier.of_process().watchdog_s is None


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", None])
def test_without_a_manager_nothing_is_sent(address: str | None) -> None:
    notifier = Notifier(address, 1)
    notifier.ready("serving")
    asyncio.run(notifier.watch(lambda: 0, lambda: ""))
    with notifier.taking_long(60):
        assert not notifier.is_on


def test_a_manager_that_is_gone_or_does_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = Notifier(str(tmp_path / "gone"))
    with ServiceManager(tmp_path / "notify") as manager:
        busy = Notifier(manager.address)
        for _ in range(1_000):
            busy.alive()
    for _ in range(3):
        gone.alive()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert all("the service manager cannot be told" in text for text in warned)


def test_signs_of_life_stop_while_the_rest_makes_no_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silences = iter((0, 0, 60, 60, 60, 0))
    told: list[list[str]] = []

    def silent_s() -> float:
        # What was told since it was called last.
        told.append(manager.waiting())
        return next(silences)

    with ServiceManager(tmp_path / "notify") as manager:
        notifier = Notifier(manager.address, 0.002)
        with pytest.raises(RuntimeError, match="StopIteration"):
            asyncio.run(notifier.watch(silent_s, lambda: "serving"))
    assert told == [[], ["STATUS=serving", ALIVE], [ALIVE], [], [], [], [ALIVE]]
    assert len([record for record in caplog.records if "no progress" in record.getMessage()]) == 1


def test_more_time_is_asked_for_while_something_takes_long(tmp_path: Path) -> None:
    with ServiceManager(tmp_path / "notify") as manager:
        notifier = Notifier(manager.address, 60)
        with notifier.taking_long(60):
            assert manager.next()[0].startswith("EXTEND_TIMEOUT_USEC=")
            assert manager.next() == [ALIVE]
        with notifier.taking_long(0):
            pass
        assert manager.waiting() == []


def test_sockets_that_were_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passed_sockets() == 0
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert passed_sockets() == 0
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert passed_sockets() == 2
