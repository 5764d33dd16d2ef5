"""The embedded model inside the host is the embedded model outside of it, and a control joins both UNets alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from graphs import TOLERANCE, Scene, assert_same, prompt
from safetensors.torch import load_file

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.controlnet_core.networks import injection
from zeroconv.controlnet_core.networks.controlnet import ControlNet, copy_encoder
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.lab.autoencoder import LATENT_SCALE, Autoencoder
from zeroconv.lab.models import CONTROLS, UNET, WEIGHTS, load_weights
from zeroconv.lab.text_encoder import TextEncoder
from zeroconv.lab.vocabulary import tokenize

PROMPTS = ("a red person, a blue sphere and an orange cube on sand ground", "")

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        not (WEIGHTS / "unet.safetensors").is_file(), reason="the embedded model's weights are not in lab/weights"
    ),
]


@pytest.fixture(scope="module")
def lab(host: Host) -> tuple:
    """MODEL, CLIP and VAE from the node."""
    return host.call("LoadLabModel")


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_the_hosts_clip_gives_the_text_encoders_context(lab: tuple, prompt: str):
    clip = lab[1]
    tokens = clip.tokenize(prompt)
    assert [token for token, _ in tokens["l"][0]] == tokenize(prompt)
    context = clip.encode_from_tokens(tokens)
    expected = load_weights(TextEncoder(), "text_encoder")(torch.tensor([tokenize(prompt)]))
    assert off_by(context, expected) <= TOLERANCE


@torch.no_grad()
def test_the_hosts_vae_is_the_autoencoder(lab: tuple):
    vae = lab[2]
    own = load_weights(Autoencoder(), "autoencoder")
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    latent = own.encode(picture.movedim(-1, 1) * 2 - 1)
    assert off_by(vae.encode(picture), latent) <= TOLERANCE
    expected = (own.decode(latent) * 0.5 + 0.5).clamp(0, 1).movedim(1, -1)
    assert off_by(vae.decode(latent), expected) <= TOLERANCE


@torch.no_grad()
def test_residuals_join_our_unet_and_the_hosts_alike(lab: tuple):
    """The one place that knows where residuals go serves both."""
    own = load_weights(UNet(UNET), "unet")
    control = ControlNet(UNET)
    copy_encoder(control, own.state_dict())
    torch.manual_seed(0)
    for zero in (control.zero_convs, control.middle_block_out, control.input_hint_block[-1:]):
        for parameter in zero.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    x, t, context = torch.randn(2, 4, 16, 24), torch.tensor([900, 100]), torch.randn(2, 77, 64)
    residuals = control(x, t, context, control.encode_hint(torch.rand(1, 3, 128, 192)))
    theirs = lab[0].model.diffusion_model.float()
    plain = theirs(x, t, context=context)
    assert off_by(plain, own(x, t, context)) <= TOLERANCE
    expected = own(x, t, context, residuals=residuals)
    assert off_by(expected, plain) >= 0.05
    lists = injection.as_host_control(residuals, UNET.residual_shapes(16, 24))
    assert off_by(theirs(x, t, context=context, control=lists), expected) <= TOLERANCE


def test_latents_have_unit_variance_in_the_hosts_format(lab: tuple, host: Host):
    image, *_ = host.call("LabScene", seed=1)
    latent = lab[0].model.process_latent_in(lab[2].encode(image))
    assert lab[0].model.latent_format.scale_factor == LATENT_SCALE
    assert 0.6 <= latent.std() <= 1.5


@pytest.mark.parametrize("hint", ["depth", "pose"])
def test_the_hosts_own_nodes_take_the_labs_controls_too(lab: tuple, host: Host, hint: str):
    """Same file, same picture: the lab is an SD of the layout that every loader knows."""
    path = CONTROLS / f"lab_{hint}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in lab/weights/controlnet")
    host.write(path.stem, load_file(path))
    _, depth, pose, *_ = host.call("LabScene", seed=3)
    scene = Scene(lab[0], prompt(1), prompt(2))
    inputs = {"image": {"depth": depth, "pose": pose}[hint], "strength": 0.8}
    (net,) = host.call("LoadControlNet", control_net_name=path.name)
    (model,) = host.call("ApplyControl", model=scene.model, control_net=net, **inputs)
    (native,) = host.call("ControlNetLoader", control_net_name=path.name)
    positive, negative = host.call(
        "ControlNetApplyAdvanced",
        positive=scene.positive,
        negative=scene.negative,
        control_net=native,
        start_percent=0.0,
        end_percent=1.0,
        **inputs,
    )
    run = host.sample(replace(scene, model=model))
    assert_same(run, host.sample(Scene(scene.model, positive, negative)), host.sample(scene))
