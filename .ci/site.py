"""The hook of the documentation site: pages that are not in docs/, and links as they are on GitHub.

The README, CONTRIBUTING, the CHANGELOG and the page of the examples stay where GitHub shows them. A link of any page is
relative to its file in the repository; here it becomes one to the page of the site, or to a copy of the file. The API
reference has every public name, in a page for each kind: a new name needs nothing but a docstring.
"""

import ast
import posixpath
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
"""Files of the repository that are pages, and their places in the site."""
COPIES = "files/"
API = "api/"
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Import this checkout, even if another one is installed."""
    sys.path.insert(0, str(ROOT))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are not in docs/."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    pages = api_pages()
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    assert config.nav is not None
    config.nav = _expanded(config.nav, ["api/index.md", *sorted(pages.keys() - {"api/index.md"})])
    for path in sorted(set(linked_files(files))):
        files.append(File.generated(config, COPIES + path, abs_src_path=str(ROOT / path)))
    return files


def _expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """Put the pages of the reference where the navigation says `api/`."""
    expanded: list[Any] = []
    for entry in nav:
        ((title, content),) = entry.items()
        if content == API:
            content = list(pages)
        elif isinstance(content, list):
            content = _expanded(content, pages)
        expanded.append({title: content})
    return expanded


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links of a page to places in the site."""
    source = page.file.src_uri
    if source.startswith(API):
        return markdown

    def placed(link: re.Match[str]) -> str:
        place = place_of(source, link[2])
        return link[0] if place is None else f"{link[1]}{place}{link[3]}"

    return with_links(markdown, placed)


def with_links(markdown: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replace the links that are not in blocks of code."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def place_of(source: str, link: str) -> str | None:
    """Return where a link of a page leads in the site; None if it is not one to a file of the repository."""
    if re.match(r"[a-z+]+:|#|/", link):
        return None
    target, anchor, fragment = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(source)), target))
    if path in OUTSIDE:
        place = OUTSIDE[path]
    elif path.startswith(DOCS):
        place = path.removeprefix(DOCS)
    else:
        place = COPIES + path
    return posixpath.relpath(place, posixpath.dirname(source) or ".") + anchor + fragment


def repository_path(source: str) -> str:
    """Return the file in the repository that a page of the site is made of."""
    return next((path for path, place in OUTSIDE.items() if place == source), DOCS + source)


def linked_files(files: Files) -> Iterator[str]:
    """Yield the files outside docs/ that pages link to, and that are not pages."""
    for file in files.documentation_pages():
        if file.src_uri.startswith(API):
            continue
        places: list[str] = []
        with_links(file.content_string, lambda link, file=file, places=places: _noted(file.src_uri, link, places))  # type: ignore[misc]
        for place in places:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), place.partition("#")[0]))
            if path.startswith(COPIES) and (ROOT / path.removeprefix(COPIES)).is_file():
                yield path.removeprefix(COPIES)


def _noted(source: str, link: re.Match[str], places: list[str]) -> str:
    place = place_of(source, link[2])
    if place is not None:
        places.append(place)
    return link[0]


_ELSEWHERE = re.compile(
    r'<(?:script|img|link rel="(?:stylesheet|icon|preload|preconnect)")[^>]* (?:src|href)="(https?:[^"]*)'
)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Refuse a page that would load anything from elsewhere."""
    if loaded := _ELSEWHERE.findall(output):
        raise PluginError(f"{page.file.src_uri} would load {', '.join(loaded)}: the site loads nothing from elsewhere")
    return output


# The API reference


class Kind(NamedTuple):
    """A page of the reference: its title, what it says first, and the modules whose public names it has."""

    title: str
    text: str
    homes: tuple[str, ...]


KINDS = {
    "connecting": Kind(
        "Connecting",
        "Opening a state, serving one, and the settings of both.",
        ("wiring", "settings", "opening"),
    ),
    "tools": Kind(
        "Tools",
        "Functions whose calls are transactions: see [Writing tools](../tools.md).",
        ("cognitive.tool_context", "cognitive.toolbox", "cognitive.tools"),
    ),
    "contexts": Kind("Contexts and variables", "A session, as programs see it.", ("cognitive",)),
    "backends": Kind(
        "Backends",
        "Where sessions are kept: see [Write a backend](../write-a-backend.md).",
        ("state",),
    ),
}
"""The kinds of names in `dspex_persist`. The first whose module matches has a name; errors have a page of their own."""
MODULES = {
    "audit": Kind("Audits", "Queries of the history: see [Queries](../audit.md).", ("audit",)),
    "replay": Kind("Replay", "Running recordings again: see [Replay](../replay.md).", ("replay",)),
    "compat": Kind(
        "Existing adapters",
        "`dspex_persist.compat`: see [Coming from DSPex](../from-dspex.md#adapters-of-existing-workers).",
        ("compat",),
    ),
    "dspy": Kind("DSPy", "`dspex_persist.dspy`: see [DSPy programs](../dspy.md).", ("dspy",)),
    "optuna": Kind("Studies", "`dspex_persist.optuna`: see [Studies](../studies.md).", ("optuna",)),
}
"""Modules with an `__all__` of their own."""
RETURNED = {
    "records": ("VariableInfo", "HistoryEntry"),
    "changes": ("Change",),
    "watching": ("Changes",),
    "callbacks": ("Subscription",),
    "transactions": ("Transaction",),
    "optimizing": ("Optimization", "Trial", "Status"),
    "backends": ("Backend", "Switch"),
    "describing": ("Description", "History"),
    "mapping": ("VariableMapping",),
}
"""What the methods of contexts return, by modules of `cognitive`."""
PLAIN = "    options: {heading_level: 2, show_root_full_path: false}\n"
INHERITED = "    options: {heading_level: 2, show_root_full_path: false, inherited_members: true}\n"
SUITE = '    options: {show_root_full_path: true, heading_level: 2, filters: ["!^_", "!^test_"], show_bases: false}\n'


def api_pages() -> dict[str, str]:
    """Return the pages of the reference by their places. Raises if a public name would be in none."""
    package = import_module("dspex_persist")
    homes: dict[str, str] = {name: home for name, home in package._HOMES.items() if not _is_error(package, name)}
    pages, index = {}, ["# API reference\n"]
    for place, kind in KINDS.items():
        names = [name for name, home in homes.items() if _is_in(home, kind.homes)]
        homes = {name: home for name, home in homes.items() if name not in names}
        entries = [("dspex_persist", name, INHERITED if name[0].isupper() else PLAIN) for name in names]
        pages[place] = _page(kind, entries)
        index.append(_summary(place, kind, names))
    if homes:
        raise PluginError(f".ci/site.py: no page of the API reference has {', '.join(homes)}: add its module to KINDS")
    for place, kind in MODULES.items():
        module = f"dspex_persist.{kind.homes[0]}"
        names = _exported(module)
        pages[place] = _page(kind, [(module, name, PLAIN) for name in names])
        index.append(_summary(place, kind, names))
    for place, kind, entries in (_returned(), _abilities(), _records(), _errors(package), _suites()):
        pages[place] = _page(kind, entries)
        index.append(_summary(place, kind, [name for _, name, _ in entries]))
    pages["index"] = "\n".join(index)
    return {f"api/{place}.md": text for place, text in pages.items()}


def _is_error(package: ModuleType, name: str) -> bool:
    return name.endswith("Error") and issubclass(getattr(package, name), Exception)


def _is_in(home: str, modules: Iterable[str]) -> bool:
    return any(f"{home}.".startswith(f"dspex_persist.{module}.") for module in modules)


def _page(kind: Kind, entries: Iterable[tuple[str, str, str]]) -> str:
    parts = (f"::: {module}.{name}\n{options}" for module, name, options in entries)
    return "\n".join((f"# {kind.title}\n", f"{kind.text}\n", *parts))


def _summary(place: str, kind: Kind, names: Sequence[str]) -> str:
    """Return the entry of a page in the page of all."""
    return f"## [{kind.title}]({place}.md)\n\n{kind.text}\n\n{', '.join(f'`{name}`' for name in names)}\n"


def _exported(module: str) -> list[str]:
    """Return the `__all__` of a module without importing it: DSPy takes seconds."""
    file = ROOT / module.replace(".", "/") / "__init__.py"
    if not file.exists():
        file = file.parent.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(each, ast.Name) and each.id == "__all__" for each in node.targets
        ):
            return sorted(ast.literal_eval(node.value), key=str.lower)
    raise PluginError(f"{file} has no __all__")


def _defined(module: str) -> list[str]:
    """Return the public classes and functions that a module defines, in its order."""
    members = vars(import_module(module)).items()
    return [
        name
        for name, member in members
        if not name.startswith("_") and (isclass(member) or isfunction(member)) and member.__module__ == module
    ]


def _returned() -> tuple[str, Kind, list[tuple[str, str, str]]]:
    text = "Versions, changes, transactions and the like: see [Contexts](../context.md)."
    entries = [(f"dspex_persist.cognitive.{module}", name, PLAIN) for module in RETURNED for name in RETURNED[module]]
    return "returned", Kind("What contexts return", text, ()), entries


def _abilities() -> tuple[str, Kind, list[tuple[str, str, str]]]:
    module = "dspex_persist.state.abilities"
    kind = Kind("Abilities", "What only some backends can do. `Ability.of(state)` says what is missing.", ())
    return "abilities", kind, [(module, name, PLAIN) for name in _defined(module)]


def _records() -> tuple[str, Kind, list[tuple[str, str, str]]]:
    module = "dspex_persist.state.model"
    kind = Kind("Records", "The immutable objects that calls take and return.", ())
    return "records", kind, [(module, name, PLAIN) for name in _defined(module)]


def _errors(package: ModuleType) -> tuple[str, Kind, list[tuple[str, str, str]]]:
    """Return every error, each where it is defined."""
    found = [getattr(package.errors, name) for name in sorted(dir(package.errors))]
    errors = [each for each in found if isclass(each) and issubclass(each, Exception)]
    kind = Kind(
        "Errors",
        "All are in `dspex_persist.errors`. [Errors](../errors.md) says when each is raised, and what to do.",
        (),
    )
    return "errors", kind, [(each.__module__, each.__name__, PLAIN) for each in dict.fromkeys(errors)]


def _suites() -> tuple[str, Kind, list[tuple[str, str, str]]]:
    """Return the contract suites, and the server of the plugin."""
    folder = ROOT / "dspex_persist/testing"
    entries = []
    for path in sorted((*folder.glob("*_contract.py"), folder / "provider_contract/__init__.py", folder / "server.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        entries += [(module, name, SUITE) for name in names]
    text = "The contract suites, one for each ability: see [Write a backend](../write-a-backend.md)."
    return "testing", Kind("Contract suites", text, ()), entries
