"""The past of sessions whose commits are in memory: recordings, forks, restores and audits of it."""
