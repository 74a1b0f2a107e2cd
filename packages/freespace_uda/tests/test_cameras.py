"""Cameras as people have them in files: read right, or refused in one line that says what is likely meant."""

import json

import numpy as np
import pytest
from freespace_uda import read_calibration
from freespace_uda.calibration import odd, of_numbers, pinhole, scaled

from tenfold import UserError

KITTI = """P0: 1 0 0 0 0 1 0 0 0 0 1 0
P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_cam_to_road: 1 0 0 0 0 1 0 -1.65 0 0 1 0
"""
ROS = """image_width: 640
image_height: 480
camera_name: head
camera_matrix:
  rows: 3
  cols: 3
  data: [525.5, 0, 319.5, 0, 526.5, 239.5, 0, 0, 1]
distortion_model: plumb_bob
"""
OPENCV = """%YAML:1.0
---
image_width: 640
image_height: 480
camera_matrix: !!opencv-matrix
   rows: 3
   cols: 3
   dt: d
   data: [ 525.5, 0., 319.5, 0., 526.5, 239.5, 0., 0., 1. ]
"""
COLMAP = """# Camera list with one line of data per camera:
#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]
1 PINHOLE 640 480 525.5 526.5 320.0 240.0
"""


ROS1 = """header:
  seq: 12
  frame_id: "camera"
height: 480
width: 640
distortion_model: "plumb_bob"
D: [0.0, 0.0, 0.0, 0.0, 0.0]
K: [525.5, 0.0, 319.5, 0.0, 526.5, 239.5, 0.0, 0.0, 1.0]
R: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
P: [525.5, 0.0, 319.5, 0.0, 0.0, 526.5, 239.5, 0.0, 0.0, 0.0, 1.0, 0.0]
binning_x: 0
roi:
  x_offset: 0
  height: 0
  width: 0
---
"""
ROS2 = """header:
  frame_id: camera
height: 480
width: 640
d:
- 0.0
k:
- 525.5
- 0.0
- 319.5
- 0.0
- 526.5
- 239.5
- 0.0
- 0.0
- 1.0
p: [525.5, 0.0, 319.5, 0.0, 0.0, 526.5, 239.5, 0.0, 0.0, 0.0, 1.0, 0.0]
---
"""
OPENCV_XML = """<?xml version="1.0"?>
<opencv_storage>
<image_width>640</image_width>
<image_height>480</image_height>
<cameraMatrix type_id="opencv-matrix">
  <rows>3</rows>
  <cols>3</cols>
  <dt>d</dt>
  <data>
    5.255e+02 0. 319.5 0. 5.265e+02 239.5 0. 0. 1.</data></cameraMatrix>
</opencv_storage>
"""
OPENCV_JSON = """{
    "camera_matrix": {
        "type_id": "opencv-matrix", "rows": 3, "cols": 3, "dt": "d",
        "data": [ 525.5, 0.0, 319.5, 0.0, 526.5, 239.5, 0.0, 0.0, 1.0 ]
    }
}
"""
KALIBR = """cam0:
  camera_model: pinhole
  distortion_coeffs: [0.0, 0.0, 0.0, 0.0]
  intrinsics: [525.5, 526.5, 319.5, 239.5]
  resolution: [640, 480]
"""
ORB = """%YAML:1.0
Camera.type: "PinHole"
Camera.fx: 525.5
Camera.fy: 5.265e2
Camera.cx: 319.5
Camera.cy: 239.5
Camera.width: 640
Camera.height: 480
"""
CITYSCAPES = json.dumps(
    {"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 525.5, "fy": 526.5, "u0": 319.5, "v0": 239.5}}
)
OPEN3D = json.dumps({"width": 640, "height": 480, "intrinsic_matrix": [525.5, 0, 0, 0, 526.5, 0, 319.5, 239.5, 1]})
KITTI_RAW = """calib_time: 09-Jan-2012 13:57:47
S_02: 1.392e+03 5.12e+02
K_02: 9.5e+02 0 6.9e+02 0 9.5e+02 2.4e+02 0 0 1
S_rect_02: 6.4e+02 4.8e+02
P_rect_02: 525.5 0 319.5 44.8 0 526.5 239.5 0.2 0 0 1 0.003
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("info.yaml", ROS),
        ("cv.yml", OPENCV),
        ("cameras.txt", COLMAP),
        ("rs.json", json.dumps({"width": 640, "height": 480, "fx": 525.5, "fy": 526.5, "ppx": 319.5, "ppy": 239.5})),
        ("k.txt", "525.5 0 319.5\n0 526.5 239.5\n0 0 1\n"),
        ("four.txt", "525.5, 526.5, 319.5, 239.5"),
        ("orfd.txt", "cam_K: 525.5 0 319.5 0 526.5 239.5 0 0 1\n"),
        ("msg.yaml", "width: 640\nheight: 480\nk: [525.5, 0, 319.5, 0, 526.5, 239.5, 0, 0, 1]\n"),
        ("ros1.yaml", ROS1),
        ("ros2.yaml", ROS2),
        ("cv.xml", OPENCV_XML),
        ("cv.json", OPENCV_JSON),
        ("kalibr.yaml", KALIBR),
        ("orb.yaml", ORB),
        ("cityscapes.json", CITYSCAPES),
        ("open3d.json", OPEN3D),
        ("four.txt", "525.5 0 319.5 0\n0 526.5 239.5 0\n0 0 1 0\n0 0 0 1\n"),
        ("raw.txt", KITTI_RAW),
        ("rows.json", "[[525.5, 0, 319.5], [0, 526.5, 239.5], [0, 0, 1]]"),
        ("camera.ini", "[camera]\nfx = 525.5\nfy = 5.265e2\ncx = 319.5\ncy = 239.5\n"),
        ("named.txt", "fx: 525.5\nfy: 526.5\ncx: 319.5\ncy: 239.5\n"),
        ("full.txt", COLMAP.replace("PINHOLE", "FULL_OPENCV").replace("240.0", "240.0 0 0 0 0 0 0 0 0")),
    ],
)
def test_one_camera_in_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert np.array_equal(read_calibration(tmp_path / name).intrinsics, pinhole(525.5, 526.5, 319.5, 239.5))


def test_kittis_p2_is_taken_and_its_road_transform(tmp_path):
    (tmp_path / "c.txt").write_text(KITTI)
    found = read_calibration(tmp_path / "c.txt")
    assert np.array_equal(found.intrinsics, pinhole(721.5377, 721.5377, 609.5593, 172.854))
    assert found.road is not None


def test_cameras_that_cannot_be_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="3 x 4 projection"):
        of_numbers([1.0] * 12, "k")
    with pytest.raises(UserError, match="not a camera matrix"):
        of_numbers([0.0, 1, 2, 3], "k")
    (tmp_path / "x.txt").write_text("hello world")
    with pytest.raises(UserError, match="no calibration of a known form"):
        read_calibration(tmp_path / "x.txt")
    (tmp_path / "fisheye.txt").write_text("1 OPENCV_FISHEYE 640 480 1 1 1 1 0 0 0 0")
    with pytest.raises(UserError, match="OPENCV_FISHEYE: expected one of"):
        read_calibration(tmp_path / "fisheye.txt")
    (tmp_path / "two.txt").write_text(COLMAP + "2 PINHOLE 640 480 1 1 1 1\n")
    with pytest.raises(UserError, match="2 cameras"):
        read_calibration(tmp_path / "two.txt")


def test_a_camera_for_other_pictures_is_told():
    kitti = pinhole(721.5, 721.5, 609.6, 172.9)
    assert odd(kitti, (1242, 375)) == []
    ((fatal, message),) = odd(kitti, (621, 188))
    assert fatal
    assert "about 1219 x 346" in message
    ((fatal, message),) = odd(pinhole(721.5, 721.5, 172.9, 609.6), (1242, 375))
    assert fatal
    assert "exchanged" in message
    ((fatal, message),) = odd(pinhole(721.5, 650, 609.6, 172.9), (1242, 375))
    assert not fatal
    assert "fx 721.5 and fy 650 differ by 11 %" in message
    ((fatal, message),) = odd(kitti, (1242, 375), (1280, 720))
    assert fatal
    assert "1280 x 720" in message
    half = scaled(kitti, (1242, 375), (621, 188))
    assert odd(half, (621, 188)) == []
    assert scaled(half, (621, 188), (1242, 375)) == pytest.approx(kitti)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("ros.yaml", ROS1.replace("D: [0.0", "D: [-0.3"), "lens distortion is not undone"),
        ("ros.yaml", ROS1.replace("P: [525.5", "P: [480.0"), "rectified pictures have P"),
        ("kalibr.yaml", KALIBR.replace("coeffs: [0.0", "coeffs: [-0.3"), "lens distortion is not undone"),
        ("orb.yaml", ORB + "Camera.k1: 0.26\n", "lens distortion is not undone"),
        ("stereo.json", OPENCV_JSON.replace("camera_matrix", "M1").replace("{", '{"M2": 0,', 1), "the left one of two"),
        ("cameras.txt", "1 SIMPLE_RADIAL 640 480 525.5 320 240 -0.05\n", "lens distortion is not undone"),
    ],
)
def test_what_makes_a_camera_wrong_for_raw_or_rectified_pictures_is_said(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    found = read_calibration(tmp_path / name)
    assert found.intrinsics[0, 0] == 525.5
    assert any(told in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("two.yaml", KALIBR + KALIBR.replace("cam0", "cam1").replace("525.5", "500"), r"2 cameras \(cam0, cam1\)"),
        ("two.yaml", ROS1 + ROS1.replace("525.5", "500"), "2 messages of different cameras"),
        ("entity.xml", '<!DOCTYPE a [<!ENTITY b "c">]><opencv_storage/>', "document type"),
        ("skew.txt", "525.5 9 319.5 0 526.5 239.5 0 0 1", "skew 9"),
        ("pose.txt", "1 0 0 2 0 1 0 3 0 0 1 4 0 0 0 1", "no camera matrix"),
        ("empty.yaml", "---\n", "expected names and values"),
    ],
)
def test_a_file_that_leaves_a_choice_is_refused(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_calibration(tmp_path / name)


def test_an_array_file_is_a_camera(tmp_path):
    np.save(tmp_path / "k.npy", pinhole(525.5, 526.5, 319.5, 239.5))
    assert read_calibration(tmp_path / "k.npy").intrinsics[0, 2] == 319.5


def test_a_ros_camera_that_gives_a_part_of_its_sensor_or_binned_pixels_has_another_k(tmp_path):
    part = "roi:\n  x_offset: 100\n  y_offset: 50\n  width: 320\n  height: 240\n"
    (tmp_path / "roi.yaml").write_text(ROS2.replace("---\n", "") + part)
    found = read_calibration(tmp_path / "roi.yaml")
    assert np.array_equal(found.intrinsics, pinhole(525.5, 526.5, 219.5, 189.5))
    assert found.size == (320, 240)
    whole = "roi:\n  x_offset: 0\n  y_offset: 0\n  width: 0\n  height: 0\n"
    (tmp_path / "bins.yaml").write_text(ROS2.replace("---\n", "") + "binning_x: 2\nbinning_y: 2\n" + whole)
    found = read_calibration(tmp_path / "bins.yaml")
    assert np.allclose(found.intrinsics, pinhole(262.75, 263.25, 159.5, 119.5))
    assert found.size == (320, 240)


def test_colmaps_binary_file_is_refused_with_the_way_to_text(tmp_path):
    (tmp_path / "cameras.bin").write_bytes(b"\x01\x00\xff\x81")
    with pytest.raises(UserError, match="model_converter"):
        read_calibration(tmp_path / "cameras.bin")


def test_kittis_calibration_is_refused_for_cropped_pictures_with_what_a_crop_does_to_it():
    ((fatal, text),) = odd(pinhole(721.5, 721.5, 609.6, 172.9), (1216, 352), (1242, 375))
    assert fatal
    assert "take what was cut off at the left and at the top from cx and cy" in text
    assert odd(pinhole(721.5, 721.5, 596.6, 149.9), (1216, 352)) == []


def test_a_focal_length_in_millimeters_is_told_by_its_field_of_view():
    ((fatal, message),) = odd(pinhole(4.2, 4.2, 620, 188), (1242, 375))
    assert fatal
    assert "not in millimeters" in message
