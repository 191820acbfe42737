"""What a server on PostgreSQL counts, beyond what any engine does."""

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.meter import Meter


def test_each_group_that_was_stored_is_counted_with_its_time(url: str) -> None:
    meter = Meter()

    def stored() -> tuple[float, float]:
        (family,) = (each for each in meter.families() if each.name == "dspex_persist_commit_seconds")
        (times,) = family.distributions
        return times.buckets[-1][1], times.total

    with PostgresState(url, meter=meter) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        count, took_s = stored()
        for number in range(5):
            state.set_variable("s", "x", number)
            assert state.get_value("s", "x") == number
        assert stored()[0] == count + 5
        assert stored()[1] > took_s
