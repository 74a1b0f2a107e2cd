"""Bird's-eye view of the road, by the calibration's transform between camera and road plane."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class BirdsEye:
    """The rectangle of the road plane that is looked at, in meters; x to the right, z ahead.

    Args:
        left: smallest x.
        right: largest x.
        near: smallest z.
        far: largest z.
        cell: side of a pixel.

    Source: KITTI's road benchmark, which ranks methods on these 800 x 400 pixels.
    """

    left: float = -10.0
    right: float = 10.0
    near: float = 6.0
    far: float = 46.0
    cell: float = 0.05

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return round((self.far - self.near) / self.cell), round((self.right - self.left) / self.cell)

    def centers(self) -> NDArray[np.float64]:
        """x and z of every pixel, (rows, columns, 2); the farthest row is the first."""
        rows, columns = self.shape
        x = self.left + (np.arange(columns) + 0.5) * self.cell
        z = self.far - (np.arange(rows) + 0.5) * self.cell
        return np.stack(np.broadcast_arrays(x[None], z[:, None]), -1)


def road_homography(
    projection: NDArray[Any], rectify: NDArray[Any], camera_to_road: NDArray[Any]
) -> NDArray[np.float64]:
    """H (3, 3) with pixel ~ H (x, z, 1) for points of the road plane y = 0.

    Args:
        projection: P2 of KITTI, (3, 4).
        rectify: R0_rect, (3, 3).
        camera_to_road: Tr_cam_to_road, (3, 4).
    """
    whole = np.eye(4)
    whole[:3] = camera_to_road
    rotation = np.eye(4)
    rotation[:3, :3] = rectify
    found: NDArray[np.float64] = (np.asarray(projection) @ rotation @ np.linalg.inv(whole))[:, [0, 2, 3]]
    return found


def level_homography(intrinsics: NDArray[Any], height: float, pitch: float) -> NDArray[np.float64]:
    """The same from intrinsics, the camera's height in meters and its pitch downward in radians, without roll or yaw."""
    c, s = np.cos(pitch), np.sin(pitch)
    # road (x, 0, z) lies at (x, height, z) below an upright camera, which is then pitched down
    points = np.array([[1.0, 0.0, 0.0], [0.0, -s, c * height], [0.0, c, s * height]])
    found: NDArray[np.float64] = np.asarray(intrinsics, np.float64) @ points
    return found


def to_birdseye(
    image: NDArray[Any], homography: NDArray[Any], view: BirdsEye | None = None, *, outside: int = 0
) -> NDArray[Any]:
    """A picture (H, W) or (H, W, C) as seen from above, by the nearest pixel, as KITTI's kit does.

    Args:
        image: the picture.
        homography: road plane to pixels.
        view: rectangle of the road.
        outside: value of what the picture does not show.
    """
    at = (view or BirdsEye()).centers()
    points = np.concatenate([at, np.ones_like(at[..., :1])], -1) @ np.asarray(homography).T
    depth = points[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = points[..., 0] / depth, points[..., 1] / depth
    height, width = image.shape[:2]
    seen = (depth > 0) & (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
    columns = np.where(seen, np.round(np.where(seen, u, 0)), 0).astype(np.int64)
    rows = np.where(seen, np.round(np.where(seen, v, 0)), 0).astype(np.int64)
    found = image[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    found[~seen] = outside
    return found
