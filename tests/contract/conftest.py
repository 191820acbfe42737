"""Two servers on the database that the fixture `opening` of a module opens; see `two_servers`."""

from collections.abc import Iterator

import pytest

from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from tests.contract.test_shared import Alternating
from tests.contract.two_servers import Opening


@pytest.fixture(scope="class")
def alternating(request: pytest.FixtureRequest, opening: Opening) -> Iterator[StateProvider]:
    with Alternating([opening.engine(request.cls.options) for _ in range(2)]) as provider:
        yield provider


@pytest.fixture(scope="class")
def single(request: pytest.FixtureRequest, opening: Opening) -> Iterator[StateProvider]:
    options = request.cls.options
    with opening.state(options, tools=CONTRACT_TOOLS) as provider, opening.engine(None):
        yield provider
