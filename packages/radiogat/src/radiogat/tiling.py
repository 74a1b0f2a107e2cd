"""Maps of a country: tiles that the workers of a dask cluster predict, written as one file while they come.

Each worker loads the learned area once, from a file that all of them see. What a task takes is bounded by its tile.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radiogat.estimator import RadioMapEstimator
from radiogat.maps import MapLayout, beside, cog_of, dataset_of, geotiff_writer
from tenfold import UserError
from tenfold.errors import needs
from tenfold.files import replacing

if TYPE_CHECKING:
    import xarray
    from distributed import Client

Floats = NDArray[np.float64]
Window = tuple[slice, slice]
TILE = 256
"""Cells along the sides of a tile."""
_AT_ONCE = 16384
"""Cells that the models look at together, within a tile."""
_PER_CELL = 32_000
"""Bytes that one of these takes at most: 16 neighbors with their features, and the network's layers over them."""
_lock = threading.Lock()


@contextlib.contextmanager
def cluster(address: str) -> Iterator["Client"]:
    """Yield a client of the dask cluster whose scheduler has this address.

    Raises:
        UserError: no scheduler answers there, or it has no workers.
        MissingExtraError: dask.distributed is not installed.
    """
    needs("distributed", "dask", "radiogat", why=f"--dask {address}")
    from distributed import Client

    try:
        client = Client(address, timeout="5s")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler of dask answers there ({error})") from error
    with client:
        if not _threads(client):
            raise UserError(f"--dask {address}: the cluster has no workers: start some (dask worker {address})")
        yield client


def _threads(client: "Client") -> int:
    return sum(client.nthreads().values())  # type: ignore[no-untyped-call, unused-ignore]


def windows(shape: tuple[int, int], tile: int) -> Iterator[Window]:
    """Rows and columns of the tiles of a map, row by row."""
    for y in range(0, shape[0], tile):
        for x in range(0, shape[1], tile):
            yield slice(y, min(shape[0], y + tile)), slice(x, min(shape[1], x + tile))


def task_bytes(layout: MapLayout, tile: int) -> int:
    """Bytes that predicting one tile takes at most, beside the learned area: its layers, and the cells looked at together."""
    cells = tile * tile
    values = len(layout.layers) * len(layout.freq_mhz)
    return cells * (12 * values + 160) + min(cells, _AT_ONCE) * _PER_CELL


def check_memory(client: "Client", layout: MapLayout, tile: int) -> str:
    """In words, what a task takes, and what its workers have.

    Raises:
        UserError: some worker has less.
    """
    need = task_bytes(layout, tile)
    least = None
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        if limit := int(worker["memory_limit"]):
            share = limit // max(1, int(worker["nthreads"]))
            least = share if least is None else min(least, share)
    if least is not None and need > least:
        raise UserError(
            f"a tile of {tile} x {tile} cells takes up to {need / 1e6:.0f} MB, a thread of a worker has {least / 1e6:.0f} MB:"
            " give a smaller --tile, or workers with more memory or fewer threads"
        )
    has = "" if least is None else f" of the {least / 1e6:.0f} MB that it has"
    return (
        f"tiles of {tile} x {tile} cells; each takes a worker's thread up to {need / 1e6:.0f} MB{has}, beside the model"
    )


@functools.lru_cache(maxsize=1)
def _loaded(path: str, stamp: tuple[int, int]) -> RadioMapEstimator:
    return RadioMapEstimator.load(path)


def estimator_at(path: str) -> RadioMapEstimator:
    """The learned area of a file, loaded once in a process.

    Raises:
        UserError: there is no such file on this machine.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path}: a worker does not see this file: put the run where all of them do ({error})"
        ) from error
    with _lock:
        return _loaded(path, (found.st_mtime_ns, found.st_size))


def predict_tile(path: str, layout: MapLayout, window: Window) -> NDArray[np.float32]:
    """(L F or one more, rows, columns) values of a window: layer by layer each band, and buildings where they are known.

    Args:
        path: file of the learned area.
        layout: the whole map.
        window: rows and columns.
    """
    estimator = estimator_at(path)
    rows, columns = window
    shape = rows.stop - rows.start, columns.stop - columns.start
    centers = layout.grid.centers(rows).reshape(shape[0], -1, 2)[:, columns].reshape(-1, 2)
    found = estimator.at_centers(centers, layout.freq_mhz, layout.level)
    values = [found[name].reshape(-1, *shape) for name in layout.layers]
    scene = estimator.scene_
    if scene is not None and scene.building is not None:
        values.append(scene.built_at(centers).astype(np.float64).reshape(1, *shape))
    return np.concatenate(values, axis=0, dtype=np.float32)


def _placed_tile(path: str, layout: MapLayout, window: Window) -> tuple[Window, NDArray[np.float32]]:
    return window, predict_tile(path, layout, window)


def predicted(
    client: "Client", path: str, layout: MapLayout, tile: int
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Tiles in the order in which they are ready; at most two for each thread of the workers are on their way."""
    from distributed import as_completed

    left = windows(layout.grid.shape, tile)
    waiting = 2 * _threads(client)
    first = [client.submit(_placed_tile, path, layout, w, pure=False) for w in itertools.islice(left, waiting)]
    done = as_completed(first, with_results=True)  # type: ignore[no-untyped-call]
    first.clear()
    for _, result in done:
        yield result
        for window in itertools.islice(left, 1):
            more = client.submit(_placed_tile, path, layout, window, pure=False)
            done.add(more)  # type: ignore[no-untyped-call, unused-ignore]


def write_cog(client: "Client", model: Path, out: Path, layout: MapLayout, tile: int, progress: Any = iter) -> None:
    """Write a map as one cloud-optimized GeoTIFF.

    Args:
        client: of the cluster.
        model: file of the learned area, which all workers see.
        out: the file.
        layout: the map.
        tile: cells along the sides of a tile.
        progress: passes the tiles on, and shows how many came.
    """
    built = _has_buildings(model)
    with replacing(out) as temporary, beside(temporary) as plain:
        with geotiff_writer(plain, layout, built=built) as writer:
            for window, values in progress(predicted(client, str(model), layout, tile)):
                rows, columns = window
                writer.write(rows, columns, _layers_of(layout, values), values[-1] if built else None)
        cog_of(plain, temporary)


def _layers_of(layout: MapLayout, values: Any) -> dict[str, Any]:
    """By name (F, rows, columns), of what ``predict_tile`` gives."""
    bands = len(layout.freq_mhz)
    return {name: values[n * bands : (n + 1) * bands] for n, name in enumerate(layout.layers)}


def _has_buildings(model: Path) -> bool:
    scene = estimator_at(str(model)).scene_
    return scene is not None and scene.building is not None


def lazy_map(model: Path, layout: MapLayout, tile: int = TILE) -> "xarray.Dataset":
    """The map as a dataset of lazy arrays of dask, a chunk for each tile: what is taken from it is predicted then.

    Args:
        model: file of the learned area, which all workers see.
        layout: the map.
        tile: cells along the sides of a tile.

    Raises:
        MissingExtraError: dask or xarray is not installed.
    """
    needs("dask", "dask", "radiogat", why="lazy maps")
    import dask.array

    height, width = layout.grid.shape
    built = _has_buildings(model)
    count = len(layout.layers) * len(layout.freq_mhz) + built
    chunks = tuple(tuple(min(tile, size - start) for start in range(0, size, tile)) for size in (height, width))
    values = dask.array.map_blocks(  # type: ignore[no-untyped-call, unused-ignore]
        _chunk,
        str(model),
        dataclasses.replace(layout, building=None),
        chunks=((count,), *chunks),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), np.float32),
    )
    return dataset_of(layout, _layers_of(layout, values), values[-1].astype(np.int8) if built else None)


def _chunk(path: str, layout: MapLayout, block_info: Any = None) -> NDArray[np.float32]:
    """The chunk of ``lazy_map`` whose place dask says."""
    rows, columns = block_info[None]["array-location"][1:]
    return predict_tile(path, layout, (slice(*rows), slice(*columns)))


def write_zarr(client: "Client", model: Path, out: Path, layout: MapLayout, tile: int) -> None:
    """Write a map as a zarr store, each worker its own chunks.

    Raises:
        MissingExtraError: zarr is not installed.
    """
    needs("zarr", "dask", "radiogat", why="--format zarr")
    from zarr.storage import LocalStore

    lazy_map(model, layout, tile).to_zarr(LocalStore(out), mode="w", consolidated=False)
