"""The nodes that make hints, scenes and reports, called as the host calls them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from graphs import picture

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators.canny import canny
from zeroconv.annotators.images import AnnotatorError

DOSE = ["strength", "start", "end", "unit", "guidance", "resize"]
EXTRAS = ["stack", "mask", "schedule", "block_weights"]
# required inputs come first, as the host lists them
MEASURED = """
    canny_low canny_high canny_backend hough_lines_low hough_lines_high hough_lines_smoothing
    hough_lines_votes hough_lines_length hough_lines_gap hough_lines_seed lsd_length
    hed_safe mlsd_score_threshold mlsd_dist_threshold scribble_xdog_threshold
    lineart_standard_sigma lineart_standard_threshold cartoon_lines_width
    cartoon_lines_smoothing cartoon_lines_threshold threshold_level scribble_hed_safe
    scribble_hed_threshold normal_midas_background normal_midas_strength normal_midas_front
    superpixels_count superpixels_compactness superpixels_colours superpixels_seed
    human_pose_detection_threshold human_pose_keypoint_threshold human_pose_style
    human_pose_xinsir_sticks tile_halvings blur_sigma luminance_gamma intensity_gamma
    hough_lines_agreement scribble_xdog_balance cartoon_lines_balance superpixels_merge
    blur_kind threshold_around
    teed_safe
    dwpose_detection_threshold dwpose_keypoint_threshold dwpose_body dwpose_hands dwpose_face
    dwpose_xinsir_sticks anyline_smallest normal_marigold_seed
"""
"""Parameters of the annotators that results are measured with."""
CONTRACT = {
    "LoadControlNet": (["control_net_name", "weight_dtype", "control_type", "model"], ["control_net"]),
    "EditPose": (["pose", "image", "pose_keypoints"], ["hint", "pose_keypoints"]),
    "ApplyControl": (["model", *DOSE, "control_net", "image", *EXTRAS, "vae", "reuse"], ["model"]),
    "ApplyControlToPrompt": (
        ["positive", "negative", *DOSE, "control_net", "image", *EXTRAS, "vae", "reuse"],
        ["positive", "negative"],
    ),
    "StackControls": (["control_net", "image", *DOSE, *EXTRAS, "reuse"], ["stack"]),
    "ControlSchedule": (["curve", "keyframes", "unit", "per_image"], ["schedule"]),
    "ControlBlockWeights": (["preset", "falloff", "skips", "middle"], ["block_weights"]),
    "RecordControl": (["model"], ["model", "record"]),
    "ControlReport": (["record", "latent"], ["report", "heat_map"]),
    "MeasureControl": (
        [
            *("image", "hint", "annotator", "tolerance", "result_hint", "pose_keypoints", "result_keypoints"),
            # in this order, and at the end, where they grow: as for Annotate
            *MEASURED.split(),
        ],
        ["score", "report", "overlay"],
    ),
    "CompareImages": (["before", "after"], []),
    "NewControlNet": (["model", "hint_channels", "hint_encoder"], ["control_net"]),
    "SaveControlNet": (
        ["control_net", "filename", "layout", "dtype", "content", "base", "target"],
        ["control_net_name"],
    ),
    "Annotate": (
        [
            *("image", "annotator", "resolution"),
            # in this order: saved workflows keep values by place
            *("canny_low", "canny_high", "canny_backend"),
            *(
                "hough_lines_low",
                "hough_lines_high",
                "hough_lines_smoothing",
                "hough_lines_votes",
                "hough_lines_length",
                "hough_lines_gap",
                "hough_lines_seed",
            ),
            "lsd_length",
            "hed_safe",
            *("mlsd_score_threshold", "mlsd_dist_threshold"),
            "scribble_xdog_threshold",
            *("lineart_standard_sigma", "lineart_standard_threshold"),
            *("cartoon_lines_width", "cartoon_lines_smoothing", "cartoon_lines_threshold"),
            "threshold_level",
            *("scribble_hed_safe", "scribble_hed_threshold"),
            *(
                "normal_from_depth_background",
                "normal_from_depth_strength",
                "normal_from_depth_smoothing",
                "normal_from_depth_front",
            ),
            *("normal_midas_background", "normal_midas_strength", "normal_midas_front"),
            *("superpixels_count", "superpixels_compactness", "superpixels_colours", "superpixels_seed"),
            *("pose_style", "pose_body", "pose_hands", "pose_face", "pose_xinsir_sticks"),
            *(
                "human_pose_detection_threshold",
                "human_pose_keypoint_threshold",
                "human_pose_style",
                "human_pose_xinsir_sticks",
            ),
            "inpaint_masked_value",
            "tile_halvings",
            "blur_sigma",
            "luminance_gamma",
            "intensity_gamma",
            "shuffle_seed",
            # what came later
            "pose_threshold",
            *("depth_large_range", "depth_small_range", "depth_anything_range", "depth_zoe_range"),
            *("hough_lines_agreement", "scribble_xdog_balance", "cartoon_lines_balance", "superpixels_merge"),
            *("blur_kind", "threshold_around"),
            "teed_safe",
            *("dwpose_detection_threshold", "dwpose_keypoint_threshold"),
            *("dwpose_body", "dwpose_hands", "dwpose_face", "dwpose_xinsir_sticks"),
            *("segments_sam2_points", "segments_sam2_confidence", "segments_sam2_colours", "segments_sam2_seed"),
            "inpaint_lama_detail",
            *("depth_moge_range", "depth_moge_farthest", "anyline_smallest", "normal_marigold_seed"),
            "depth_anything_3_range",
            *("mask", "pose_keypoints", "latent"),
        ],
        ["hint", "pose_keypoints"],
    ),
    "InspectControl": (["control_net", "model"], ["report"]),
    "LoadLabModel": ([], ["model", "clip", "vae"]),
    "LabScene": (
        ["seed", "size", "figure", "solids"],
        ["image", "depth", "pose", "canny", "pose_keypoints", "prompt"],
    ),
    "LabScenes": (["count", "seed", "hint", "name"], ["folder"]),
    "MakeControlDataset": (
        [
            *("name", "vae", "clip", "folder", "captions", "annotator", "annotator_resolution", "resolution", "mirror"),
            *("images", "hints", "model", "crops", "caption_variants", "tag_dropout", "keep_tags"),
        ],
        ["dataset", "report"],
    ),
    "TrainControlNet": (
        [
            *("model", "clip", "vae", "dataset", "name", "steps", "batch_size", "accumulation", "learning_rate"),
            *("warmup", "schedule", "kind", "precision", "gradient_checkpointing", "sample_every", "held_out"),
            *("save_every", "seed", "fidelity", "options", "control_net", "validation"),
        ],
        ["control_net", "plot", "samples", "control_net_name"],
    ),
    "TrainingOptions": (
        [
            *("rank", "connections", "hint_encoder", "middle_only", "unlock_decoder", "decoder_learning_rate"),
            *("empty_prompts", "timesteps", "min_snr", "clip", "optimizer", "weight_decay", "ema", "keep"),
            *("sample_steps", "guidance_scale", "huber", "offset_noise", "min_timestep", "max_timestep"),
            *("zero_terminal_snr", "fit_memory", "recompute", "optimizer_in_ram", "base_weights", "control_weights"),
            *("keep_controls", "control_dtype", "graphs"),
        ],
        ["options"],
    ),
}


TYPES = {
    "ControlSchedule": "CONTROL_SCHEDULE",
    "ControlBlockWeights": "CONTROL_BLOCK_WEIGHTS",
    "StackControls": "CONTROL_NET_STACK",
    "NewControlNet": "CONTROL_NET",
}


def test_every_node_of_the_pack_is_in_the_contract(host: Host):
    assert set(host.ours) == set(CONTRACT)


@pytest.mark.parametrize("node", ["ApplyControl", "ApplyControlToPrompt", "StackControls"])
def test_nodes_that_dose_take_what_the_dosing_nodes_give(host: Host, node: str):
    declared = host.ours[node].INPUT_TYPES()
    taken = {name: kind for part in declared.values() for name, (kind, *_) in part.items()}
    for maker, kind in TYPES.items():
        (output,) = host.ours[maker].GET_SCHEMA().outputs
        assert output.get_io_type() == kind
    assert taken["schedule"] == "CONTROL_SCHEDULE"
    assert taken["block_weights"] == "CONTROL_BLOCK_WEIGHTS"
    assert taken["stack"] == "CONTROL_NET_STACK"
    assert taken["control_net"] == "CONTROL_NET"


@pytest.mark.parametrize(
    ("node", "defaults"),
    [
        ("ApplyControl", {"unit": "percent", "guidance": "both", "resize": "crop", "start": 0.0, "end": 1.0}),
        ("ControlSchedule", {"curve": "fade out", "keyframes": "", "unit": "window", "per_image": ""}),
        ("ControlBlockWeights", {"preset": "soft", "falloff": 0.825, "skips": "", "middle": 1.0}),
        ("SaveControlNet", {"layout": "ldm", "dtype": "as loaded", "content": "control"}),
    ],
)
def test_defaults_are_those_that_workflows_rely_on(host: Host, node: str, defaults: dict[str, object]):
    required = host.ours[node].INPUT_TYPES()["required"]
    assert {name: required[name][1]["default"] for name in defaults} == defaults


@pytest.mark.parametrize("node", CONTRACT)
def test_the_page_is_told_the_words_and_what_to_fold(host: Host, node: str):
    from zeroconv.nodes import found

    info = host.ours[node].GET_NODE_INFO_V1()
    schema = host.ours[node].GET_SCHEMA()
    assert info["search_aliases"] == list(found.WORDS[node])
    assert len({word.lower() for word in found.WORDS[node]}) == len(found.WORDS[node])
    assert info["category"].startswith("ZeroConv/") and info["display_name"].endswith(" (ZeroConv)")
    assert "residual" not in str(info)
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    folded = {name for name, (_, options) in inputs.items() if options.get("advanced")}
    known = set(found.FOLDED.get(node, ()))
    assert known <= set(inputs) and not known & {"strength", "start", "end"}
    assert folded == (known if hasattr(schema.inputs[0] if schema.inputs else None, "advanced") else set())


def test_no_word_is_told_of_a_node_that_is_none(host: Host):
    from zeroconv.nodes import found

    assert set(found.WORDS) == set(host.ours) >= set(found.FOLDED)


@pytest.mark.parametrize("node", CONTRACT)
def test_sockets_are_those_that_workflows_rely_on(host: Host, node: str):
    kind = host.ours[node]
    declared = kind.INPUT_TYPES()
    names = [*declared.get("required", {}), *declared.get("optional", {})]
    assert (names, [output.display_name for output in kind.GET_SCHEMA().outputs]) == CONTRACT[node]


def test_annotate_is_the_annotator_on_every_picture_of_a_batch(host: Host):
    images = picture(3, batch=2)
    before = images.clone()
    hint, keypoints = host.call("Annotate", image=images, annotator="canny", resolution=0, canny_low=20, canny_high=60)
    assert torch.equal(images, before)
    assert hint.shape == (2, 128, 128, 3)
    assert 0 < hint.mean() < 1
    for i in range(2):
        assert torch.equal(hint[i], torch.from_numpy(canny(images[i].numpy(), 20, 60)))
    assert keypoints == []


def test_the_hint_is_as_large_as_the_latent(host: Host):
    """The one side that fits exactly; what the other has too much is what `resize` crop takes away."""
    values = {"image": picture(3, height=128, width=192), "annotator": "canny", "resolution": -1}
    hint, _ = host.call("Annotate", **values, latent={"samples": torch.zeros(1, 4, 40, 32)})
    assert hint.shape == (1, 320, 480, 3)
    with pytest.raises(AnnotatorError, match="resolution is -1.*connect the one that is sampled"):
        host.call("Annotate", **values)


def test_resolution_is_the_hints_short_side(host: Host):
    hint, _ = host.call("Annotate", image=picture(3, height=128, width=192), annotator="canny", resolution=256)
    assert hint.shape == (1, 256, 384, 3)


def test_mask_blackens_the_hint_outside(host: Host):
    mask = torch.cat([torch.ones(1, 128, 64), torch.zeros(1, 128, 64)], dim=2)
    values = {"image": picture(3), "annotator": "canny", "resolution": 0, "canny_low": 20, "canny_high": 60}
    whole, _ = host.call("Annotate", **values)
    hint, _ = host.call("Annotate", **values, mask=mask)
    assert torch.equal(hint[:, :, :60], whole[:, :, :60])
    assert whole[:, :, 68:].any()
    assert not hint[:, :, 68:].any()


def test_a_lab_scene_comes_with_its_hints_and_its_prompt(host: Host):
    image, depth, pose, canny_edges, keypoints, prompt = host.call("LabScene", seed=5, size=96, solids=1)
    for tensor in (image, depth, pose, canny_edges):
        assert tensor.shape == (1, 96, 96, 3)
        assert tensor.min() >= 0
        assert 0.5 < tensor.max() <= 1
    (frame,) = keypoints
    assert (frame["canvas_width"], frame["canvas_height"]) == (96, 96)
    joints = torch.tensor(frame["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
    assert joints[:, 2].eq(1).all()
    assert joints[:, :2].min() >= 0
    assert joints[:, :2].max() <= 96
    assert "person" in prompt


def test_a_lab_scene_without_figure_has_nobody(host: Host):
    *_, keypoints, prompt = host.call("LabScene", seed=5, figure=False)
    assert keypoints[0]["people"] == []
    assert "person" not in prompt


def test_inspect_says_what_a_control_is_and_what_it_fits(host: Host):
    control = host.load("sd15_depth")
    (text,) = host.call("InspectControl", control_net=control, model=host.model("sd15"))
    assert "family: SD1.x" in text
    assert "residuals: 12+1" in text
    assert "fits: yes" in text
    (text,) = host.call("InspectControl", control_net=control, model=host.model("sdxl"))
    assert "fits: no" in text
    assert "SDXL" in text


def test_inspect_knows_a_control_of_another_loader(host: Host):
    (text,) = host.call("InspectControl", control_net=host.load("sd15_depth", native=True))
    assert "ControlNet of another loader" in text


def difference_file(host: Host, name: str) -> dict[str, torch.Tensor]:
    """Write what the depth control adds to the tiny model's encoder; gives the control's own tensors."""
    state = host.state("sd15_depth")
    base = host.model("sd15").model.diffusion_model.state_dict()
    differences = {
        f"control_model.{key}": tensor - base[key] if key in base else tensor for key, tensor in state.items()
    }
    host.write(name, {**differences, "difference": torch.zeros(1)})
    return state


def test_a_difference_file_takes_its_base_from_the_model(host: Host):
    state = difference_file(host, "sd15_difference")
    (control,) = host.call("LoadControlNet", control_net_name="sd15_difference.safetensors", model=host.model("sd15"))
    for key, tensor in control.loaded.control.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=1e-6)


def test_a_difference_file_without_a_model_says_what_to_connect(host: Host):
    difference_file(host, "sd15_difference")
    with pytest.raises(Exception, match="connect the model"):
        host.call("LoadControlNet", control_net_name="sd15_difference.safetensors")


def test_fp8_weights_are_kept_in_fp8_and_give_nearly_the_same(host: Host):
    control = host.load("sd15_depth", weight_dtype="fp8_e4m3fn")
    assert {p.dtype for p in control.loaded.control.parameters()} == {torch.float8_e4m3fn}
    latents = []
    for net in (control, host.load("sd15_depth")):
        (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=net, image=picture(1))
        latents.append(host.sample(replace(host.scene(), model=model)).latent)
    assert latents[0].isfinite().all()
    off = (latents[0] - latents[1]).norm() / latents[1].norm()
    assert 0 < off < 0.5
