import pytest
from distributions import DISTRIBUTIONS, PACKAGES, Distribution


@pytest.fixture(params=DISTRIBUTIONS, ids=lambda distribution: distribution.name)
def distribution(request) -> Distribution:
    return request.param


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request) -> Distribution:
    return request.param
