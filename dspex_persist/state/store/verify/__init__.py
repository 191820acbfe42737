"""Checking a whole file: does its log hold, and do its current-state tables say what the log adds up to?

Its walks: the log commit by commit (chain, sequences, versions, documents), what was pruned, the large contents, the
index of metadata, the sessions one by one, the documents in the other tables, the answers that are kept, the live
sessions as the engine loads them. Each reads in short snapshots, so that a file that a server writes to can be checked
without its WAL growing meanwhile. Memory holds the variables of one session, never the log.

Of a commit that was pruned nobody can work out the hash any more. That it is the one that it was, that it follows its
predecessor, and what is left of the commit: all of that is in its residue, the residues are in the digest of a marker,
and the chain covers the marker.
"""

from dspex_persist.state.store.verify.problems import iter_problems, schema_problems
from dspex_persist.state.store.verify.walk import Problem, Progress

__all__ = ["Problem", "Progress", "iter_problems", "schema_problems"]
