"""Writing and reading small logs, and the places that they speak of."""

import warnings

import numpy as np
from radiogat.data import read_samples
from radiogat.planes import unproject

PLACES = [(48.1401, 11.5701), (48.1402, 11.5702), (48.1403, 11.5703), (48.1404, 11.5704)]


def written(tmp_path, lines, name="log.csv", encoding="utf-8", end="\n"):
    path = tmp_path / name
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


def read(path, *said, **options):
    """The measurements, and all that must be said about them in the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        samples = read_samples(path, **options)
    text = " | ".join(str(w.message) for w in found if w.category is UserWarning)
    for part in said:
        assert part in text, text
    if not said:
        assert not text, text
    return samples


def lonlat(samples):
    return unproject(samples.xy, samples.crs)


def at_places(samples, count=4):
    assert np.allclose(lonlat(samples), [(lon, lat) for lat, lon in PLACES[:count]], atol=1e-9)
