"""Certificates for tests, made with the openssl command: an authority, and what it issues."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CURVE: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
HERE: Final = "IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    cert: Path
    key: Path

    def replace(self, other: "Pair") -> None:
        """Put another pair in the place of this one, file after file, as tools that renew certificates do."""
        for old, new in ((self.cert, other.cert), (self.key, other.key)):
            beside = old.with_suffix(".new")
            shutil.copyfile(new, beside)
            beside.replace(old)


class Authority:
    """A certificate authority of its own.

    Args:
        folder: Where its files are.
        name: Its name.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl("req", "-x509", *_CURVE, "-keyout", self._key, "-out", self.cert, "-subj", f"/CN={name}", "-days", "2")

    def issue(self, name: str, hosts: str = HERE, *, days: int = 2, begins: str = "") -> Pair:
        """Issue a certificate for hosts (`DNS:NAME` or `IP:ADDRESS`).

        One of negative days has expired. `begins`: when it begins to be valid, if not now, as 20990101000000Z.
        """
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={hosts}\n")
        _openssl("req", "-new", *_CURVE, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        if begins:
            self._issue_from(begins, request, pair.cert, extensions)
            return pair
        issued = ("-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-extfile", extensions, "-days", str(days))
        _openssl("x509", "-req", "-in", request, "-out", pair.cert, *issued)
        return pair

    def _issue_from(self, begins: str, request: Path, cert: Path, extensions: Path) -> None:
        """Issue a certificate by the command that can say when it begins."""
        (self._folder / "index.txt").touch()
        settings = self._folder / "ca.conf"
        settings.write_text(_SETTINGS.format(folder=self._folder))
        dates = ("-startdate", begins, "-enddate", f"{int(begins[:4]) + 1}{begins[4:]}")
        keys = ("-cert", self.cert, "-keyfile", self._key, "-extfile", extensions)
        _openssl("ca", "-batch", "-notext", "-config", settings, "-in", request, "-out", cert, *dates, *keys)


_SETTINGS: Final = """
[ca]
default_ca = this
[this]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
"""


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(("openssl", *map(str, arguments)), check=True, capture_output=True, timeout=60)
