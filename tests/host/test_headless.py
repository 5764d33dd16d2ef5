"""A dataset made without the host holds what the host's VAE and CLIP of the same weights give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import picture
from PIL import Image
from safetensors.torch import save_file

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.controlnet_core.data import __main__ as command
from zeroconv.controlnet_core.data import encoders
from zeroconv.controlnet_core.data.dataset import Dataset

WIDTH = 64  # of a text encoder: one head
TINY = {"hidden_size": WIDTH, "num_attention_heads": 1, "num_hidden_layers": 3, "intermediate_size": 128}
PROMPTS = ("a red ball", "", "Two houses, one of them blue; it's 3 o'clock!", "many words " * 60)


def clip_of(family: str) -> Any:
    """The host's CLIP of this family, tiny and random."""
    import comfy.sd
    import comfy.supported_models
    from tiny_models import randomise

    kind = {
        "sd15": comfy.supported_models.SD15,
        "sd21": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }
    target = kind[family].clip_target(None, {})  # type: ignore[arg-type]
    clip = comfy.sd.CLIP(target, model_options={f"clip_{letter}_model_config": TINY for letter in "lgh"})
    randomise(clip.cond_stage_model, 5)
    return clip


def vae_of() -> Any:
    """The host's VAE, tiny and random."""
    import comfy.ldm.models.autoencoder
    import comfy.sd
    from tiny_models import randomise

    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"ddconfig": ddconfig, "embed_dim": 4}
    state = comfy.ldm.models.autoencoder.AutoencoderKL(**params).state_dict()
    vae: Any = comfy.sd.VAE(sd=state, config={"params": params})
    randomise(vae.first_stage_model, 6)
    return vae


def checkpoint(path: Path, family: str, clip: Any, vae: Any) -> Path:
    """A file as the host saves it: ldm's layout, without a UNet."""
    import comfy.supported_models

    kind = {
        "sd15": comfy.supported_models.SD15,
        "sd21": comfy.supported_models.SD20,
        "sdxl": comfy.supported_models.SDXL,
    }
    saved = kind[family].process_clip_state_dict_for_saving(None, clip.get_sd())  # type: ignore[arg-type]
    saved |= {f"first_stage_model.{key}": tensor for key, tensor in vae.get_sd().items()}
    save_file({key: tensor.clone().contiguous() for key, tensor in saved.items()}, path)
    return path


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_encoders_are_the_hosts(host: Host, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import comfy.sd

    from zeroconv.nodes.host import dataset

    monkeypatch.setattr(dataset, "SDXL_CONTEXT", 2 * WIDTH)
    clip, vae = clip_of(family), vae_of()
    theirs_pictures, theirs_prompt = dataset.encoders(vae, clip)
    words = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
    ours = encoders.read(checkpoint(tmp_path / "tiny.safetensors", family, clip, vae), words)

    pictures = picture(3, 2, 64, 96).movedim(-1, 1)
    expected = theirs_pictures(pictures)
    assert expected.shape == (2, 4, 8, 12)
    torch.testing.assert_close(ours.pictures(pictures), expected.detach(), rtol=1e-4, atol=1e-3)
    for prompt in PROMPTS:
        (context, pooled), (expected, whole) = ours.prompt(prompt), theirs_prompt(prompt)
        assert context.shape == (154 if prompt is PROMPTS[-1] else 77, 2 * WIDTH if family == "sdxl" else WIDTH)
        torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-4)
        assert (pooled is None) == (whole is None) == (family != "sdxl")
        if pooled is not None and whole is not None:
            torch.testing.assert_close(pooled, whole, rtol=1e-4, atol=1e-4)


def test_the_command_and_the_node_make_the_same(host: Host, tmp_path: Path):
    import comfy.sd
    import folder_paths

    clip, vae = clip_of("sd15"), vae_of()
    file = checkpoint(tmp_path / "tiny.safetensors", "sd15", clip, vae)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        pixels = (picture(i, 1, 64, 64 if i else 96)[0].numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i])
    words = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
    given = {"base": file, "folder": folder, "dataset": tmp_path / "made", "tokenizer": words}
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert command.main([*flags, "--resolution", "64", "--annotator", "canny"]) == 0
    ours = Dataset.open(tmp_path / "made")

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    try:
        node: dict[str, Any] = {"name": "mine", "resolution": 64, "annotator": "canny"}
        theirs, _ = host.call("MakeControlDataset", clip=clip, vae=vae, folder=str(folder), **node)
    finally:
        folder_paths.set_output_directory(before)
    assert ours.names == theirs.names and ours.fingerprint == theirs.fingerprint
    for index in range(3):
        mine, other = ours.read([index]), theirs.read([index])
        assert torch.equal(mine.hints, other.hints)
        torch.testing.assert_close(mine.latents, other.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.context, other.context, rtol=2e-3, atol=2e-3)  # kept in fp16
