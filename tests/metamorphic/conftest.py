"""Each relation is tested on every backend; hypothesis wants fixtures that do not change between examples."""

import pytest


@pytest.fixture(params=["triton", "torch"], scope="module")
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param
