"""Renders: exact maps against geometry worked out by hand, stable pictures, and scenes that overlap little."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from zeroconv.lab.figure import capsules, joints
from zeroconv.lab.hints import canny_hint, depth_hint, pose_hint
from zeroconv.lab.render import Render, RenderError, render
from zeroconv.lab.scene import Scene, Solid, random_scene
from zeroconv.lab.trace import WALL_Z, Camera

SIDE = 128
CAMERA = Camera(height=1.0, pitch=0.0, focal=1.0)


@cache
def picture(seed: int) -> Render:
    return render(random_scene(seed))


def alone(solid: Solid | None, camera: Camera = CAMERA) -> Render:
    scene = Scene(0, "sand", "checks", 0.6, 20.0, (0.0, 0.8, -0.6), None, () if solid is None else (solid,), camera)
    return render(scene)


def test_shapes_types_and_ranges():
    for size in (64, 128):
        result = render(random_scene(3), size)
        assert result.image.shape == result.normals.shape == (size, size, 3)
        assert result.depth.shape == result.segments.shape == (size, size)
        assert result.keypoints.shape == (18, 3)
        assert result.segments.dtype == np.uint8
        for part in (result.image, result.depth, result.normals, result.keypoints):
            assert part.dtype == np.float32
        assert 0 <= result.image.min() and result.image.max() <= 1
        np.testing.assert_allclose(np.linalg.norm(result.normals, axis=2), 1, atol=1e-3)
        # Every visible surface faces its ray.
        centre = (np.arange(size) + 0.5) / size - 0.5
        across, down = np.meshgrid(centre / 1.6, centre / 1.6)
        rays = np.stack([across, -down, -np.ones_like(down)], axis=2)
        assert (-(result.normals * rays).sum(2) > -0.02).all()


@pytest.mark.parametrize("size", [0, -8, 100])
def test_sizes_off_the_latent_grid_are_refused(size: int):
    with pytest.raises(RenderError, match=f"size is {size}; it must be a positive multiple of 8"):
        render(random_scene(0), size)


def test_same_scene_same_picture():
    first, second = render(random_scene(5)), render(random_scene(5))
    for name in ("image", "depth", "normals", "segments", "keypoints"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert np.abs(first.image - picture(6).image).mean() > 0.02


def test_empty_ground_has_the_depth_of_a_plane_and_a_wall():
    result = alone(None)
    rows = (np.arange(SIDE) + 0.5) / SIDE
    # Camera 1 m up, looking level, focal length 1: the ground in row y lies at depth 1 / (y - 0.5).
    expected = np.minimum(1 / np.maximum(rows - 0.5, 1e-6), WALL_Z)
    np.testing.assert_allclose(result.depth[:, 40], expected, rtol=1e-5)
    np.testing.assert_allclose(result.normals[-1, 0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(result.normals[0, 0], [0, 0, 1], atol=1e-6)
    assert (result.segments == 0).all() and (result.keypoints == 0).all()


def test_sphere_is_where_geometry_says():
    result = alone(Solid("sphere", "red", 0.0, 4.0, 1.0, 2.0, 0.0))
    # Its centre is on the axis at depth 4; the silhouette's half-width is 1/sqrt(4^2-1) of the picture's height.
    assert set(np.unique(result.segments)) == {0, 2}
    assert result.depth[64, 64] == pytest.approx(3.0, abs=1e-3)
    np.testing.assert_allclose(result.normals[64, 64], [0, 0, 1], atol=0.02)
    width = (result.segments[64] == 2).sum()
    assert width == pytest.approx(2 * SIDE / np.sqrt(15), abs=1.0)


def test_cube_face_is_flat_and_square():
    result = alone(Solid("cube", "blue", 0.0, 4.0, 0.5, 1.0, 0.0), Camera(height=0.5, pitch=0.0, focal=1.0))
    inside = result.segments == 3
    np.testing.assert_allclose(result.depth[inside], 3.5, rtol=1e-5)
    np.testing.assert_allclose(result.normals[inside], np.tile([0, 0, 1], (inside.sum(), 1)), atol=1e-6)
    # 1 m at 3.5 m depth is 128/3.5 = 36.57 pixels.
    assert np.ptp(np.nonzero(inside)[0]) + 1 == np.ptp(np.nonzero(inside)[1]) + 1 == 36


def test_cylinder_shows_its_top_and_cone_its_slope():
    top = alone(Solid("cylinder", "green", 0.0, 3.0, 0.4, 0.5, 0.0))
    flat = (top.segments == 5) & (top.normals[:, :, 1] > 0.999)
    # Depth on the top, 0.5 m below the eye: 0.5 / (y - 0.5).
    rows = (np.nonzero(flat)[0] + 0.5) / SIDE
    np.testing.assert_allclose(top.depth[flat], 0.5 / (rows - 0.5), rtol=1e-4)
    cone = alone(Solid("cone", "green", 0.0, 3.0, 0.4, 0.8, 0.0))
    inside = cone.segments == 4
    # A cone half as wide as high rises everywhere by sin(atan(0.5)) in its normal.
    np.testing.assert_allclose(cone.normals[inside][:, 1], np.sin(np.arctan(0.5)), atol=2e-3)


def test_the_nearer_thing_hides_the_farther():
    near, far = Solid("cube", "red", 0.0, 3.0, 0.3, 0.6, 0.0), Solid("sphere", "blue", 0.2, 4.2, 0.4, 0.8, 0.0)
    base = random_scene(0, solids=0, figure=False)
    both = render(Scene(0, "sand", "checks", 0.6, 0.0, base.light, None, (far, near)))
    single = [render(Scene(0, "sand", "checks", 0.6, 0.0, base.light, None, (one,))) for one in (far, near)]
    np.testing.assert_array_equal(both.depth, np.minimum(single[0].depth, single[1].depth))
    assert (both.segments[single[1].segments == 3] == 3).all()
    assert ((single[0].segments == 2) & (both.segments == 3)).any()


def test_borders_are_smooth():
    result = alone(Solid("sphere", "red", 0.0, 4.0, 1.0, 2.0, 0.0))
    redness = result.image[40, :, 0] - result.image[40, :, 2]
    inside = np.flatnonzero(result.segments[40] == 2)
    # On its border a pixel mixes the red of the sphere with the wall behind it.
    edge = redness[[inside[0] - 1, inside[0], inside[-1], inside[-1] + 1]]
    within, behind = redness[inside[3]], redness[inside[0] - 4]
    assert ((edge > behind + 0.03) & (edge < within - 0.03)).any()


@pytest.mark.parametrize("seed", range(6))
def test_keypoints_lie_on_the_figure(seed: int):
    scene, result = random_scene(seed), picture(seed)
    assert scene.figure is not None
    found = joints(scene.figure)
    x, y, seen = result.keypoints.T
    assert (seen == 1).all() and (x > 0).all() and (x < SIDE).all() and (y > 0).all() and (y < SIDE).all()
    for name, index in (("neck", 1), ("right_wrist", 4), ("left_knee", 12)):
        pixel = scene.camera.project(found[name][None])[0]
        np.testing.assert_allclose(result.keypoints[index, :2], pixel[:2] * SIDE, atol=1e-3)
    # A joint is hidden only by something nearer; the body itself is at most 0.25 m in front of its own joints.
    depth = scene.camera.project(np.stack([found[name] for name in ("neck", "right_hip", "left_hip")]))[:, 2]
    for index, own in zip((1, 8, 11), depth, strict=True):
        column, row = int(x[index]), int(y[index])
        assert result.segments[row, column] == 1 or result.depth[row, column] < own
    assert len(capsules(found)[0]) == 12 and len(capsules(found)[1]) == 3


def test_everything_stays_visible_in_many_scenes():
    for seed in range(12):
        scene, result = random_scene(seed), picture(seed)
        sides = (result.segments[0], result.segments[-1], result.segments[:, 0], result.segments[:, -1])
        assert all((side == 0).all() for side in sides)
        lonely = [(render(replace(scene, solids=())), 0.78)]
        lonely += [(render(replace(scene, figure=None, solids=(solid,))), 0.5) for solid in scene.solids]
        for single, needed in lonely:
            own = single.segments > 0
            visible = own & (result.segments == single.segments) & (np.abs(result.depth - single.depth) < 1e-4)
            assert visible.sum() >= needed * own.sum()
        rows = np.nonzero((result.segments == 1).any(1))[0]
        assert 0.45 * SIDE < np.ptp(rows) + 1 < 0.95 * SIDE


def test_two_scenes_overlap_little():
    """Without control, or with another scene's hint, a result must not score well by chance."""
    results = [picture(seed) for seed in range(40)]
    pairs = list(zip(results, results[1:] + results[:1], strict=True))
    for chosen in (lambda segments: segments == 1, lambda segments: segments > 1):
        masks = [(chosen(a.segments), chosen(b.segments)) for a, b in pairs]
        assert np.mean([(a & b).sum() / (a | b).sum() for a, b in masks]) < 0.32


def test_depth_hint_is_near_white_far_black():
    hint = depth_hint(picture(0))
    assert hint.shape == (SIDE, SIDE, 3) and hint.dtype == np.float32
    assert hint.min() == 0 and hint.max() == 1
    depth = picture(0).depth
    assert hint[np.unravel_index(depth.argmin(), depth.shape)][0] == 1
    assert hint[np.unravel_index(depth.argmax(), depth.shape)][0] == 0
    # Linear in inverse depth.
    low, high = 1 / depth.max(), 1 / depth.min()
    np.testing.assert_allclose(hint[60, 60], (1 / depth[60, 60] - low) / (high - low), atol=1e-5)


def test_canny_hint_follows_the_figure():
    hint, segments = canny_hint(picture(0)), picture(0).segments
    assert hint.shape == (SIDE, SIDE, 3) and set(np.unique(hint)) == {0.0, 1.0}
    border = np.zeros_like(segments, bool)
    border[:, 1:] |= (segments == 1)[:, 1:] != (segments == 1)[:, :-1]
    near = np.zeros_like(border)
    for shift in (-1, 0, 1):
        near |= np.roll(hint[:, :, 0] > 0, shift, axis=1)
    assert (near & border).sum() > 0.8 * border.sum()


def test_pose_hint_lies_on_the_figure_and_is_black_without_one():
    hint = pose_hint(picture(0))
    assert hint.shape == (SIDE, SIDE, 3) and hint.dtype == np.float32
    drawn = hint.max(2) > 0.2
    assert drawn.sum() > 300
    assert (drawn & (picture(0).segments == 1)).sum() > 0.75 * drawn.sum()
    assert pose_hint(render(random_scene(0, figure=False))).max() == 0
