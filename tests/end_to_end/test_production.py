"""The page on running it in production, and its files: what they say is so, and what they start works."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.infra.health import NoAnswerError, serves
from dspex_persist.infra.listen import UnixAddress
from dspex_persist.infra.process import ServerProcess
from dspex_persist.settings import Settings
from dspex_persist.state.store.engine import LOCK_WAIT_S
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, wait_until
from tests.end_to_end.reading import blocks_of, reader
from tests.service_manager import READY, ServiceManager

PAGE = "docs/production.md"
FOLDER = ROOT / "docs/production"
FILES = sorted(FOLDER.iterdir())
UNITS = [path for path in FILES if path.suffix in (".service", ".socket", ".timer")]
PROGRAM = "/opt/dspex-persist/bin/dspex-persist"
PROXY = Path("/usr/lib/systemd/systemd-socket-proxyd")
# Tools of systemd need no running systemd.
needs = lambda tool: pytest.mark.skipif(shutil.which(tool) is None, reason=f"there is no {tool}")  # noqa: E731


def lines_of(unit: str) -> list[tuple[str, str]]:
    """The settings of a unit, in their order."""
    text = (FOLDER / unit).read_text(encoding="utf-8").replace("\\\n", " ")
    pairs = [line.partition("=") for line in text.splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in pairs]


def variables_of(unit: str) -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in lines_of(unit) if name == "Environment")


def program(folder: Path) -> Path:
    """A `dspex-persist` of this checkout."""
    path = folder / "dspex-persist"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dspex_persist "$@"\n')
    path.chmod(0o755)
    return path


def settings_in(names: "list[str] | dict[str, str]") -> set[str]:
    return {name.removeprefix("DSPEX_PERSIST_").lower() for name in names if name.startswith("DSPEX_PERSIST_")}


# The page


def test_its_commands_for_users_can_be_typed_as_they_stand(tmp_path: Path) -> None:
    with reader(tmp_path) as reading:
        assert reading.read(PAGE) >= 8


STUBS = {
    # Each unit is there before it is named.
    "systemctl": 'for word; do case $word in *.service|*.socket|*.timer) test -f "$ETC/systemd/system/$word";; esac ||'
    " { echo no $word >&2; exit 1; }; done",
    "systemd-sysusers": 'ls "$ROOTED/usr/lib/sysusers.d/"*.conf >/dev/null',
    "docker": 'case $1 in build) test -f "$3";; run) true;; exec) shift 2; test "$1" = dspex-persist;; *) false;; esac',
    "chgrp": 'test -e "$2"',
    "runuser": 'test "$1 $2" = "-u dspex-persist"; shift 3; exec "$@"',
    "python3": 'test "$1 $2" = "-m venv"',
    "pip": 'test "$1 $2 $3 $4" = "install -c constraints.txt ." && test -f constraints.txt && test -f pyproject.toml',
}


def test_its_commands_for_root_do_what_they_say(tmp_path: Path) -> None:
    """In a folder that stands for `/`, with what would change the machine replaced by a check of its arguments."""
    commands, places = tmp_path / "commands", tmp_path / "root"
    for folder in (
        commands,
        places / "opt/dspex-persist/bin",
        places / "etc/systemd/system",
        places / "usr/lib/sysusers.d",
    ):
        folder.mkdir(parents=True)
    for name, text in STUBS.items():
        (commands / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$LOG"\n{text}\n')
        (commands / name).chmod(0o755)
    shutil.copy(commands / "pip", places / "opt/dspex-persist/bin/pip")
    program(places / "opt/dspex-persist/bin")
    state = places / "var/lib/dspex-persist"
    (state / "backups").mkdir(parents=True)
    with connect(state / "backups/BACKUP") as made:
        made.initialize_session("s")
    log = tmp_path / "log"
    extra = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), "ROOTED": str(places)}
    extra["ETC"] = str(places / "etc")
    typed = 0
    for block in blocks_of(PAGE):
        if block.language == "bash":
            text = re.sub(r"(?<![\w.|])/(opt|etc|usr/lib|var/lib)/", rf"{places}/\1/", block.text)
            # There is no such group here.
            text = text.replace("-g dspex-persist ", "")
            done = subprocess.run(
                ["bash", "-e", "-c", text],
                cwd=ROOT,
                env=environment(**extra),
                capture_output=True,
                text=True,
                timeout=within(60),
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
            typed += len(text.splitlines())
    assert typed > 30
    installed = [path for path in (places / "etc/systemd/system").iterdir() if path.name != "dspex-two.service"]
    assert sorted(path.name for path in installed) == [path.name for path in UNITS]
    assert all(path.read_bytes() == (FOLDER / path.name).read_bytes() for path in installed)
    other = (places / "etc/systemd/system/dspex-two.service").read_text()
    assert f"ExecStart={PROGRAM} serve" in other
    assert "dspex-persist" not in other.replace(PROGRAM, "")
    assert (state / "sessions.db").exists()
    token_file = places / "etc/dspex-persist/tokens"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o640
    named = re.findall(r"(DSPEX_PERSIST_\w+)=", log.read_text())
    assert settings_in(named) <= set(Settings.model_fields)


def test_its_settings_are_settings() -> None:
    (block,) = [block for block in blocks_of(PAGE) if block.language == "ini"]
    names = [line.partition("=")[0] for line in block.text.splitlines()]
    assert settings_in(names) <= set(Settings.model_fields)
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert settings_in(re.findall(r"\bDSPEX_PERSIST_[A-Z_]+", text)) <= {*Settings.model_fields, "cert", "key"}
    assert all(f"(production/{path.name})" in text for path in FILES)


def test_what_it_says_to_watch_is_there() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    errors = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dspex_persist/state").rglob("*.py"))
    quoted = re.findall(r'^\| it does not start: exit code \d+, "([^"]+)"', text, re.MULTILINE)
    assert len(quoted) == 2
    assert [words for words in quoted if words not in errors] == []
    documented = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    metrics = set(re.findall(r"`((?:dspex_persist|process)_\w+)`", text))
    assert metrics
    assert [name for name in metrics if f"| `{name}` |" not in documented] == []
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dspex_persist").rglob("*.py"))
    for event in re.findall(
        r"`([^`]+)`", text[text.index("In the log, these events") :].partition(" and every line")[0]
    ):
        assert f'"{event}' in source, event


# The units


def test_the_unit_fits_the_server() -> None:
    given = dict(lines_of("dspex-persist.service"))
    settings = Settings()
    assert settings_in(variables_of("dspex-persist.service")) <= set(Settings.model_fields)
    # For the stacks of all threads in the log, when the watchdog ends the server.
    assert variables_of("dspex-persist.service")["PYTHONFAULTHANDLER"] == "1"
    assert (given["Type"], given["KillMode"], given["OOMPolicy"]) == ("notify", "mixed", "continue")
    assert float(given["TimeoutStopSec"]) > settings.grace_s
    # A writer that waits for a lock is not stuck.
    assert float(given["WatchdogSec"]) / 2 > LOCK_WAIT_S
    codes = (ROOT / "docs/exit-codes.md").read_text(encoding="utf-8")
    assert all(f"| {code} |" in codes for code in given["RestartPreventExitStatus"].split())
    for unit in ("dspex-persist-backup.service", "dspex-persist-proxy.service"):
        names = dict(lines_of(unit))
        assert (names["User"], names["NoNewPrivileges"]) == (given["User"], "yes")
        assert settings_in(variables_of(unit)) <= set(Settings.model_fields)


def put_units(folder: Path, binary: Path) -> list[str]:
    for unit in UNITS:
        (folder / unit.name).write_text(
            unit.read_text(encoding="utf-8").replace(PROGRAM, str(binary)), encoding="utf-8"
        )
    return [str(folder / unit.name) for unit in UNITS]


@needs("systemd-analyze")
def test_systemd_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    units = put_units(tmp_path, program(tmp_path))
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=within(60), check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if str(tmp_path) in line]) == (0, [])


@needs("systemd-analyze")
@pytest.mark.parametrize(
    ("unit", "most"),
    [("dspex-persist.service", 1.7), ("dspex-persist-proxy.service", 2), ("dspex-persist-backup.service", 5.5)],
)
def test_systemd_says_that_the_unit_is_hardened(unit: str, most: float, tmp_path: Path) -> None:
    put_units(tmp_path, program(tmp_path))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=within(60),
        check=False,
    )
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match, done.stdout + done.stderr
    assert float(match[1]) <= most


def start_unit(tmp_path: Path, **more: str) -> ServerProcess:
    """Start the command of the unit as systemd does, in a folder of the test's."""
    for folder in ("state/dspex-persist", "run/dspex-persist"):
        (tmp_path / folder).mkdir(parents=True)
    specifiers = {"%S": str(tmp_path / "state"), "%t": str(tmp_path / "run")}

    def resolved(text: str) -> str:
        for name, path in specifiers.items():
            text = text.replace(name, path)
        return text

    given = dict(lines_of("dspex-persist.service"))
    variables = {name: resolved(text) for name, text in variables_of("dspex-persist.service").items()}
    argv = shlex.split(given["ExecStart"].replace(PROGRAM, str(program(tmp_path))))
    return ServerProcess.start(
        argv, env=environment(**variables, **more), cwd=Path(resolved(given["WorkingDirectory"]))
    )


def test_the_unit_starts_a_server_that_tells_when_it_is_ready(tmp_path: Path) -> None:
    with (
        ServiceManager(tmp_path / "notify") as manager,
        start_unit(tmp_path, **manager.environment(60)) as server,
    ):
        manager.until(READY)
        path = tmp_path / "run/dspex-persist/bridge.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with connect(f"grpc+unix:{path}") as state:
            state.initialize_session("s")
        assert (tmp_path / "state/dspex-persist/sessions.db").exists()
        backups = tmp_path / "state/dspex-persist/backups"
        backups.mkdir()
        back_up(backups, program(tmp_path))
        # As the watchdog ends it.
        server.send_signal(signal.SIGABRT)
        assert server.wait(within(30)) == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in server.stderr_tail
        assert 'writer.py", line' in server.stderr_tail


def back_up(folder: Path, binary: Path) -> None:
    """Run the commands of the backup's unit, which keep the newest."""
    unit = dict(lines_of("dspex-persist-backup.service"))
    for number in range(50):
        (folder / f"sessions-2000-{number:02}.db").touch()
    for name in ("ExecStart", "ExecStartPost"):
        command = unit[name].replace("$$", "$").replace("%%", "%").replace(PROGRAM, str(binary))
        done = subprocess.run(
            shlex.split(command),
            cwd=folder,
            env=environment(DSPEX_PERSIST_DB=str(folder.parent / "sessions.db")),
            capture_output=True,
            text=True,
            timeout=within(60),
            check=False,
        )
        assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in folder.iterdir() if path.suffix == ".db")
    assert len(left) == 48
    assert re.fullmatch(r"sessions-\d{8}T\d{6}Z\.db", left[-1])
    assert left[0] == "sessions-2000-03.db"


def is_served(path: Path) -> bool:
    try:
        return serves(UnixAddress(str(path)), None, within(10))
    except NoAnswerError:
        return False


@needs("systemd-socket-activate")
def test_the_proxy_lets_others_in(tmp_path: Path) -> None:
    unit = dict(lines_of("dspex-persist-proxy.service"))
    command = shlex.split(unit["ExecStart"].replace("%t", str(tmp_path / "run")))
    if not Path(command[0]).exists():
        pytest.skip(f"there is no {command[0]}")
    outside = tmp_path / "outside.sock"
    argv = ["systemd-socket-activate", "-l", str(outside), *command]
    # Units ignore SIGPIPE, as Python does: it would end the proxy when a client goes.
    with start_unit(tmp_path), subprocess.Popen(argv, stderr=subprocess.DEVNULL, restore_signals=False) as proxy:
        try:
            wait_until(lambda: is_served(outside), "the socket is open, and passed on")
            with connect(f"grpc+unix:{outside}") as state:
                state.initialize_session("s")
        finally:
            proxy.terminate()


# The container


def instructions() -> list[tuple[str, str]]:
    text = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def test_the_container_is_built_of_what_is_there() -> None:
    given = instructions()
    assert [text for name, text in given if name == "FROM"] == ["${PYTHON} AS build", "${PYTHON}"]
    assert dict(text.split("=", 1) for name, text in given if name == "ARG")["PYTHON"].startswith("python:3.")
    sources = [word for name, text in given if name == "COPY" and "--from" not in text for word in text.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "dspex_persist", "migrations"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    (build,) = [text for name, text in given if name == "RUN" and "pip" in text]
    # Every package in the version of the tests.
    assert all(
        "-c constraints.txt" in part or "--no-deps" in part for part in re.findall(r"pip (?:install|wheel)[^&]*", build)
    )
    assert "hatchling==" in (ROOT / "constraints.txt").read_text()
    assert "://" not in "".join(text for _, text in given).replace("file://", "")


def test_the_container_runs_as_it_should(tmp_path: Path) -> None:
    given = instructions()
    final = given[[index for index, (name, _) in enumerate(given) if name == "FROM"][-1] :]
    only: Callable[[str], list[str]] = lambda wanted: [text for name, text in final if name == wanted]  # noqa: E731
    assert only("USER") == ["10001:10001"]
    assert only("VOLUME") == ["/data"]
    assert only("STOPSIGNAL") == ["SIGTERM"]
    assert (only("ENTRYPOINT"), only("CMD")) == (['["dspex-persist"]'], ['["serve"]'])
    assert only("HEALTHCHECK")[0].endswith('CMD ["dspex-persist", "health"]')
    variables = dict(word.split("=", 1) for word in shlex.split(only("ENV")[0]))
    variables.pop("PATH")
    assert settings_in(variables) <= set(Settings.model_fields)
    variables["DSPEX_PERSIST_DB"] = str(tmp_path / "sessions.db")
    variables["DSPEX_PERSIST_LISTEN"] = variables["DSPEX_PERSIST_LISTEN"].replace(":50051", ":0")
    argv = [str(program(tmp_path))]
    # Other machines are let in only if somebody says so.
    refused = subprocess.run(
        [*argv, "serve"], cwd=tmp_path, env=environment(**variables), capture_output=True, text=True, timeout=within(60)
    )
    assert refused.returncode == 2
    assert "--tls-cert" in refused.stderr
    variables["DSPEX_PERSIST_INSECURE"] = "yes"
    with ServerProcess.start((*argv, "serve"), env=environment(**variables), cwd=tmp_path) as server:
        done = subprocess.run(
            [*argv, "health"],
            cwd=tmp_path,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=within(60),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert server.terminate(within(30)) == 0
