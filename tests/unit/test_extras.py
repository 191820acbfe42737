"""How to install an extra: from where the package came."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.extras import how_to_install

METADATA = """Metadata-Version: 2.4
Name: dspex-persist
Version: 0.1.0
Provides-Extra: web
Requires-Dist: grpcio>=1.76
Requires-Dist: pytest; extra == "test"
Requires-Dist: datasette<0.66,>=0.65; extra == 'web'
Requires-Dist: jinja2; extra == "web"
"""
REPOSITORY = "https://git.example.org/dspex-persist.git"

Install = Callable[[Any], None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package of this name, which comes from there."""

    def install(origin: Any) -> None:
        facts = tmp_path / "site" / "dspex_persist-0.1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(METADATA)
        if origin is not None:
            (facts / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.syspath_prepend(facts.parent)

    return install


def test_from_a_clone(installed: Install, tmp_path: Path) -> None:
    clone = tmp_path / "with a space"
    clone.mkdir()
    installed({"url": clone.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(how_to_install("web")) == ["pip", "install", f"{clone}[web]"]


def test_from_a_clone_that_has_gone(installed: Install, tmp_path: Path) -> None:
    installed({"url": (tmp_path / "gone").as_uri(), "dir_info": {}})
    assert how_to_install("web") == "pip install 'datasette<0.66,>=0.65' jinja2"


def test_from_a_repository(installed: Install) -> None:
    installed({"url": REPOSITORY, "vcs_info": {"vcs": "git", "commit_id": "1" * 40, "requested_revision": "main"}})
    assert how_to_install("web") == f"pip install 'dspex-persist[web] @ git+{REPOSITORY}@main'"


def test_from_a_wheel(installed: Install) -> None:
    installed({"url": "file:///tmp/dspex_persist-0.1.0.whl", "archive_info": {}})
    assert how_to_install("web") == "pip install 'dspex-persist[web] @ file:///tmp/dspex_persist-0.1.0.whl'"


def test_from_an_index(installed: Install) -> None:
    installed(None)
    assert how_to_install("web") == "pip install 'dspex-persist[web]'"


def test_where_it_lies(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    program = "from dspex_persist.extras import how_to_install as how; print(how('web'))"
    # Without site-packages, where it may be installed.
    argv, environment = [sys.executable, "-I", "-S", "-c"], {**os.environ}
    done = subprocess.run(
        [*argv, f"import sys; sys.path.insert(0, {str(root)!r}); {program}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"pip install {shlex.quote(f'{root}[web]')}\n", "")
