"""Check a whole file: is its log intact, and do the tables of the current state match the log?

The check is a series of walks: the log commit by commit (chain, sequences, versions, documents), pruned commits, large
contents, the index of metadata, the table of LM calls, the sessions one by one, the documents in the other tables, the
recorded outcomes, the refused calls, and the live sessions as the engine loads them. Each walk reads in short
snapshots, so that the WAL of a running server does not grow meanwhile. Memory holds the variables of one session, never
the log. The walks are independent of each other, and so are ranges of the log, so that processes can share them.

The hash of a pruned commit cannot be computed again. Its residue covers the old hash, the hash of its predecessor and
its remaining rows; the digest in a marker covers the residues; and the chain covers the marker.
"""

from dspex_persist.state.store.verify.parts import MOST_PROBLEMS
from dspex_persist.state.store.verify.problems import checking, iter_problems, schema_problems
from dspex_persist.state.store.verify.sharing import Opening, jobs_for, size_of
from dspex_persist.state.store.verify.walk import Problem, Progress

__all__ = [
    "MOST_PROBLEMS",
    "Opening",
    "Problem",
    "Progress",
    "checking",
    "iter_problems",
    "jobs_for",
    "schema_problems",
    "size_of",
]
