"""Saved programs: their JSON, history, diffs and tags. Nothing here needs DSPy; `cognitive.dspy` saves and loads."""
