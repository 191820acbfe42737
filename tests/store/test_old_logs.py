"""The bytes of existing logs stay as they were released: exports, hash chains, and imports of exports."""

import json
from pathlib import Path

import pytest

from tests.assets.make_logs import ASSETS, LOGS, describe_log

DATABASES = sorted(ASSETS.glob("*.db"))


def test_each_released_database_has_its_digests() -> None:
    assert {path.stem for path in LOGS.iterdir()} == {path.stem for path in DATABASES}


@pytest.mark.parametrize("asset", DATABASES, ids=lambda asset: asset.stem)
def test_no_byte_of_an_old_log_changes(asset: Path, tmp_path: Path) -> None:
    described = describe_log(asset, tmp_path)
    assert described == json.loads((LOGS / f"{asset.stem}.json").read_text(encoding="utf-8"))
