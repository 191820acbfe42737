"""Who may import whom: the contracts in pyproject.toml hold, and they notice what they are there for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.deadline import within

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dspex_persist"

# One forbidden import each: the folder to add a module to, its text, the contract that must break.
PLANTED = [
    ("cognitive", "import dspex_persist.state.store", "seam"),
    ("cognitive", "import dspy", "dspy"),
    ("cognitive", "import optuna.samplers", "optuna"),
    ("infra", "import dspex_persist.state.model", "layers"),
    ("state", "", "state"),  # a module that no layer names
    ("state/commands", "import dspex_persist.state.provider", "state"),
    ("state/commands", "import sqlite3", "sql"),
    ("state/commands", "from sqlalchemy.exc import OperationalError", "sql"),
    ("infra", "import alembic.command", "sql"),
    ("state/store", "import psycopg", "postgresql"),
    ("state/store", "import grpc.aio", "wire"),
    ("state/commands", "from google.protobuf import any_pb2", "wire"),
    ("infra", "from grpc_health.v1 import health", "wire"),
    ("state/store", "import re2", "patterns"),
    ("state/store", "import dspex_persist.state.bodies", "bodies"),
    ("state/store", "import redis.asyncio", "valkey"),
    ("infra", "from dspex_persist.state.bridge.generated import snakepit_bridge_pb2", "generated"),
]


def contracts() -> list[dict[str, Any]]:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed: list[dict[str, Any]] = configuration["tool"]["importlinter"]["contracts"]
    return listed


def lint_imports(root: Path, *contract_ids: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package under `root`, in a process of its own so that it sees that package."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--no-cache",
    ]
    for contract_id in contract_ids:
        command += ["--contract", contract_id]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=within(100), check=False
    )


def copy_of_package(folder: Path) -> Path:
    """Copy the package and its contracts into a folder, to plant imports in, and return it."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_contracts_are_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(contracts())} kept, 0 broken" in result.stdout


def test_each_planted_import_breaks_its_contract(tmp_path: Path) -> None:
    root = copy_of_package(tmp_path)
    for number, (folder, text, _) in enumerate(PLANTED):
        (root / PACKAGE.name / folder / f"planted_{number}.py").write_text(text + "\n", encoding="utf-8")
    result = lint_imports(root)
    assert result.returncode == 1, result.stdout + result.stderr
    _, _, broken = result.stdout.partition("Broken contracts\n")
    # Each has its name in a line of its own, which is underlined.
    _, *parts = re.split(r"^(.+)\n-{3,}\n", broken, flags=re.MULTILINE)
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    names = {contract["id"]: contract["name"] for contract in contracts()}
    missed = [
        PLANTED[number]
        for number, (_, _, contract_id) in enumerate(PLANTED)
        if not re.search(rf"\bplanted_{number}\b", said.get(names[contract_id], ""))
    ]
    assert missed == []


def test_planted_cycle_breaks_contract(tmp_path: Path) -> None:
    folder = copy_of_package(tmp_path) / PACKAGE.name / "infra"
    (folder / "planted_a.py").write_text("import dspex_persist.infra.planted_b\n", encoding="utf-8")
    (folder / "planted_b.py").write_text("import dspex_persist.infra.planted_a\n", encoding="utf-8")
    result = lint_imports(tmp_path, "siblings")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 1 broken" in result.stdout


def test_seam_names_every_backend() -> None:
    """A backend that is written later is forbidden to the cognitive layer too."""
    by_id = {contract["id"]: contract for contract in contracts()}
    backends = [name.strip(" ()") for name in by_id["state"]["layers"][0].split("|")]
    there = {name for name in backends if list((PACKAGE / "state").glob(f"{name}*"))}
    forbidden = {name.removeprefix("dspex_persist.state.") for name in by_id["seam"]["forbidden_modules"]}
    assert {"store", "bridge", "valkey"} | there <= forbidden


def test_migrations_stand_alone() -> None:
    """An old migration must do tomorrow what it did on its day: it uses nothing of a package that changes."""
    versions = sorted((ROOT / "migrations" / "versions").glob("*.py"))
    assert versions
    for version in versions:
        assert "dspex_persist" not in imported_roots(version), version.name


def imported_roots(file: Path) -> set[str]:
    """The top-level packages that a file imports."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").partition(".")[0])
    return roots
