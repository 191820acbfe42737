"""Reading the past: queries on the log, recordings, the plan for pruning. The modules that write do not import it."""
