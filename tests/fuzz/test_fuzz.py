"""A thousand hostile requests (`make fuzz` sends twenty thousand), and their reproducibility."""

import secrets
from pathlib import Path

import pytest

from tests.fuzz.fuzz_test import Fuzz
from tests.fuzz.messages import METHODS, request


@pytest.mark.slow
def test_hostile_requests_do_no_harm(tmp_path: Path) -> None:
    seed = secrets.randbelow(1_000_000)
    report = Fuzz(tmp_path, seed).run(1_000)
    print(report)
    assert report.problems == [], f"seed {seed}"
    # If all requests were refused at once, or all accepted, the test would prove nothing.
    for code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"):
        assert report.answers[code] > 0, report
    assert len(report.methods) > 20, report.methods


def test_a_request_is_reproducible() -> None:
    requests = [request(7, number) for number in range(100)]
    assert requests == [request(7, number) for number in range(100)]
    assert {each.method.full_name for each in requests} == {method.full_name for method in METHODS}
