"""Building footprints of shapefile, GeoPackage, GeoJSON and what else GDAL reads, laid on a raster."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radiogat.planes import moved
from radiogat.samples import Grid
from tenfold import UserError
from tenfold.errors import did_you_mean, needs

Bools = NDArray[np.bool_]
SUFFIXES = frozenset({".json", ".geojson", ".geojsonl", ".shp", ".gpkg", ".fgb", ".kml", ".gml", ".gdb", ".zip"})
"""Endings of files that are read as shapes."""
_MANY = 100_000
"""Shapes of a file above which those outside of the map are not read."""
_NOT_BUILT = frozenset({"", "no", "none", "0", "false", "nan"})
"""Values of the tag building that say that there is none."""


def is_shapes(path: str | Path) -> bool:
    """Whether a file, or a layer of one as ``FILE:LAYER``, is read as shapes."""
    return layer_of(path)[0].suffix.lower() in SUFFIXES


def layer_of(path: str | Path) -> tuple[Path, str | None]:
    """File and layer of ``FILE`` or ``FILE:LAYER``."""
    text = str(path)
    head, _, layer = text.rpartition(":")
    if not Path(text).exists() and head and Path(head).suffix.lower() in SUFFIXES:
        return Path(head), layer
    return Path(text), None


@dataclasses.dataclass(frozen=True)
class Footprints:
    """Polygons of a file.

    Args:
        polygons: (n) of shapely.
        crs: their coordinate system; None where the file names none.
        notes: what was left out, in words.
        outside: number of the file's shapes that were not read since they lie outside of the map.
    """

    polygons: NDArray[Any]
    crs: str | None
    notes: tuple[str, ...]
    outside: int = 0


def polygons_on(path: str | Path, grid: Grid, crs: str | None) -> Bools:
    """(H, W) cells whose center lies in a footprint, holes left out; what was found is said.

    Args:
        path: file of any kind in ``SUFFIXES``, or ``FILE:LAYER``. Of a file that has a column ``building`` (OpenStreetMap's
            tag), the shapes with a value there.
        grid: the raster.
        crs: plane of the raster; None takes positions as they are.

    Raises:
        UserError: not such a file, several layers with polygons, or no shape covers a cell.
        MissingExtraError: pyogrio, shapely or rasterio is not installed.
    """
    found = _read(path, grid, crs)
    from rasterio.features import rasterize

    name, polygons = layer_of(path)[0], _in_plane(path, found, grid, crs)
    inside = _meets(polygons, grid)
    near = polygons[inside]
    label = np.zeros(grid.shape, dtype=np.int32)
    if len(near):
        pairs = zip(near, range(1, len(near) + 1), strict=True)
        label = rasterize(pairs, out_shape=grid.shape, transform=grid.transform, dtype="int32")
    shown = np.zeros(len(near) + 1, dtype=bool)
    shown[np.unique(label)] = True
    small = sum(not _covers(near[i], grid) for i in np.flatnonzero(~shown[1:]))
    outside = found.outside + int((~inside).sum())
    total = len(polygons) + found.outside
    mask = label > 0
    said = [f"{outside} outside of the map"] if outside else []
    said += [f"{small} cover no cell's center"] if small else []
    said += found.notes
    detail = f" ({', '.join(said)})" if said else ""
    if not mask.any():
        raise UserError(
            f"{name}: none of its {total} shapes covers the center of a cell of the map{detail}, so that it would have no"
            " effect: check its plane and place"
        )
    text = (
        f"{name}: {int(mask.sum())} of {mask.size} cells are built up, by {total - outside - small} of {total} shapes"
    )
    warnings.warn(f"{text}{detail}", stacklevel=3)
    return mask


def _covers(polygon: Any, grid: Grid) -> bool:
    """Whether a polygon covers a cell's center, also where others lie above it."""
    import shapely

    low, high = np.array(polygon.bounds[:2]), np.array(polygon.bounds[2:])
    corner = np.array([grid.x0, grid.y0 - grid.height * grid.cell])
    first = np.ceil((low - corner) / grid.cell - 0.5).astype(int)
    last = np.floor((high - corner) / grid.cell - 0.5).astype(int)
    first, last = np.maximum(first, 0), np.minimum(last, [grid.width - 1, grid.height - 1])
    if (last < first).any():
        return False
    x, y = (corner[i] + (np.arange(first[i], last[i] + 1) + 0.5) * grid.cell for i in range(2))
    return bool(shapely.contains_xy(polygon, *np.meshgrid(x, y)).any())


def _meets(polygons: NDArray[Any], grid: Grid) -> Bools:
    import shapely

    b = shapely.bounds(polygons).reshape(-1, 4)
    right, low = grid.x0 + grid.width * grid.cell, grid.y0 - grid.height * grid.cell
    return np.asarray((b[:, 0] < right) & (b[:, 2] > grid.x0) & (b[:, 1] < grid.y0) & (b[:, 3] > low))


def _in_plane(path: str | Path, found: Footprints, grid: Grid, crs: str | None) -> NDArray[Any]:
    """The polygons in the map's plane.

    Raises:
        UserError: the file names no plane and holds no degrees, and does not lie where the map is.
    """
    import shapely

    if crs is None or not len(found.polygons):
        return found.polygons
    b = shapely.total_bounds(found.polygons)
    degrees = found.crs in {"EPSG:4326", "OGC:CRS84", "EPSG:4979"}
    if found.crs is None or (degrees and (np.abs(b[[0, 2]]).max() > 360 or np.abs(b[[1, 3]]).max() > 90)):
        if not _meets(found.polygons, grid).any():
            raise UserError(
                f"{path} names no coordinate system, and its positions ({b[0]:.6g}, {b[1]:.6g} to {b[2]:.6g}, {b[3]:.6g}) do"
                f" not lie on the map as positions of {crs}: give it one (ogr2ogr -a_srs EPSG:... OUT IN)"
            )
        warnings.warn(f"{path} names no coordinate system: its positions are taken as those of {crs}", stacklevel=4)
        return found.polygons
    own = found.crs
    return np.asarray(shapely.transform(found.polygons, lambda xy: moved(xy, own, crs)))


def _read(path: str | Path, grid: Grid, crs: str | None) -> Footprints:
    """The polygons of a file.

    Raises:
        UserError: it cannot be read, or which layer is meant is not clear.
    """
    for module in ("pyogrio", "shapely", "rasterio"):
        needs(module, "geo", "radiogat", why="building footprints")
    import pyogrio
    import shapely
    from pyogrio.errors import DataLayerError, DataSourceError

    file, layer = layer_of(path)
    if not file.exists():
        raise UserError(f"{file}: no such file")
    try:
        layer = _layer(file, layer, pyogrio.list_layers(file))
        info = pyogrio.read_info(file, layer=layer, force_feature_count=True)
        tagged = "building" in info["fields"]
        box = None
        if info["features"] > _MANY and crs is not None and info["crs"] is not None:
            low, high = grid.y0 - grid.height * grid.cell, grid.y0
            corners = [[grid.x0, low], [grid.x0 + grid.width * grid.cell, high], [grid.x0, high]]
            corners.append([grid.x0 + grid.width * grid.cell, low])
            there = moved(np.array(corners), crs, info["crs"])
            box = (*there.min(axis=0), *there.max(axis=0))
        columns = ["building"] if tagged else []
        meta, _, binary, fields = pyogrio.raw.read(file, layer=layer, columns=columns, force_2d=True, bbox=box)
    except (DataSourceError, DataLayerError) as error:
        raise UserError(f"{file}: not a file of shapes that can be read ({error})") from error
    shapes = shapely.from_wkb(binary)
    notes = []
    if tagged:
        built = np.array([str(value).strip().lower() not in _NOT_BUILT for value in fields[0]], dtype=bool)
        if not built.all():
            notes.append(f"{int((~built).sum())} without the tag building")
        shapes = shapes[built]
    if (empty := int(shapely.is_missing(shapes).sum() + shapely.is_empty(shapes).sum())) > 0:
        notes.append(f"{empty} without a geometry")
    shapes = shapes[~shapely.is_missing(shapes) & ~shapely.is_empty(shapes)]
    while (shapely.get_type_id(shapes) >= 4).any():  # collections, also of collections
        shapes = shapely.get_parts(shapes)
    polygon = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    if not polygon.all():
        notes.append(f"{int((~polygon).sum())} are points or lines")
    left = max(0, int(info["features"]) - len(binary)) if box is not None else 0
    return Footprints(shapes[polygon], meta["crs"], tuple(notes), left)


def _layer(file: Path, layer: str | None, layers: Any) -> str | None:
    """The layer that was asked for, or the only one that can hold polygons.

    Raises:
        UserError: there is no such layer, none with polygons, or several.
    """
    names = [str(name) for name, _ in layers]
    if layer is not None:
        if layer not in names:
            raise UserError(f"{file}: no layer '{layer}': {did_you_mean(layer, names)}")
        return layer
    able = [str(name) for name, kind in layers if kind is not None and _may_hold_polygons(str(kind))]
    if not able:
        shown = ", ".join(f"{name} ({kind})" for name, kind in layers) or "none"
        raise UserError(f"{file}: no layer with polygons; its layers: {shown}")
    if len(able) > 1:
        raise UserError(f"{file}: {len(able)} layers may hold buildings, {', '.join(able)}: give {file}:LAYER")
    return able[0]


def _may_hold_polygons(kind: str) -> bool:
    return "Polygon" in kind or "Surface" in kind or "Unknown" in kind or "Collection" in kind
