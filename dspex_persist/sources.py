"""Where settings are looked up: the environment and a TOML file. Without pydantic, which takes long to import."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dspex_persist.opening import ENV_PREFIX

CONFIG_VARIABLE: Final = f"{ENV_PREFIX}CONFIG"
DEFAULT_CONFIG: Final = Path("dspex-persist.toml")
LISTEN: Final = "127.0.0.1:50051"
"""The default address of a server."""
DATABASE: Final = "sessions.db"
"""The default database."""


@dataclass(eq=False)
class SettingsError(ValueError):
    """A setting is invalid: its name, the reason, and where it was set ("" if that adds nothing)."""

    setting: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        came_from = f" ({self.source})" if self.source else ""
        return f"setting {self.setting}{came_from}: {self.reason}"


def find_file(config: Path | None) -> tuple[Path | None, str]:
    """Return the file to read, if any, and the flag or variable that named it."""
    if config is not None:
        return config, "flag --config"
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named), f"environment variable {CONFIG_VARIABLE}"
    return (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None), ""


def read_file(path: Path, named_by: str) -> dict[str, Any]:
    """Return what a TOML file contains.

    Raises:
        SettingsError: It cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError("config", f"{path} is not valid TOML: {error}", named_by) from error
    except UnicodeDecodeError as error:
        raise SettingsError("config", f"{path} is not valid TOML: it is not UTF-8", named_by) from error
    except OSError as error:
        raise SettingsError("config", f"cannot read {path}: {error.strerror}", named_by) from error


def texts(config: Path | None, *names: str) -> dict[str, str]:
    """Return the settings of these names that are set to a text, unchecked: the environment wins over the file.

    Raises:
        SettingsError: The file cannot be read.
    """
    path, named_by = find_file(config)
    values = read_file(path, named_by) if path is not None else {}
    found = {name: values[name] for name in names if isinstance(values.get(name), str)}
    for name in names:
        # An empty variable counts as unset.
        if text := os.environ.get(ENV_PREFIX + name.upper()):
            found[name] = text
    return found
