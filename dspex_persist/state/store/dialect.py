"""The statements of the store in the dialect of PostgreSQL: one place for everything that SQLite writes otherwise.

They are written for SQLite. What PostgreSQL can have as a function of that name, it has (migrations/postgresql). The
rest is replaced here, once for each statement.
"""

import re
from functools import lru_cache
from typing import Final

# A glob of a caller as a regular expression. `dspex_glob` has [0-9] mean any digit, as only our own patterns may.
# chr(63) is the question mark, which would be a parameter here.
_EXPRESSION: Final = (
    r"('^' || replace(replace(regexp_replace(replace(?, '[[]', '['), "
    r"'([.^$+(){}|\\\[\]])', '\\\1', 'g'), '*', '.*'), chr(63), '.') || '$')"
)
_REPLACED: Final = (
    # Hints, which PostgreSQL has none of
    (r"\s(?:NOT )?INDEXED(?: BY \w+)?\b", ""),
    (r"\bCROSS JOIN (\w+(?: AS \w+)?)\s+(?=ON\b)", r"JOIN \1 "),
    # Metadata that cannot be read may say so, too
    (
        r"\(CASE WHEN json_valid\(([\w.]+)\) THEN lower\(json_extract\(\1, '\$\.sensitive'\)\) IS 'true' ELSE 1 END\)",
        r"dspex_is_sensitive(\1)",
    ),
    # Types
    (r"\bCAST\(total\(([\w.]+)\) AS INTEGER\)", r"dspex_whole(total(\1))"),
    (r"(?s)\bCAST\(substr\((.*?), 6\) AS INTEGER\)", r"dspex_number(substr(\1, 6))"),
    (r"\bCAST\((\w+)\.content AS TEXT\)", r"convert_from(\1.content, 'UTF8')"),
    (r"\blength\(CAST\(([\w.]+) AS BLOB\)\)", r"octet_length(\1)"),
    (r"\bx''", "''::bytea"),
    (r"\bAS INTEGER\)", "AS BIGINT)"),
    (r"\bLIMIT \?(\d?)", r"LIMIT nullif(?\1::bigint, -1)"),
    (r"\(\?(\d) IS NULL OR", r"(?\1::text IS NULL OR"),
    (r"= \?(\d) OR instr\(([\w.]+), \?(\d) \|\|", r"= ?\1 OR strpos(\2, ?\3::text ||"),
    # Operators and functions
    (r"\bifnull\(", "coalesce("),
    (r"([\w.]+|\([^()]*\)) GLOB ('[^']*')", r"dspex_glob(\1, \2)"),
    (r"([\w.]+|\([^()]*\)) GLOB \?", r"\1 ~ " + _EXPRESSION.replace("\\", r"\\")),
    (r"\bIS NOT (\d)", r"IS DISTINCT FROM \1"),
    (r"\bIS ('[^']*')", r"IS NOT DISTINCT FROM \1"),
    (r"\bIS \?", "IS NOT DISTINCT FROM ?"),
    (r"^PRAGMA defer_foreign_keys = ON$", "SET CONSTRAINTS ALL DEFERRED"),
)


@lru_cache(maxsize=4096)
def translated(statement: str) -> tuple[str, tuple[int, ...] | None]:
    """Return a statement of the store for psycopg, and the order of its parameters if that is another one."""
    text = statement
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    order = tuple(int(each) - 1 for each in re.findall(r"\?(\d)", text))
    return re.sub(r"\?\d?", "%s", text.replace("%", "%%")), order or None
