"""What was: questions to the log, recordings, and what pruning may take. Nothing that writes needs it."""
