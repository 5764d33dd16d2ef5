"""Pictures, masks, texts and numbers as they should not be: one sentence each, before the model is called."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import TOLERANCE, Control, Scene, latent, off_by, picture
from torch import Tensor

from zeroconv.controlnet_core.errors import ZeroConvError

if TYPE_CHECKING:
    from hosting import Host

NAN, INF = float("nan"), float("inf")
WAYS = ("ApplyControl", "ApplyControlToPrompt")


def sampled(host: Host, way: str, image: Tensor, size: tuple[int, int] = (16, 16), **inputs: Any) -> Any:
    scene, given = host.scene(), {"control_net": host.load("sd15_depth"), "image": image, **inputs}
    if way == "ApplyControl":
        scene = replace(scene, model=host.call(way, model=scene.model, **given)[0])
    else:
        positive, negative = host.call(way, positive=scene.positive, negative=scene.negative, **given)
        scene = replace(scene, positive=positive, negative=negative)
    return host.sample(scene, latent_image=latent(1, *size))


def refusal(host: Host, way: str, image: Tensor, size: tuple[int, int] = (16, 16), **inputs: Any) -> str:
    host.forget()
    with pytest.raises(ZeroConvError) as caught:
        sampled(host, way, image, size, **inputs)
    assert host.unet_calls == 0
    text = str(caught.value)
    assert text.isprintable() and len(text) <= 1000
    return text


def with_number(number: float) -> Tensor:
    image = picture(1)
    image[0, 5, 7, 1] = number
    return image


IMAGES: dict[str, tuple[Tensor, str]] = {
    "NaN": (with_number(NAN), "has numbers that are not finite, expected 0 to 1"),
    "infinite": (with_number(-INF), "has numbers that are not finite, expected 0 to 1"),
    "1e30": (with_number(1e30), "has numbers up to 1e+30, expected 0 to 1"),
    "bytes": (picture(1) * 255, "has numbers up to 2"),
    "no height": (
        torch.zeros(1, 0, 64, 3),
        "is 1x3x0x64 (pictures x channels x height x width), expected at least one",
    ),
    "no width": (torch.zeros(1, 64, 0, 3), "is 1x3x64x0"),
    "no pictures": (torch.zeros(0, 64, 64, 3), "is 0x3x64x64"),
    "two channels": (torch.rand(1, 64, 64, 2), "takes a hint of 3 channels, found an image of 2"),
    "a long line": (
        torch.rand(1, 1, 20000, 3),
        "is 1x3x1x20000 (pictures x channels x height x width), expected at least",
    ),
    "no middle": (torch.rand(1, 1, 9000, 3).repeat(1, 1, 1, 1), ""),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", IMAGES)
def test_a_picture_that_is_no_hint_is_refused(host: Host, kind: str, way: str):
    image, says = IMAGES[kind]
    assert says in refusal(host, way, image)


@pytest.mark.parametrize("way", WAYS)
def test_a_crop_that_leaves_nothing_is_refused(host: Host, way: str):
    said = refusal(host, way, picture(1), size=(1, 300))
    assert said == (
        "a picture of 128x128 has no pixel left when its middle is cut to the shape of 2400x8: choose resize stretch "
        "or pad, or a picture of another shape"
    )


MASKS: dict[str, tuple[Tensor, str]] = {
    "NaN": (torch.full((1, 16, 16), NAN), "the mask has numbers that are not finite"),
    "1e30": (torch.full((1, 16, 16), 1e30), "the mask has numbers up to 1e+30, expected 0 to 1"),
    "no height": (torch.ones(1, 0, 16), "the mask is 1x0x16, expected a mask with pixels"),
    "no masks": (torch.ones(0, 16, 16), "the mask is 0x16x16, expected a mask with pixels"),
    "three for one": (torch.ones(3, 16, 16) * 0.5, "the mask has 3 pictures, and 1 is sampled: connect one for all or"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_is_none_is_refused(host: Host, kind: str, way: str):
    given, says = MASKS[kind]
    assert says in refusal(host, way, picture(1), mask=given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strength", [NAN, INF, 1e30])
def test_a_strength_that_is_no_number_is_refused(host: Host, strength: float, way: str):
    assert "a strength is a number up to 100, found" in refusal(host, way, picture(1), strength=strength)


@pytest.mark.parametrize("unit", ["percent", "step"])
@pytest.mark.parametrize("inputs", [{"start": NAN}, {"end": NAN}, {"end": INF}])
def test_a_window_that_is_no_number_is_refused(host: Host, inputs: dict[str, Any], unit: str):
    assert f"a window in {unit}" in refusal(host, "ApplyControl", picture(1), unit=unit, **inputs)


def test_grey_and_transparent_hints_are_converted(host: Host, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    grey = picture(1)[..., :1]
    assert (
        off_by(sampled(host, "ApplyControl", grey), sampled(host, "ApplyControl", grey.repeat(1, 1, 1, 3))) <= TOLERANCE
    )
    assert "the hint is grey, and its one channel is taken for red, green and blue" in caplog.text
    alpha = (picture(2)[..., :1] > 0.5).float()
    seen = sampled(host, "ApplyControl", torch.cat([picture(1), alpha], dim=-1))
    assert off_by(seen, sampled(host, "ApplyControl", picture(1) * alpha)) <= TOLERANCE
    assert "the hint has transparency, which lies on black" in caplog.text


def test_a_hint_slightly_outside_stays_as_it_is(host: Host):
    """The host's own controls take it so, and -1 marks what is painted anew."""
    image = picture(1) * 2.2 - 1.1
    native = host.sample(host.native(host.scene(), "sd15", Given(image)))
    assert off_by(sampled(host, "ApplyControl", image), native) <= TOLERANCE


class Given(Control):
    """A control of a picture that is given."""

    def __init__(self, image: Tensor):
        super().__init__()
        object.__setattr__(self, "given", image)

    @property
    def image(self) -> Tensor:
        return self.given  # type: ignore[attr-defined]


# -- residuals --------------------------------------------------------------------------------------------------------


class Late:
    """Makes what a network's module gives infinite from its call `first` on."""

    def __init__(self, module: torch.nn.Module, first: int):
        self.calls, self.first = 0, first
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * INF if self.calls >= self.first else output


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("place", "first"), [("zero_convs.5", 1), ("middle_block_out", 1), ("middle_block", 3)])
def test_residuals_that_are_not_finite_are_told_with_the_controls_name(
    host: Host, place: str, first: int, way: str, foreign: bool
):
    good = host.apply(way, host.scene(), "sd15", Control())
    scene = host.apply(way, good, "sd15", Control(file="pose", hint=2), foreign=foreign)
    network = host.load("sd15_pose", native=foreign).get_models()[-1].model
    late = Late(network.get_submodule(place), first)
    name = "the ControlNet of another loader" if foreign else "sd15_pose.safetensors"
    try:
        with pytest.raises(ZeroConvError, match=f"{name}: its residuals are not finite .* from call {first} of the"):
            host.sample(scene)
        assert host.unet_calls <= (1 if first == 1 else 4)
    finally:
        late.handle.remove()
    assert host.sample(scene).latent.isfinite().all()


@pytest.mark.parametrize("steps", [1, 4])
def test_so_they_are_under_the_hosts_own_apply_node(host: Host, steps: int):
    scene = host.native(host.scene(), "sd15", Control(), own=True)
    late = Late(host.load("sd15_depth").get_models()[-1].model.get_submodule("zero_convs.5"), 1)
    try:
        with pytest.raises(ZeroConvError, match=r"sd15_depth.safetensors: its residuals are not finite"):
            host.sample(scene, steps=steps)
    finally:
        late.handle.remove()
    assert host.sample(scene, steps=steps).latent.isfinite().all()


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_a_control_of_nine_channels_is_refused_where_it_is_applied(host: Host):
    """No control is given more than the latent, whatever its base takes."""
    key = "input_blocks.0.0.weight"
    state = host.state("sd15_depth")
    state[key] = torch.cat([state[key], torch.zeros(len(state[key]), 5, 3, 3)], dim=1)
    host.write("nine", state)
    (control,) = host.call("LoadControlNet", control_net_name="nine.safetensors")
    says = "9 latent channels, the SD1.x model 4: load a control made for this model"
    with pytest.raises(ZeroConvError, match=says):
        host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=picture(1))
    (report,) = host.call("InspectControl", control_net=control, model=host.model("sd15"))
    assert says in report and "fits: no" in report


# -- texts ------------------------------------------------------------------------------------------------------------

TEXTS: list[tuple[str, dict[str, Any], str]] = [
    ("ControlBlockWeights", {"preset": "custom", "skips": "1," * 100_000}, "skips has 200000 characters"),
    ("ControlBlockWeights", {"preset": "custom", "skips": "1," * 10_000}, "found 10000 block weights"),
    ("ControlBlockWeights", {"preset": "soft", "falloff": NAN}, "the falloff lies between 0 and 1, found nan"),
    ("ControlBlockWeights", {"preset": "soft", "middle": NAN}, "a block weight lies between 0 and 10, found nan"),
    ("ControlSchedule", {"curve": "custom", "keyframes": "0: 1\n" * 10**6}, "the keyframes have 5000000 characters"),
    (
        "ControlSchedule",
        {"curve": "custom", "unit": "step", "keyframes": "\n".join(f"{i}: 1" for i in range(5000))},
        "a schedule has at most 1000 keyframes",
    ),
    ("ControlSchedule", {"curve": "custom", "keyframes": "0: 1e308"}, "write one up to 100"),
    ("ControlSchedule", {"curve": "custom", "keyframes": "0: nan"}, "a number from 0, found nan"),
    ("ControlSchedule", {"curve": "custom", "unit": "step", "keyframes": "1e308: 1"}, "expected at most 100000"),
    ("ControlSchedule", {"per_image": "1 " * 20_000}, "strengths of 10000 pictures, found 2 and 20000"),
    ("ControlSchedule", {"per_image": "\ud800"}, 'found "\\ud800"'),
    ("ControlSchedule", {"curve": "custom", "keyframes": "\ud800" * 1000}, "a keyframe is"),
]


@pytest.mark.parametrize(("node", "inputs", "says"), TEXTS)
def test_texts_over_the_limits_get_a_sentence(host: Host, node: str, inputs: dict[str, Any], says: str):
    with pytest.raises(ZeroConvError) as caught:
        host.call(node, **inputs)
    text = str(caught.value)
    assert says in text and text.isprintable() and len(text) <= 1000


@pytest.mark.parametrize(
    ("filename", "says"),
    [
        ("\ud800", r"has a part '\ud800': expected names"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"has a part 'caf\udce9'"),
        ("a" * 5000, "has 1 parts of up to 5000 characters"),
        ("a/" * 3000 + "a", "has 3001 parts of up to 1 characters: expected at most 16 of 200 bytes"),
        ("a\nb", "has a part"),
    ],
)
def test_names_of_files_are_ones_that_a_folder_takes(host: Host, filename: str, says: str):
    with pytest.raises(ZeroConvError) as caught:
        host.call("SaveControlNet", control_net=host.load("sd15_depth"), filename=filename)
    assert says in str(caught.value) and str(caught.value).isprintable()


def test_a_million_people_are_refused(host: Host):
    frame = {"people": [{}] * 10**6, "canvas_width": 64, "canvas_height": 64}
    with pytest.raises(ZeroConvError, match="has 1000000 people, expected at most 1000"):
        host.call("Annotate", image=picture(1), annotator="pose", pose_keypoints=[frame])


@pytest.mark.parametrize("shape", [(1, 0, 64, 3), (1, 64, 0, 3), (1, 1, 20000, 3)])
def test_measured_pictures_have_pixels(host: Host, shape: tuple[int, ...]):
    for inputs in (
        {"image": torch.zeros(shape), "hint": picture(1)},
        {"image": picture(1), "hint": torch.zeros(shape)},
    ):
        with pytest.raises(ZeroConvError, match="expected at least one picture with pixels, and no side over 16384"):
            host.call("MeasureControl", annotator="canny", **inputs)


@pytest.mark.parametrize("shape", [(1, 0, 64, 3), (1, 64, 0, 3), (1, 1, 20000, 3)])
def test_annotated_pictures_have_pixels(host: Host, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"image is an empty batch|the hint would be 10240000x512 pixels") as caught:
        host.call("Annotate", annotator="canny", image=torch.zeros(shape))
    assert str(caught.value).isprintable()


# -- merges -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("merge", ["ModelMergeSimple", "ModelMergeBlocks", "ModelMergeAdd", "ModelMergeSDXL"])
def test_merges_that_drop_control_are_found_in_the_graph(merge: str):
    """The server refuses them: test_hostile_queue.py."""
    from zeroconv.nodes.host.attach import lost_in

    def graph(name: str) -> dict[str, Any]:
        return {
            "1": {"class_type": "ApplyControl", "inputs": {"model": ["9", 0]}},
            "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "strength_model": 1.0}},
            "3": {"class_type": merge, "inputs": {"model1": ["9", 0], name: ["2", 0]}},
            "4": {"class_type": "KSampler", "inputs": {"model": ["3", 0]}},
        }

    assert lost_in(graph("model2"), "1") == f"model2 of {merge} (node 3)"
    assert [lost_in(graph("model1"), "1"), lost_in(graph("model2"), "4"), lost_in({}, None)] == ["", "", ""]
    assert lost_in({"1": {"inputs": {"model": ["1", 0]}}}, "1") == ""  # a circle ends


def test_the_next_run_is_right(host: Host):
    for kind in ("NaN", "no height", "two channels"):
        refusal(host, "ApplyControl", IMAGES[kind][0])
    native = host.sample(host.native(host.scene(), "sd15", Control()))
    assert off_by(sampled(host, "ApplyControl", Control().image), native) <= TOLERANCE
    assert isinstance(host.scene(), Scene)
