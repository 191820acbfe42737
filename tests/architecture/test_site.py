"""Every page of docs/ is in the navigation of the documentation site, which is built by `make docs`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
# The hook makes these of files outside docs/.
MADE = {"index.md", "changelog.md", "contributing.md", "examples.md", "api/"}


def pages_in(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        ((_, content),) = entry.items()
        if isinstance(content, list):
            yield from pages_in(content)
        else:
            yield content


def test_every_page_is_in_the_navigation() -> None:
    listed = sorted(pages_in(CONFIG["nav"]))
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert listed == sorted({*there, *MADE}), "give a new page one line in the nav of mkdocs.yml"


def test_the_hook_names_what_it_makes() -> None:
    hook = (ROOT / ".ci/site.py").read_text(encoding="utf-8")
    assert all(f'"{page}"' in hook for page in MADE)
