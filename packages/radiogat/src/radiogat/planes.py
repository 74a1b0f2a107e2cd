"""Planes in meters for positions in degrees, and back.

UTM with pyproj, else an equirectangular plane about the middle of the measurements, which holds for areas of up to 50 km.
"""

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold import UserError
from tenfold.errors import installed, needs

Floats = NDArray[np.float64]
_PLAIN = "+proj=eqc +R=6371000 +units=m +no_defs"
_RADIUS = 6371000.0


def plane_for(lon: Floats, lat: Floats, name: str = "position") -> str:
    """A plane in meters for positions in degrees: the UTM zone with pyproj, else an equirectangular one.

    Raises:
        UserError: degrees out of range (swapped, perhaps), an area over the antimeridian, or, without pyproj, over 50 km.
    """
    if (np.abs(lat) > 90).any():
        swapped = (np.abs(lon) <= 90).all() and (np.abs(lat) <= 180).all()
        raise UserError(
            f"{name}: latitude {lat[np.argmax(np.abs(lat))]:g} is outside -90 to 90"
            + ("; are latitude and longitude swapped?" if swapped else "")
        )
    if (np.abs(lon) > 180).any():
        raise UserError(f"{name}: longitude {lon[np.argmax(np.abs(lon))]:g} is outside -180 to 180")
    if np.ptp(lon) > 180:
        raise UserError(f"{name}: positions on both sides of the antimeridian; split the area")
    lon0, lat0 = float((lon.min() + lon.max()) / 2), float((lat.min() + lat.max()) / 2)
    if not installed("pyproj"):
        extent = max(np.ptp(lat) * 111.2, np.ptp(lon) * 111.2 * math.cos(math.radians(lat0)))
        if extent > 50:
            raise UserError(
                f'{name}: the area is {extent:.0f} km wide; more than 50 km needs pyproj: pip install "radiogat[geo]"'
            )
        return f"{_PLAIN} +lat_ts={lat0:.6f} +lat_0={lat0:.6f} +lon_0={lon0:.6f}"
    zone = min(60, int((lon0 + 180) // 6) + 1)
    return f"EPSG:{(32600 if lat0 >= 0 else 32700) + zone}"


def check_plane(crs: str) -> None:
    """Refuse what is no plane in meters.

    Raises:
        UserError: an unknown name, degrees, or another unit than meters.
    """
    if crs.startswith(_PLAIN):
        return
    needs("pyproj", "geo", "radiogat", why=f"the plane {crs}")
    import pyproj
    from pyproj.exceptions import CRSError

    try:
        found = pyproj.CRS.from_user_input(crs)
    except CRSError:
        raise UserError(
            f"--crs {crs}: not a known coordinate system; expected a plane in meters, EPSG:25832 for example"
        ) from None
    if found.is_geographic or found.is_geocentric:
        raise UserError(f"--crs {crs} ({found.name}) is in degrees, expected a plane in meters, EPSG:25832 for example")
    units = {axis.unit_name for axis in found.axis_info[:2]}
    if not all(unit.startswith("met") for unit in units):  # as PROJ spells it
        raise UserError(f"--crs {crs} ({found.name}) is in {', '.join(sorted(units))}, expected a plane in meters")
    if any(word in found.name.lower() for word in ("pseudo-mercator", "world mercator")):
        warnings.warn(
            f"--crs {crs} ({found.name}) stretches distances, at latitude 50 by 56 %: UTM does not",
            stacklevel=4,
        )


def _plain_plane(crs: str) -> tuple[float, float] | None:
    if not crs.startswith(_PLAIN):
        return None
    values = dict(part.removeprefix("+").split("=") for part in crs.split() if "=" in part)
    return math.radians(float(values["lat_0"])), math.radians(float(values["lon_0"]))


def project(lon: Floats, lat: Floats, crs: str) -> Floats:
    """(n, 2) x and y in a plane, of positions in degrees (WGS 84)."""
    if (plain := _plain_plane(crs)) is not None:
        lat0, lon0 = plain
        x = _RADIUS * math.cos(lat0) * (np.radians(lon) - lon0)
        return np.stack([x, _RADIUS * (np.radians(lat) - lat0)], axis=1)
    needs("pyproj", "geo", "radiogat", why=f"the plane {crs}")
    import pyproj

    return np.stack(pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat), axis=1)


def unproject(xy: ArrayLike, crs: str) -> Floats:
    """(n, 2) longitude and latitude in degrees of positions in a plane."""
    points = np.asarray(xy, dtype=np.float64)
    if (plain := _plain_plane(crs)) is not None:
        lat0, lon0 = plain
        lon = np.degrees(points[:, 0] / (_RADIUS * math.cos(lat0)) + lon0)
        return np.stack([lon, np.degrees(points[:, 1] / _RADIUS + lat0)], axis=1)
    needs("pyproj", "geo", "radiogat", why=f"the plane {crs}")
    import pyproj

    transform = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform
    return np.stack(transform(points[:, 0], points[:, 1]), axis=1)


def moved(xy: ArrayLike, own: str, goal: str) -> Floats:
    """(n, 2) positions of one coordinate system in another; degrees are longitude, latitude.

    Raises:
        MissingExtraError: the systems differ, and pyproj is not installed.
    """
    points = np.asarray(xy, dtype=np.float64)
    if own == goal:
        return points
    if own in {"EPSG:4326", "OGC:CRS84"}:
        return project(points[:, 0], points[:, 1], goal)
    if goal == "EPSG:4326":
        return unproject(points, own)
    needs("pyproj", "geo", "radiogat", why=f"the coordinate system {own}")
    import pyproj

    transform = pyproj.Transformer.from_crs(own, goal, always_xy=True).transform
    return np.stack(transform(points[:, 0], points[:, 1]), axis=1)


def same_plane(one: str, other: str) -> bool:
    """Whether two names of planes mean the same one.

    Raises:
        MissingExtraError: the names differ, and pyproj is not installed.
    """
    if one == other:
        return True
    needs("pyproj", "geo", "radiogat", why="comparing coordinate systems")
    import pyproj

    return bool(pyproj.CRS.from_user_input(one) == pyproj.CRS.from_user_input(other))
