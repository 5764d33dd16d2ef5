"""Encoders of models in diffusers' layout, and the command that makes a dataset with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zeroconv.controlnet_core.data import __main__ as command
from zeroconv.controlnet_core.data import config, encoders
from zeroconv.controlnet_core.data.config import ConfigError
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.data.writer import CachingOptions

from ..small import small_vae
from .toy import array, as_tensor, save

ROOT = Path(__file__).resolve().parents[3]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of single letters; gives the number of its tokens."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def write_model(folder: Path, texts: int = 1, seed: int = 0) -> Path:
    """A tiny random model as diffusers saves it, without a UNet; SDXL has two `texts`."""
    import transformers

    torch.manual_seed(seed)
    for ending, kind in list(zip(("", "_2"), ("CLIPTextModel", "CLIPTextModelWithProjection")))[:texts]:
        count = write_tokenizer(folder / f"tokenizer{ending}")
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 32,
        }
        settings = transformers.CLIPTextConfig(
            vocab_size=count, max_position_embeddings=10, eos_token_id=count - 1, projection_dim=12, **sizes
        )
        getattr(transformers, kind)(settings).save_pretrained(folder / f"text_encoder{ending}")
    small_vae().save_pretrained(folder / "vae")
    return folder


def test_a_folder_of_one_text_encoder_gives_its_last_states(tmp_path: Path):
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    found = encoders.read(write_model(tmp_path))
    picture = as_tensor(array(1))
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        expected = vae.encode(picture * 2 - 1).latent_dist.mean * 0.5
    assert torch.equal(found.pictures(picture), expected)

    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    start, end, c, at = 52, 53, LETTERS.index("c"), 26 + LETTERS.index("t")
    with torch.no_grad():
        expected = text(torch.tensor([[start, c, LETTERS.index("a"), at, *[end] * 6]])).last_hidden_state
    context, pooled = found.prompt("cat")
    torch.testing.assert_close(context, expected[0])
    assert pooled is None


def test_a_long_prompt_is_encoded_piece_by_piece(tmp_path: Path):
    found = encoders.read(write_model(tmp_path))
    long, pieces = found.prompt("a b c d e f g h i j k"), ("a b c d e f g h", "i j k")
    torch.testing.assert_close(long[0], torch.cat([found.prompt(piece)[0] for piece in pieces]))
    assert found.prompt("a b c d e f g h")[0].shape == (10, 16)  # eight words between start and end
    assert found.prompt("")[0].shape == (10, 16)


def test_prompts_can_be_encoded_without_a_vae(tmp_path: Path):
    base = write_model(tmp_path, texts=2)
    expected = encoders.read(base).prompt("a cat")
    shutil.rmtree(base / "vae")
    found = encoders.read_prompts(base)("a cat")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_folder_of_two_text_encoders_gives_sdxls_context(tmp_path: Path):
    import transformers

    found = encoders.read(write_model(tmp_path, texts=2))
    tokens = torch.tensor([[52, 26, *[53] * 8]])
    kinds = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    with torch.no_grad():
        said = [
            getattr(transformers, kind).from_pretrained(tmp_path / part)(tokens, output_hidden_states=True)
            for part, kind in kinds.items()
        ]
    context, pooled = found.prompt("a")
    torch.testing.assert_close(context, torch.cat([each.hidden_states[-2][0] for each in said], dim=-1))
    torch.testing.assert_close(pooled, said[1].text_embeds[0])
    assert context.shape == (10, 32) and pooled.shape == (12,)


def test_another_vae_takes_the_place_of_the_models_own(tmp_path: Path):
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", seed=1)
    picture = as_tensor(array(1))
    found = [encoders.read(tmp_path / "model", vae=vae).pictures(picture) for vae in (None, tmp_path / "other" / "vae")]
    assert torch.equal(found[0], encoders.read(tmp_path / "model").pictures(picture))
    assert torch.equal(found[1], encoders.read(tmp_path / "other").pictures(picture))
    assert not torch.equal(*found)


@pytest.mark.parametrize(("texts", "prefix"), [(1, "lora_te_"), (2, "lora_te2_")])
def test_a_lora_is_merged_into_the_text_encoder(tmp_path: Path, texts: int, prefix: str):
    base = write_model(tmp_path / "model", texts)
    module = "encoder.layers.1.self_attn.q_proj"
    named = f"{prefix}text_model_{module.replace('.', '_')}"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    lora = {f"{named}.lora_down.weight": down, f"{named}.lora_up.weight": up, f"{named}.alpha": torch.tensor(1.0)}
    save_file(
        lora | {"lora_unet_x.lora_down.weight": down.clone()}, tmp_path / "lora.safetensors"
    )  # the UNet's is not read
    plain, found = encoders.read(base), encoders.read(base, loras=[tmp_path / "lora.safetensors"])
    part = base / ("text_encoder" if texts == 1 else "text_encoder_2") / "model.safetensors"
    weights = load_file(part)
    weights[f"text_model.{module}.weight"] += 0.5 * up @ down
    save_file(weights, part, metadata={"format": "pt"})
    torch.testing.assert_close(found.prompt("a cat")[0], encoders.read(base).prompt("a cat")[0])
    assert not torch.allclose(found.prompt("a cat")[0], plain.prompt("a cat")[0], atol=1e-4)


def test_a_decoder_makes_pictures_of_what_the_unet_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(write_model(tmp_path) / "vae")
    latents = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    decode: Any = AutoencoderKL.decode
    seen: list[int] = []

    def spy(self: Any, latents: torch.Tensor) -> Any:
        seen.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(AutoencoderKL, "decode", spy)
    found = encoders.decoder(tmp_path, False, torch.device("cpu"))(latents)
    assert found.shape == (2, 3, 32, 48)
    torch.testing.assert_close(found, expected)
    assert seen == [1, 1]  # one after the other, so that many take no more memory than one


# -- what cannot be had ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(encoders.EncoderError, match="holds no model: expected a folder in diffusers' layout, with vae"):
        encoders.read(tmp_path)
    with pytest.raises(encoders.EncoderError, match=r"none.safetensors: there is no such file: give a checkpoint"):
        encoders.read(tmp_path / "none.safetensors")
    unet = tmp_path / "unet.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, unet)
    with pytest.raises(encoders.EncoderError, match=r"unet.safetensors holds no text encoder: give a whole checkpoint"):
        encoders.read(unet)
    with pytest.raises(encoders.EncoderError, match=r"unet.safetensors holds no VAE: give a whole checkpoint"):
        encoders.read_vae(unet, xl=False)
    both = {"first_stage_model.quant_conv.bias": torch.zeros(8), "cond_stage_model.transformer.x": torch.zeros(1)}
    save_file(both, unet)
    with pytest.raises(encoders.EncoderError, match="no tokenizer was found: give the folder of CLIP's vocab.json"):
        encoders.read(unet)
    write_tokenizer(tmp_path / "words")
    with pytest.raises(encoders.EncoderError, match=r"unet.safetensors: its encoders cannot be built"):
        encoders.read(unet, tmp_path / "words")
    write_model(tmp_path / "model")
    for name in ("transformers", "diffusers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(encoders.EncoderError, match=f"{name} is needed .* run `pip install {name}`, or make"):
                encoders.read(tmp_path / "model")


# -- the file ----------------------------------------------------------------------------------------------------------

WHOLE = '[model]\nbase = "b"\n[data]\ndataset = "d"\nfolder = "f"\n'


def toml(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_and_flags_come_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = WHOLE + 'annotator = "canny"\nannotator_resolution = 256\nmirror = true\n[training]\nanything = 1\n'
    found = config.read(toml(tmp_path, text), {})
    assert (found.base, found.dataset, found.folder) == tuple(tmp_path / name for name in "bdf")
    assert found.tokenizer is None and found.loras == ()
    assert found.annotator_weights == tmp_path / "annotators"
    assert found.options == CachingOptions(mirror=True, hints="canny", hint_resolution=256)
    monkeypatch.chdir(tmp_path / "..")
    found = config.read(toml(tmp_path, text), {"folder": Path("here"), "annotator": "given", "resolution": 128})
    assert found.folder == tmp_path.parent / "here"
    assert found.options == CachingOptions(resolution=128, mirror=True)
    text = text.replace("[data]", 'loras = ["a.safetensors"]\nvae = "v"\n[data]')
    found = config.read(toml(tmp_path, text), {})
    assert found.loras == (tmp_path / "a.safetensors",) and found.vae == tmp_path / "v"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace("folder", "foldr"), r"x.toml: foldr in \[data\] is not known: did you mean folder in \[data\]"),
        (WHOLE.replace('folder = "f"', ""), r"lacks folder in \[data\]: --defaults prints a whole file"),
        (WHOLE + "resolution = 1.5", r"resolution in \[data\] is 1.5: expected one like 512"),
        (WHOLE + "resolution = 8", r"resolution in \[data\] is 8: expected 64 to 8192"),
        (WHOLE.replace("[data]", "loras = 'a'\n[data]"), r"loras in \[model\] is 'a': expected a list of paths"),
        (WHOLE + "mirror = 1", r"mirror in \[data\] is 1: expected one like False"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        config.read(toml(tmp_path, text), {})


def test_the_defaults_are_a_file_and_every_key_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main(["--defaults"]) == 0
    found = config.read(toml(tmp_path, capsys.readouterr().out), {})
    assert found.options == CachingOptions() and found.tokenizer is None
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in said for name in (*config.MODEL, *config.DATA))
    assert config.dashed(["--batch_size", "my_x", "--folder=a_b"]) == ["--batch-size", "my_x", "--folder=a_b"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A model, and two pictures with captions."""
    for i in range(2):
        save(tmp_path / "pictures" / f"{i}.png", array(i))
        (tmp_path / "pictures" / f"{i}.txt").write_text("a cat")
    (tmp_path / "pictures" / "bad.png").write_bytes(b"nothing")
    return {"base": write_model(tmp_path / "model"), "folder": tmp_path / "pictures", "dataset": tmp_path / "made"}


def flags(given: dict[str, Any], **more: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**given, "resolution": 64, **more}.items()]


def test_pictures_and_an_annotator_become_a_dataset(given: dict[str, Any], capsys: pytest.CaptureFixture):
    from zeroconv.annotators.canny import canny

    assert command.main([*flags(given, annotator="canny", batch_size=1), "--mirror"]) == 0
    said = capsys.readouterr().out
    assert "2 pictures, 2 of them new; items: 4 of 64x64\nhints: canny\n" in said
    assert "1 skipped:\n  bad.png: bad.png cannot be read as a picture" in said
    dataset = Dataset.open(given["dataset"])
    assert dataset.prompts == ("", "a cat")
    picture = array(0).astype(np.float32) / 255
    hint = dataset.read([dataset.names.index("0.png")]).hints[0].movedim(0, -1).numpy()
    assert np.array_equal(hint, canny(picture, 100, 200))
    assert command.main([*flags(given, annotator="canny"), "--mirror"]) == 0
    assert "2 pictures, 0 of them new" in capsys.readouterr().out


def test_errors_of_the_command_are_one_sentence(given: dict[str, Any], capsys: pytest.CaptureFixture):
    for more, said in (
        ({}, "none of 3 items could be used: "),
        ({"annotator": "nothing"}, "annotator is nothing: choose given, or one of canny, hough_lines"),
        ({"annotator": "inpaint"}, "annotator is inpaint: choose given, or one of"),
        ({"folder": "nowhere"}, "there is no folder "),
        ({"base": "nowhere"}, "nowhere: there is no such file: give a checkpoint, or a folder in diffusers' layout"),
    ):
        assert command.main(flags(given, **more)) == 1
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert command.main([]) == 1
    assert "no file was given: --defaults prints one to begin with; without one --base must be given" in (
        capsys.readouterr().err
    )


def test_the_core_alone_says_that_annotators_are_not_there(given: dict[str, Any], tmp_path: Path):
    """And makes datasets of given hints."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(ROOT / "controlnet_core", alone / "controlnet_core", ignore=shutil.ignore_patterns("__pycache__"))
    for i in range(2):
        save(given["folder"] / "hints" / f"{i}.png", array(10 + i))
    for more, code, said in (({"annotator": "canny"}, 1, "annotators cannot be had ("), ({}, 0, "hints: given")):
        here = [sys.executable, "-m", "controlnet_core.data", *flags(given, **more)]
        done = subprocess.run(here, cwd=alone, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr


@pytest.mark.weights
def test_from_a_terminal_with_the_labs_model(given: dict[str, Any], tmp_path: Path):
    """As users call it, in the folder of the pack; the lab and the annotators lie beside the core."""
    from zeroconv.lab.models import WEIGHTS
    from zeroconv.lab.pipeline import LabModel

    if not (WEIGHTS / "autoencoder.safetensors").is_file():
        pytest.skip("the lab's weights are not in lab/weights")
    for i in range(2):
        (given["folder"] / f"{i}.txt").write_text("a red sphere on teal ground")
    here = [sys.executable, "-m", "controlnet_core.data", *flags(given, base="lab/weights", annotator="canny")]
    done = subprocess.run(
        here, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "2 pictures to encode, " in done.stdout and " at most in " in done.stdout
    dataset, model = Dataset.open(given["dataset"]), LabModel.load(())
    found = dataset.read([dataset.names.index("1.png")])
    torch.testing.assert_close(found.latents, model.encode_pictures(as_tensor(array(1))).cpu(), rtol=1e-3, atol=1e-3)
    context = model.encode(["a red sphere on teal ground"]).cpu()
    torch.testing.assert_close(found.context, context, rtol=2e-3, atol=2e-3)  # kept in fp16
