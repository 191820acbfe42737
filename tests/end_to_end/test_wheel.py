"""What a wheel has that a checkout has elsewhere, or does not need: built, unpacked, and run from there."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dspex_persist import BridgedState, Context
from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment
from tests.end_to_end.programs import programs_of


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, as installing it leaves them."""
    built = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=within(120))
    (wheel,) = built.glob("*.whl")
    folder = built / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *words: str) -> str:
    argv = [sys.executable, *words]
    there = environment(PYTHONPATH=str(installed))
    done = subprocess.run(argv, cwd=folder, env=there, capture_output=True, text=True, timeout=within(60), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_what_programs_and_their_checkers_look_for(installed: Path) -> None:
    package = installed / "dspex_persist"
    assert (package / "py.typed").exists()
    assert (package / "compat" / "__init__.py").exists()
    assert list(package.glob("_migrations/versions/*.py"))
    for file in (ROOT / "proto").glob("*.proto"):
        assert (package / "proto" / file.name).read_text() == file.read_text()
    for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py"):
        assert (package / f"state/bridge/generated/snakepit_bridge_{kind}").exists()


def test_its_proto_files_are_found(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "-m", "dspex_persist", "protocol") == f"{installed}/dspex_persist/proto\n"
    copied = run(installed, tmp_path, "-m", "dspex_persist", "protocol", "--out", "made/here")
    assert copied == "made/here/dspex_persist_audit.proto\nmade/here/snakepit_bridge.proto\n"
    assert (tmp_path / "made/here/snakepit_bridge.proto").read_text() == (
        ROOT / "proto/snakepit_bridge.proto"
    ).read_text()
    program = "from importlib.resources import files; print((files('dspex_persist') / 'proto').is_dir())"
    assert run(installed, tmp_path, "-c", program) == "True\n"


def test_a_worker_and_its_server_run_from_it(installed: Path, tmp_path: Path) -> None:
    (worker,) = [each.text for each in programs_of("docs/tools.md") if "BridgeServiceServicer" in each.text]
    there = environment(PYTHONPATH=str(installed))
    argv = (sys.executable, "-m", "dspex_persist", "serve", "--db", "shop.db", "--listen", "127.0.0.1:0")
    shown = f"import dspex_persist\nassert dspex_persist.__file__.startswith({str(installed)!r})\n{worker}"
    with ServerProcess.start(argv, env=there, cwd=tmp_path) as server:
        target = f"127.0.0.1:{server.port}"
        with BridgedState(target) as state:
            shop = Context("shop", state)
            shop.define("stock", 1)
            with ServerProcess.start((sys.executable, "-c", shown, target, "shop"), env=there, cwd=tmp_path):
                assert shop.call("restock", amount=4) == 5


def test_the_modules_are_those_of_the_bridge() -> None:
    from dspex_persist import compat, protocol
    from dspex_persist.protocol import snakepit_bridge_pb2 as pb
    from dspex_persist.protocol import snakepit_bridge_pb2_grpc as bridge

    assert pb.PingRequest(message="x").message == "x"
    assert bridge.BridgeServiceStub is compat.BridgeServiceStub
    assert protocol.folder() == ROOT / "proto"
    assert issubclass(bridge.BridgeServiceServicer, object)
    assert protocol.dspex_persist_audit_pb2.GetHeadRequest is not None
    assert protocol.dspex_persist_audit_pb2_grpc.AuditServiceStub is not None
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = protocol.other
