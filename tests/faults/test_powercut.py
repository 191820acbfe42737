"""Some dozen power cuts (`make powercut-test` makes ten thousand), and the model of the disk."""

import secrets
from random import Random

import pytest

from tests.faults import shim
from tests.faults.disk import MODES, Disk, Operation
from tests.faults.powercut_test import PowerCuts
from tests.faults.scratch import scratch

_FILE = (1, 1)
_OTHER = (1, 2)


def _operation(kind: str, file: tuple[int, int] = _FILE, offset: int = 0, content: bytes = b"") -> Operation:
    return Operation(kind, file, 0.0, offset, content)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("states", [40, pytest.param(150, marks=pytest.mark.thorough)])
def test_nothing_acknowledged_is_lost(states: int) -> None:
    if (reason := shim.why_not()) is not None:
        pytest.skip(reason)
    seed = secrets.randbelow(1_000_000)
    with scratch("powercut-test") as folder:
        report = PowerCuts(folder, seed).run(states)
        print(report)
        assert report.problems == [], f"seed {seed}"
    # Recordings without any activity prove nothing.
    assert report.states > states * 0.6
    assert set(report.modes) == set(MODES)
    assert report.operations["S"] > 200
    assert all(report.operations[kind] > 0 for kind in "OWTBSUL"), report.operations


def test_a_sync_covers_the_writes_before_it_began() -> None:
    disk = Disk({"a": b"old"})
    disk.play(_operation("O", content=b"a"))
    disk.play(_operation("W", content=b"new"))
    disk.play(_operation("B"))
    disk.play(_operation("W", offset=3, content=b" and late"))
    assert disk.cut("dropped", Random(1)) == {"a": b"old"}
    disk.play(_operation("S"))
    assert disk.cut("dropped", Random(1)) == {"a": b"new"}
    assert disk.cut("kept", Random(1)) == {"a": b"new and late"}


def test_a_truncation_needs_a_sync_too() -> None:
    disk = Disk({"a": b"0123456789"})
    disk.play(_operation("O", content=b"a"))
    disk.play(_operation("T", offset=4))
    assert disk.cut("dropped", Random(1)) == {"a": b"0123456789"}
    assert disk.cut("kept", Random(1)) == {"a": b"0123"}


def test_names_are_durable_with_the_next_sync_and_in_order() -> None:
    disk = Disk({"a": b"first"})
    disk.play(_operation("O", _OTHER, content=b"b"))
    disk.play(_operation("W", _OTHER, content=b"second"))
    disk.play(_operation("R", content=b"b\0a"))
    assert disk.cut("dropped", Random(1)) == {"a": b"first"}
    assert disk.cut("kept", Random(1)) == {"a": b"second"}
    cuts = [disk.cut("sizes", Random(seed)) for seed in range(20)]
    # The file got its first name before the new one, whose old file disappears with the rename.
    assert {tuple(sorted(files)) for files in cuts} == {("a",), ("a", "b")}
    disk.play(_operation("B", _OTHER))
    disk.play(_operation("S", _OTHER))
    assert disk.cut("dropped", Random(1)) == {"a": b"second"}


def test_writes_are_torn_at_the_disks_boundaries() -> None:
    disk = Disk({})
    disk.play(_operation("O", content=b"a"))
    disk.play(_operation("B"))
    disk.play(_operation("S"))
    disk.play(_operation("W", offset=100, content=b"x" * 1000))
    for mode, boundaries in (("torn 512", {512, 1024}), ("holes", {512, 1024}), ("torn 4096", set())):
        for seed in range(20):
            content = disk.cut(mode, Random(seed)).get("a", b"")
            edges = {at for at in range(101, len(content)) if (content[at] == 0) != (content[at - 1] == 0)}
            assert edges <= boundaries, mode
