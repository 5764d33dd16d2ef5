"""The list of annotators and their parameters: the order is a file format, and the records are the functions' own."""

from __future__ import annotations

import inspect

import pytest

from zeroconv import annotators
from zeroconv.annotators import ANNOTATORS, ORDER, PARAMETERS, Annotator, Parameter

NAMES = """
    canny hough_lines lsd hed mlsd scribble scribble_xdog lineart_standard cartoon_lines threshold scribble_hed
    lineart_realistic lineart_coarse lineart_anime normal_from_depth depth_large depth_small depth_anything depth_zoe
    normal_midas normal_moge superpixels segments_ade20k segments_coco pose human_pose inpaint tile blur luminance
    intensity color shuffle invert teed dwpose segments_sam2 mask_sam2 inpaint_lama
    depth_moge anyline lineart_manga normal_marigold depth_anything_3 normal_moge_large
"""
WIDGETS = """
    canny_low canny_high canny_backend
    hough_lines_low hough_lines_high hough_lines_smoothing hough_lines_votes hough_lines_length hough_lines_gap
    hough_lines_seed lsd_length hed_safe mlsd_score_threshold mlsd_dist_threshold scribble_xdog_threshold
    lineart_standard_sigma lineart_standard_threshold cartoon_lines_width cartoon_lines_smoothing
    cartoon_lines_threshold threshold_level scribble_hed_safe scribble_hed_threshold
    normal_from_depth_background normal_from_depth_strength normal_from_depth_smoothing normal_from_depth_front
    normal_midas_background normal_midas_strength normal_midas_front
    superpixels_count superpixels_compactness superpixels_colours superpixels_seed
    pose_style pose_body pose_hands pose_face pose_xinsir_sticks
    human_pose_detection_threshold human_pose_keypoint_threshold human_pose_style human_pose_xinsir_sticks
    inpaint_masked_value tile_halvings blur_sigma luminance_gamma intensity_gamma shuffle_seed
    pose_threshold depth_large_range depth_small_range depth_anything_range depth_zoe_range
    hough_lines_agreement scribble_xdog_balance cartoon_lines_balance superpixels_merge
    blur_kind threshold_around
    teed_safe
    dwpose_detection_threshold dwpose_keypoint_threshold dwpose_body dwpose_hands dwpose_face dwpose_xinsir_sticks
    segments_sam2_points segments_sam2_confidence segments_sam2_colours segments_sam2_seed inpaint_lama_detail
    depth_moge_range depth_moge_farthest anyline_smallest normal_marigold_seed
    depth_anything_3_range
"""
"""As saved workflows count them: this list may grow at its end and changes in no other way."""
EACH = pytest.mark.parametrize("record", ANNOTATORS, ids=[record.name for record in ANNOTATORS])


def signature(record: Annotator) -> dict[str, inspect.Parameter]:
    """The parameters of both its functions."""
    functions = [record.function, *([record.draw] if record.draw else [])]
    return {name: p for function in functions for name, p in inspect.signature(function).parameters.items()}


def test_names_and_widgets_stand_where_saved_workflows_count_on_them():
    assert [record.name for record in ANNOTATORS] == NAMES.split()
    assert [f"{record.name}_{parameter.name}" for record, parameter in PARAMETERS] == WIDGETS.split()


def test_every_annotator_is_in_one_group():
    grouped = [name for names in annotators.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(NAMES.split())
    assert grouped[0] == NAMES.split()[0]  # what a new node begins with


def test_every_record_and_every_parameter_of_it_is_listed_once():
    listed = [(line[0], name) for line in ORDER for name in line[1:]]
    assert len(listed) == len(set(listed))
    for file in {line[0].partition(":")[0] for line in ORDER}:
        for record in getattr(annotators, file).RECORDS:
            assert sorted(name for line, name in listed if line == f"{file}:{record.name}") == sorted(
                parameter.name for parameter in record.parameters
            )


@EACH
def test_defaults_are_the_functions_own_and_of_the_widgets_kind(record: Annotator):
    own = signature(record)
    for parameter in record.parameters:
        assert parameter.default is own[parameter.name].default
        assert own[parameter.name].annotation == type(parameter.default).__name__
        if isinstance(parameter.default, str):
            assert parameter.default in parameter.choices
        assert parameter.tooltip.endswith(".")


@EACH
def test_whatever_of_a_function_has_a_default_can_be_set(record: Annotator):
    own = signature(record).values()
    assert {p.name for p in own if p.default is not p.empty} == {parameter.name for parameter in record.parameters}


def test_a_parameter_that_the_function_lacks_is_refused():
    def function(image: object, gain: float = 2.0) -> object:
        return image

    assert Annotator("a", function, (Parameter("gain", "How bright."),)).parameters[0].default == 2.0
    with pytest.raises(KeyError, match="again"):
        Annotator("a", function, (Parameter("again", "How bright."),))
