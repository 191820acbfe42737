"""How to install an extra of this package: from where the package itself came, as no index may have it."""

import json
import shlex
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

_NAME: Final = "dspex-persist"


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra.

    Args:
        extra: Its name, such as `web`.

    Returns:
        For a clone `pip install '/home/ada/dspex-persist[web]'`, for the address of a repository `pip install
        'dspex-persist[web] @ git+https://...'`, for an index `pip install 'dspex-persist[web]'`. If the clone is not
        there any more: the command that installs what the extra requires.
    """
    return f"pip install {shlex.join(_wanted(extra))}"


def lack_of(scheme: str, module: str, extra: str) -> str | None:
    """Return why an address with a scheme cannot be used, if the package that it needs is not installed."""
    if find_spec(module) is not None:
        return None
    return f"{scheme}:// needs {module}, which is not installed: {how_to_install(extra)}"


def _wanted(extra: str) -> Iterator[str]:
    # Here: it takes longer than all the rest that a command imports.
    from importlib import metadata

    try:
        installed = metadata.distribution(_NAME)
    except metadata.PackageNotFoundError:
        # It runs where it lies.
        yield f"{Path(__file__).resolve().parents[1]}[{extra}]"
        return
    # PEP 610; an index leaves no such file.
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if not url:
        yield f"{_NAME}[{extra}]"
    elif "dir_info" not in origin:
        yield f"{_NAME}[{extra}] @ {_of_repository(origin)}{url}{_at(origin)}"
    elif (folder := Path(unquote(urlsplit(url).path))).is_dir():
        yield f"{folder}[{extra}]"
    else:
        yield from _required(installed.requires or (), extra)


def _of_repository(origin: Any) -> str:
    return f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""


def _at(origin: Any) -> str:
    revision = origin.get("vcs_info", {}).get("requested_revision")
    return f"@{revision}" if revision else ""


def _required(requirements: Iterable[str], extra: str) -> Iterator[str]:
    for requirement in requirements:
        needed, _, marker = requirement.partition(";")
        if marker.replace('"', "'").strip() == f"extra == '{extra}'":
            yield needed.strip()
