"""Each relation is tested on every backend, through a fixture that stays the same between Hypothesis' examples."""

import pytest


@pytest.fixture(params=["triton", "torch"], scope="module")
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param
