"""Blame, for people: what set each value, and below it the values that it was derived from."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from dspex_persist.audit import HistoryEntry, LineageNode, ReadEntry
from dspex_persist.cli.audit.rendering import Renderer, value_text
from dspex_persist.cli.audit.tables import author_and_client, cause_text, why
from dspex_persist.cli.output import counted, plain


def show_lineage(nodes: Sequence[LineageNode], look: Renderer, depth: int) -> None:
    """Print one tree per variable."""
    known = {(node.entry.variable_id, node.entry.version): node for node in nodes}
    roots = [node for node in nodes if node.depth == 0]
    # Every root gets a tree, so no other tree repeats it.
    shown = {(root.entry.variable_id, root.entry.version) for root in roots}
    for root in roots:
        look.print(_Lineage(known, shown, look).tree(root))
    if any(node.depth == depth and node.stands_on for node in nodes):
        look.print(f"to see one step further back: --depth {depth + 1}")


class _Lineage:
    """Builds the trees. A version that has been shown once is only named after that."""

    def __init__(self, known: dict[tuple[str, int], LineageNode], shown: set[tuple[str, int]], look: Renderer) -> None:
        self._known = known
        self._shown = shown
        self._look = look

    def tree(self, root: LineageNode) -> Any:
        """Return the tree of a root, built breadth first."""
        from rich.tree import Tree

        tree = Tree(self._label(root.entry), guide_style="dim")
        waiting = deque([(tree, root)])
        while waiting:
            branch, node = waiting.popleft()
            beyond_depth = 0
            for read in node.stands_on:
                key = _key(read)
                below = self._known.get(key)
                if below is None:
                    beyond_depth += 1
                elif key in self._shown:
                    branch.add(self._dim(f"{plain(read.name or read.asked)} v{read.version} (see there)"))
                else:
                    self._shown.add(key)
                    waiting.append((branch.add(self._label(below.entry)), below))
            if beyond_depth:
                branch.add(self._dim(f"derived from {counted(beyond_depth, 'earlier version')}"))
        return tree

    def _label(self, entry: HistoryEntry) -> Any:
        from rich.text import Text

        value = value_text(entry.value, entry.masked)
        through = f" ({cause_text(entry.cause)})" if entry.execution_id is None else ""
        when = self._look.time(entry.created_at)
        return Text.assemble(
            (plain(entry.name), "bold"),
            f" = {value if len(value) <= 60 else value[:60] + '…'}  ",
            (
                f"v{entry.version}, {entry.kind.value} by {author_and_client(entry)}{through}, "
                f"commit {entry.sequence}, {when}{why(entry)}",
                "dim",
            ),
        )

    def _dim(self, text: str) -> Any:
        from rich.text import Text

        return Text(text, "dim")


def _key(read: ReadEntry) -> tuple[str, int]:
    return read.variable_id or "", -1 if read.version is None else read.version
