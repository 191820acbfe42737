"""The wire alone: no store, and peers of the tests' own."""
