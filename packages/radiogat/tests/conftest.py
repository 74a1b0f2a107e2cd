import sys
from pathlib import Path

import pytest
from radiogat.config import CityConfig
from radiogat.simulate import city

sys.path.append(str(Path(__file__).parent))  # radiogat_logs

RELEASED = Path(__file__).parents[3].parent / "shared/data/radiogat/radiogat_raytracing_6areas_5bands.npz"


@pytest.fixture(scope="session")
def released():
    """The file with the authors' maps."""
    if not RELEASED.exists():
        pytest.skip("the authors' maps do not lie beside the repository")
    return RELEASED


@pytest.fixture(scope="session")
def town():
    """A procedural city of 80 x 80 cells with three bands: to be read only."""
    return city(CityConfig(size=80, freq_mhz=(1750.0, 3500.0, 5750.0), seed=100))


@pytest.fixture(scope="session")
def measured(town):
    """A tenth of its cells in each band."""
    return town.samples(town.draw(0.1, 100))
