"""How fast dspex-persist is, and how that was measured: `python -m benchmarks.run`, `docs/performance.md`."""
