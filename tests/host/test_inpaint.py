"""The inpaint hint on its way through the nodes: from a mask into the control's hint encoder, its mark untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import MOVES, moved, picture
from PIL import Image

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators.inpaint import inpaint

WHITE_RIGHT = torch.cat([torch.zeros(1, 32, 16), torch.ones(1, 32, 16)], dim=2)
"""A quarter of the pictures' size, so it has to be resized."""


def annotate(host: Host, **inputs: Any) -> torch.Tensor:
    values = {"image": picture(3), "annotator": "inpaint", "resolution": 0, "mask": WHITE_RIGHT, **inputs}
    return host.call("Annotate", **values)[0]


def test_the_mask_is_brought_to_the_hints_size_and_marks_it(host: Host):
    image, mask = picture(3), WHITE_RIGHT.clone()
    hint = annotate(host, image=image, mask=mask)
    assert hint.shape == (1, 128, 128, 3)
    assert torch.equal(hint[:, :, :64], image[:, :, :64])
    assert hint[:, :, 64:].eq(-1).all()
    assert torch.equal(image, picture(3))
    assert torch.equal(mask, WHITE_RIGHT)


def test_the_masked_value_is_the_users(host: Host):
    assert annotate(host, inpaint_masked_value=0.0)[:, :, 64:].eq(0).all()


def test_each_picture_of_a_batch_has_its_own_mask_or_all_have_one(host: Host):
    images = picture(3, batch=2)
    masks = torch.cat([WHITE_RIGHT, 1 - WHITE_RIGHT])
    hint = annotate(host, image=images, mask=masks)
    for i, half in enumerate((slice(64, None), slice(None, 64))):
        full = np.zeros((128, 128), np.float32)
        full[:, half] = 1
        assert torch.equal(hint[i], torch.from_numpy(inpaint(images[i].numpy(), full)))
    shared = annotate(host, image=images)
    assert shared[:, :, 64:].eq(-1).all()
    assert torch.equal(shared[:, :, :64], images[:, :, :64])


def test_a_mask_for_nobody_is_refused(host: Host):
    with pytest.raises(Exception, match="2 images came with 3 masks: connect one for all or one for each"):
        annotate(host, image=picture(3, batch=2), mask=WHITE_RIGHT.expand(3, -1, -1))


def test_without_a_mask_it_says_what_to_connect(host: Host):
    with pytest.raises(Exception, match="inpaint: found no mask: connect one, white where to paint anew"):
        annotate(host, mask=None)


def executed(host: Host) -> Any:
    """What the node gives, its preview with it, to an API graph that is older than the annotator's parameter."""
    clone = host.ours["Annotate"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return clone.execute(image=picture(3), annotator="inpaint", resolution=0, mask=WHITE_RIGHT)


def test_a_saved_graph_without_the_parameter_runs_with_its_default(host: Host):
    assert "inpaint_masked_value" in host.ours["Annotate"].INPUT_TYPES()["optional"]
    assert torch.equal(executed(host).args[0], annotate(host))


def test_the_node_shows_a_picture_and_hands_on_the_mark(host: Host):
    import folder_paths

    output = executed(host)
    assert output.args[0].min() == -1
    (shown,) = output.ui.as_dict()["images"]
    path = Path(folder_paths.get_temp_directory()) / shown["subfolder"] / shown["filename"]
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels[:, 64:].max() == 0
    np.testing.assert_allclose(pixels[:, :64] / 255, picture(3)[0, :, :64].numpy(), atol=1 / 255)


@pytest.mark.parametrize("size", [128, 144], ids=["at the latent's size", "cropped to it"])
def test_the_mark_reaches_the_hint_encoder(host: Host, size: int):
    control = host.load("sd15_depth")
    hint = annotate(host, image=picture(3, height=size, width=size))
    encoder = next(
        module for name, module in control.get_models()[-1].model.named_modules() if name.endswith("input_hint_block.0")
    )
    seen: list[torch.Tensor] = []
    handle = encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=hint)
    try:
        marked = host.sample(replace(host.scene(), model=model))
    finally:
        handle.remove()
    assert len(seen) == 1  # once per sampling
    assert seen[0].shape[-2:] == (128, 128)
    assert seen[0][..., 64:].eq(-1).all()
    assert seen[0][..., :60].min() >= 0
    if size == 128:
        (model,) = host.call("ApplyControl", model=host.model("sd15"), control_net=control, image=hint.clamp(0, 1))
        assert moved(marked, host.sample(replace(host.scene(), model=model))) >= MOVES
