"""Small scenes of each kind in files."""

import json

import numpy as np
import torch
from PIL import Image

WIDTH, HEIGHT = 30, 21


def photo(seed, width=WIDTH, height=HEIGHT):
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear")[0]
    return (255 * x.permute(1, 2, 0).numpy()).astype(np.uint8)


def pose(number):
    matrix = np.eye(4)
    matrix[:3, 3] = [np.cos(number), np.sin(number), 1]
    return matrix.tolist()


def nerfstudio(root, count=4, suffix=".png"):
    """Distorted pictures of two cameras, with masks and points."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    frames = []
    for i in range(count):
        size = (WIDTH, HEIGHT) if i < count - 1 else (HEIGHT, WIDTH)
        name = f"images/frame_{i + 1:05}{suffix}"
        Image.fromarray(photo(i, *size)).save(root / name)
        mask = np.zeros(size[::-1], np.uint8)
        mask[4:-4, 5:-5] = 255
        Image.fromarray(mask).save(root / f"masks/frame_{i + 1:05}.png")
        own = {} if i < count - 1 else {"w": HEIGHT, "h": WIDTH, "fl_x": 25.0, "fl_y": 25.0, "cx": 10.5, "cy": 15.0}
        more = {"mask_path": f"masks/frame_{i + 1:05}.png", "colmap_im_id": i + 1}
        frames.append({"file_path": name, "transform_matrix": pose(i)} | own | more)
    (root / "sparse_pc.ply").write_text("ply\n")
    content = {
        "camera_model": "OPENCV",
        "w": WIDTH,
        "h": HEIGHT,
        "fl_x": 22.0,
        "fl_y": 22.5,
        "cx": 15.0,
        "cy": 10.5,
        "k1": 0.05,
        "k2": -0.01,
        "p1": 0.001,
        "p2": 0.0,
        "frames": frames,
        "ply_file_path": "sparse_pc.ply",
        "train_filenames": [frame["file_path"] for frame in frames[:-1]],
        "val_filenames": [frames[-1]["file_path"]],
    }
    (root / "transforms.json").write_text(json.dumps(content, indent=2))
    return root


def colmap(root, count=4, model="sparse/0", text=False, names="front/view_{}.png"):
    """Distorted pictures of two cameras, placed by a model in COLMAP's text format, or binary by pycolmap."""
    import pycolmap

    folder = root / model
    folder.mkdir(parents=True)
    first, second = "22 22.5 15 10.5 0.05 -0.01 0.001 0", "25 10.5 15 0.02"
    cameras = f"1 OPENCV {WIDTH} {HEIGHT} {first}\n2 SIMPLE_RADIAL {HEIGHT} {WIDTH} {second}\n"
    (folder / "cameras.txt").write_text(cameras)
    lines = []
    for i in range(1, count + 1):
        camera, name = 1 if i < count else 2, names.format(i)
        lines.append(f"{i} 1 0 0 0 {i} 0 1 {camera} {name}\n\n")
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i, *((WIDTH, HEIGHT) if camera == 1 else (HEIGHT, WIDTH)))).save(path)
    (folder / "images.txt").write_text("".join(lines))
    (folder / "points3D.txt").write_text("1 0 0 4 9 8 7 0.5\n")
    if not text:
        found = pycolmap.Reconstruction(str(folder))
        for file in folder.glob("*.txt"):
            file.unlink()
        found.write_binary(str(folder))
    return root
