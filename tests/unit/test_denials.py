"""Refusals are counted, not collected."""

from datetime import UTC, datetime, timedelta

from freezegun import freeze_time

from dspex_persist.state.denials import OTHERS, DenialLog, Refused

START = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
REFUSED = Refused("ada", "ipv4:10.0.0.7", "snakepit.bridge.BridgeService.SetVariable", "", "scope write")


def test_the_same_refusal_within_a_minute_is_one_entry() -> None:
    with freeze_time(START) as time:
        log = DenialLog()
        for _ in range(3):
            log.note(REFUSED)
            time.tick(timedelta(seconds=10))
        log.note(REFUSED)
        log.note(REFUSED._replace(missing="scope admin"))
    first, second, third = log.take()
    assert (first.at, first.last_at, first.count, first.refused) == (
        START,
        START + timedelta(seconds=20),
        3,
        REFUSED,
    )
    assert (second.at, second.count, third.missing) == (START + timedelta(seconds=30), 1, "scope admin")
    assert log.take() == []


def test_an_entry_does_not_end_before_it_begins_if_the_clock_is_set_back() -> None:
    with freeze_time(START) as time:
        log = DenialLog()
        log.note(REFUSED)
        time.move_to(START - timedelta(seconds=10))
        log.note(REFUSED)
        (entry,) = log.take()
    assert (entry.at, entry.last_at, entry.count) == (START, START, 2)


def test_what_is_given_back_is_counted_on() -> None:
    with freeze_time(START):
        log = DenialLog()
        log.note(REFUSED)
        taken = log.take()
        log.note(REFUSED)
        log.give_back(taken)
        (entry,) = log.take()
    assert entry.count == 2


def test_a_flood_of_different_refusals_is_bounded_and_loses_no_count() -> None:
    with freeze_time(START):
        log = DenialLog()
        for number in range(2_000):
            log.note(REFUSED._replace(session_id="s" * 1_000 + str(number), peer=f"ipv6:{number}"))
        entries = log.take()
    assert len(entries) == 501
    assert sum(entry.count for entry in entries) == 2_000
    assert entries[-1].refused == Refused(OTHERS, OTHERS, OTHERS, "", OTHERS)
    assert max(len(entry.session_id) for entry in entries) == 255


def test_what_nobody_can_keep_is_bounded() -> None:
    log = DenialLog()
    for minute in range(20):
        with freeze_time(START + timedelta(minutes=minute)):
            for number in range(400):
                log.note(REFUSED._replace(peer=f"ipv6:{number}"))
            log.give_back(log.take())
    assert len(log.take()) == 5_000
