"""What several modules of the store's tests need."""

from tests.helped import helpers, short_ranges  # noqa: F401 - fixtures
