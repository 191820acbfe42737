"""Every page of docs/ is in the navigation of the documentation site, which is built by `make docs`."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mkdocs.exceptions import PluginError

import dspex_persist

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


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("documentation_site", ROOT / ".ci/site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name(hook: Any) -> None:
    entries = {line.removeprefix("::: ") for page in hook.api_pages().values() for line in page.splitlines()}
    names = {name.rpartition(".")[2] for name in entries}
    errors = {name for name in dir(dspex_persist.errors) if name.endswith("Error")}
    assert sorted({*dspex_persist.__all__, *errors} - names - {"__version__"}) == []
    assert {"AuditSource", "Recordable", "ProviderContract", "ToolContract", "replay", "Value", "Playback"} <= names


def test_a_public_name_of_a_new_part_has_to_get_a_page(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dspex_persist._HOMES, "connect", "dspex_persist.brand_new")
    with pytest.raises(PluginError, match="no page of the API reference has connect"):
        hook.api_pages()


@pytest.mark.parametrize(
    ("source", "link", "place"),
    [
        ("tools.md", "transactions.md#after", "transactions.md#after"),
        ("tools.md", "../README.md", "index.md"),
        ("tools.md", "../examples/shop.py", "files/examples/shop.py"),
        ("index.md", "docs/tools.md", "tools.md"),
        ("index.md", "CHANGELOG.md", "changelog.md"),
        ("examples.md", "../docs/tools.md", "tools.md"),
        ("examples.md", "shop.py", "files/examples/shop.py"),
        ("tools.md", "https://dspy.ai", None),
        ("tools.md", "#here", None),
    ],
)
def test_links_of_the_repository_become_places_of_the_site(hook: Any, source: str, link: str, place: str) -> None:
    assert hook.place_of(source, link) == place


def test_links_in_code_stay_as_they_are(hook: Any) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = "[a](docs/tools.md)\n\n```python\nx = f[1](docs/tools.md)\n```\n"
    assert hook.on_page_markdown(text, page) == text.replace("docs/", "", 1)


@pytest.mark.parametrize(
    "tag", ['<script src="{}/a.js">', '<link rel="stylesheet" href="{}/a.css">', '<img src="{}/a.png">']
)
def test_a_page_that_loads_from_elsewhere_is_refused(hook: Any, tag: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert hook.on_post_page(tag.format("assets"), page)
    with pytest.raises(PluginError, match=r"would load https://cdn\.example/a"):
        hook.on_post_page(tag.format("https://cdn.example"), page)
