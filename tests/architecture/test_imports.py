"""Who may import whom: the contracts in pyproject.toml hold, and they notice what they are there for."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.deadline import within

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dspex_persist"

# One forbidden import each: the file to add, its text, the contract that must break.
PLANTED = [
    ("cognitive/planted.py", "import dspex_persist.state.store", "seam"),
    ("cognitive/planted.py", "import dspy", "dspy"),
    ("cognitive/planted.py", "import optuna.samplers", "optuna"),
    ("infra/planted.py", "import dspex_persist.state.model", "layers"),
    ("state/planted.py", "", "state"),  # a module that no layer names
    ("state/commands/planted.py", "import dspex_persist.state.provider", "state"),
    ("state/commands/planted.py", "import sqlite3", "sql"),
    ("state/commands/planted.py", "from sqlalchemy.exc import OperationalError", "sql"),
    ("infra/planted.py", "import alembic.command", "sql"),
    ("state/store/planted.py", "import psycopg", "postgresql"),
    ("state/store/planted.py", "import grpc.aio", "wire"),
    ("state/commands/planted.py", "from google.protobuf import any_pb2", "wire"),
    ("infra/planted.py", "from grpc_health.v1 import health", "wire"),
    ("state/store/planted.py", "import re2", "patterns"),
    ("state/store/planted.py", "import dspex_persist.state.bodies", "bodies"),
    ("state/store/planted.py", "import redis.asyncio", "valkey"),
    ("infra/planted.py", "from dspex_persist.state.bridge.generated import snakepit_bridge_pb2", "generated"),
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


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package and of its contracts, to plant imports in."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_are_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(contracts())} kept, 0 broken" in result.stdout


@pytest.mark.parametrize(("file", "text", "contract_id"), PLANTED)
def test_planted_import_breaks_its_contract(package_copy: Path, file: str, text: str, contract_id: str) -> None:
    (package_copy / PACKAGE.name / file).write_text(text + "\n", encoding="utf-8")
    result = lint_imports(package_copy, contract_id)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 1 broken" in result.stdout
    assert "planted" in result.stdout


def test_planted_cycle_breaks_contract(package_copy: Path) -> None:
    folder = package_copy / PACKAGE.name / "infra"
    (folder / "planted_a.py").write_text("import dspex_persist.infra.planted_b\n", encoding="utf-8")
    (folder / "planted_b.py").write_text("import dspex_persist.infra.planted_a\n", encoding="utf-8")
    result = lint_imports(package_copy, "siblings")
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
