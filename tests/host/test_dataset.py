"""MakeControlDataset on the real host: what it caches is what the host's own nodes give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import picture
from PIL import Image

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators.canny import canny
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.lab.models import WEIGHTS

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        not (WEIGHTS / "autoencoder.safetensors").is_file(), reason="the lab's weights are not in lab/weights"
    ),
]

PROMPTS = ("a red ball", "", "a blue cube beside a red ball")


@pytest.fixture(scope="module")
def lab(host: Host) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE."""
    return host.call("LoadLabModel")


@pytest.fixture(autouse=True)
def output(host: Host, tmp_path: Path) -> Iterator[Path]:
    """The host's output folder, this test's own."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    yield tmp_path / "output"
    folder_paths.set_output_directory(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions and hints, one of them wide."""
    folder = tmp_path / "my pictures"
    (folder / "hints").mkdir(parents=True)
    for i, prompt in enumerate(PROMPTS):
        for path, seed in ((folder / f"{i}.png", i), (folder / "hints" / f"{i}.png", 10 + i)):
            Image.fromarray(as_bytes(picture(seed, 1, 64, 64 if i else 96))).save(path)
        (folder / f"{i}.txt").write_text(prompt)
    return folder


def as_bytes(image: torch.Tensor) -> np.ndarray:
    return (image[0].numpy() * 255).round().astype(np.uint8)


def make(host: Host, lab: tuple, **inputs: Any) -> tuple[Dataset, str]:
    _, clip, vae = lab
    return host.call("MakeControlDataset", clip=clip, vae=vae, **{"name": "mine", "resolution": 64, **inputs})


def assert_as_the_host_has_it(host: Host, lab: tuple, dataset: Dataset, index: int, image: torch.Tensor, prompt: str):
    """Item `index` is what VAEEncode and the sampler, and CLIPTextEncode, make of `image` and `prompt`."""
    model, clip, vae = lab
    batch = dataset.read([index])
    (encoded,) = host.call("VAEEncode", pixels=image, vae=vae)
    expected = model.model.process_latent_in(encoded["samples"])
    assert (batch.latents - expected).abs().max() <= 1e-5 * expected.abs().max()
    (conditioning,) = host.call("CLIPTextEncode", text=prompt, clip=clip)
    torch.testing.assert_close(batch.context, conditioning[0][0], rtol=1e-3, atol=1e-3)  # kept in fp16
    assert batch.pooled is None
    assert dataset.prompts[batch.prompts.item()] == prompt


def test_a_folder_is_cached_as_the_host_encodes_it(host: Host, lab: tuple, folder: Path, output: Path):
    dataset, report = make(host, lab, folder=str(folder))
    assert dataset.folder == output / "zeroconv" / "datasets" / "mine"
    assert sorted(dataset.names) == ["0.png", "1.png", "2.png"]
    for index, name in enumerate(dataset.names):
        if name == "0.png":
            assert dataset.bucket_of(index) == (48, 80)
            continue
        image = torch.from_numpy(np.array(Image.open(folder / name))).float()[None] / 255
        assert_as_the_host_has_it(host, lab, dataset, index, image, PROMPTS[int(name[0])])
        hint = torch.from_numpy(np.array(Image.open(folder / "hints" / name))).float() / 255
        assert torch.equal(dataset.read([index]).hints[0].movedim(0, -1), hint)
    assert "3 pictures, 3 of them new; items: 2 of 64x64, 1 of 80x48" in report
    assert "1 pictures have no caption: they are trained on with the empty prompt" in report
    assert "read as pictures with captions" in report
    assert "skipped" not in report


def test_pictures_of_the_canvas_are_cached_as_the_host_encodes_them(host: Host, lab: tuple):
    images, hints = (torch.round(picture(seed, 3, 64, 64) * 255) / 255 for seed in (1, 2))
    before = images.clone()
    dataset, report = make(host, lab, images=images, hints=hints, captions="\n".join(("one ball", "two", "a cube")))
    assert torch.equal(images, before)
    assert dataset.names == ("image 1", "image 2", "image 3")
    for i, prompt in enumerate(("one ball", "two", "a cube")):
        assert_as_the_host_has_it(host, lab, dataset, i, images[i : i + 1], prompt)
    torch.testing.assert_close(dataset.read([0, 1, 2]).hints, hints.movedim(-1, 1), rtol=0, atol=1e-6)
    assert "made of 3 images" in report


def test_one_caption_is_for_all(host: Host, lab: tuple, folder: Path):
    images = picture(1, 2, 64, 64)
    dataset, _ = make(host, lab, images=images, hints=images, captions="a ball\n", folder=str(folder))
    said = {name: dataset.prompts[dataset.read([i]).prompts.item()] for i, name in enumerate(dataset.names)}
    assert said == {
        "0.png": PROMPTS[0], "1.png": "a ball", "2.png": PROMPTS[2], "image 1": "a ball", "image 2": "a ball"
    }  # fmt: skip


def test_an_annotator_makes_the_hints(host: Host, lab: tuple):
    scenes = torch.cat([host.call("LabScene", seed=seed, size=64)[0] for seed in (1, 2)])
    images = torch.round(scenes * 255) / 255
    dataset, report = make(host, lab, images=images, annotator="canny", name="edges")
    assert dataset.read([0, 1]).hints.mean(dim=(1, 2, 3)).gt(0.02).all()
    for i in range(2):
        assert np.array_equal(dataset.read([i]).hints[0].movedim(0, -1).numpy(), canny(images[i].numpy(), 100, 200))
    assert dataset.manifest.options["hints"] == "canny"
    assert "hints: canny" in report
    larger, _ = make(host, lab, images=images, annotator="canny", name="edges of 256", annotator_resolution=256)
    assert len(larger.read([0]).hints.unique()) > 2  # thin lines of a larger hint, averaged


def test_a_second_run_encodes_what_was_added(host: Host, lab: tuple, folder: Path, monkeypatch: pytest.MonkeyPatch):
    before, _ = make(host, lab, folder=str(folder))
    Image.fromarray(as_bytes(picture(9, 1, 64, 64))).save(folder / "new.png")
    (folder / "bad.png").write_bytes(b"nothing")
    Image.fromarray(as_bytes(picture(9, 1, 64, 64))).save(folder / "hints" / "new.png")
    encoded = []
    encode = lab[2].encode
    monkeypatch.setattr(lab[2], "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    after, report = make(host, lab, folder=str(folder))
    assert sum(encoded) == 1 + 1  # and one by which the VAE is known again
    assert after.names == (*before.names, "new.png")
    assert "4 pictures, 1 of them new" in report
    assert "1 skipped:\n  bad.png: bad.png cannot be read as a picture" in report


def test_the_tiny_sdxl_model_gets_pooled_text_and_its_own_scale(host: Host, lab: tuple):
    model = host.model("sdxl")
    images = torch.round(picture(1, 1, 64, 64) * 255) / 255
    dataset, _ = make(host, lab, images=images, hints=images, captions="a ball", model=model)
    batch = dataset.read([0])
    expected = model.model.process_latent_in(lab[2].encode(images))
    assert (batch.latents - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.model.latent_format.scale_factor == 0.13025
    (conditioning,) = host.call("CLIPTextEncode", text="a ball", clip=lab[1])
    torch.testing.assert_close(batch.pooled, conditioning[0][1]["pooled_output"], rtol=1e-3, atol=1e-3)
    assert batch.sizes.tolist() == [[64, 64, 0, 0, 64, 64]]


def test_cancel_keeps_what_is_encoded(host: Host, lab: tuple, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management

    images = picture(1, 200, 64, 64)
    inputs = {"images": images, "hints": images, "captions": "a ball"}
    calls = 0
    encode = lab[2].encode

    def cancelling(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the VAE's probe, then batches of 64
            comfy.model_management.interrupt_current_processing()
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(lab[2], "encode", cancelling)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            make(host, lab, **inputs)
    _, report = make(host, lab, **inputs)
    assert "200 pictures, 72 of them new" in report


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "found neither folder nor images: name a folder of pictures, or connect images"),
        ({"images": 3, "captions": "a\nb"}, "found 2 lines of captions for 3 images: write one line for each"),
        ({"images": 3, "hints": 2}, "found 2 hints with 3 images and annotator given: connect one hint to each"),
        ({"images": 3, "hints": 3, "annotator": "canny"}, "found 3 hints with 3 images and annotator canny"),
        ({"images": 2}, "image 1: it has no hint: choose an annotator, or give one"),
        ({"folder": "no such folder"}, "there is no folder .*no such folder: give the whole path"),
        ({"images": 1, "name": "../up"}, r"filename '\.\./up' has a part"),
    ],
)
def test_what_cannot_be_made_is_told(host: Host, lab: tuple, inputs: dict[str, Any], said: str):
    tensors = {name: picture(1, inputs[name], 64, 64) for name in ("images", "hints") if name in inputs}
    with pytest.raises(Exception, match=said):
        make(host, lab, **{**inputs, **tensors})


def test_the_clip_of_another_model_is_refused(host: Host, lab: tuple):
    import copy

    model = copy.copy(host.model("sd15"))
    model.model = copy.copy(model.model)
    model.model.model_config = copy.copy(model.model.model_config)
    model.model.model_config.unet_config = {**model.model.model_config.unet_config, "context_dim": 768}
    with pytest.raises(Exception, match="takes text embeddings of 768 channels, clip gives 64: connect the CLIP"):
        make(host, lab, images=picture(1), hints=picture(1), model=model)


def test_a_whole_path_is_taken_as_it_is_where_the_owner_said_so(
    host: Host, lab: tuple, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
):
    import folder_paths

    images = picture(1, 1, 64, 64)
    given: dict[str, Any] = {"images": images, "hints": images}
    (tmp_path / "link").symlink_to(tmp_path)
    for outside in (tmp_path / "elsewhere", output / ".." / "elsewhere", tmp_path / "link" / "elsewhere"):
        with pytest.raises(Exception, match=r"lies outside of the folders that nodes may write to.*control_datasets"):
            make(host, lab, **given, name=str(outside))
        with pytest.raises(Exception, match="lies outside of the folders that nodes may write to"):
            host.call("LabScenes", count=1, name=str(outside))
    assert not (tmp_path / "elsewhere").exists()
    named = {**folder_paths.folder_names_and_paths, "control_datasets": ([str(tmp_path / "elsewhere")], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", named)
    for name in (tmp_path / "elsewhere" / "mine", output / "mine"):
        dataset, _ = make(host, lab, **given, name=str(name))
        assert dataset.folder == name


def test_pictures_that_are_skipped_count_as_no_picture_without_caption(host: Host, lab: tuple, tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "a.png").write_bytes(b"no picture")
    _, report = make(host, lab, folder=str(folder), annotator="canny")
    assert "\n1 pictures have no caption" in report and "1 skipped:" in report


def test_a_dataset_that_another_process_makes_is_left_alone(host: Host, lab: tuple, output: Path):
    from zeroconv.controlnet_core.files.lock import locked

    images = picture(1, 1, 64, 64)
    says = r"is in use by another process \(\d+\): wait until it ends, stop it, or"
    with locked(output / "zeroconv" / "datasets" / "mine"), pytest.raises(Exception, match=says):
        make(host, lab, images=images, hints=images)
    make(host, lab, images=images, hints=images)


def test_scenes_of_the_lab_become_a_dataset(host: Host, lab: tuple, output: Path):
    (scenes,) = host.call("LabScenes", count=3, hint="canny", name="three")
    assert Path(scenes) == output / "zeroconv" / "scenes" / "three"
    dataset, report = make(host, lab, folder=scenes, resolution=128)
    assert len(dataset) == 3
    assert dataset.read([0, 1, 2]).hints.unique().tolist() == [0, 1]
    assert "read as fill50k" in report
    (again,) = host.call("LabScenes", count=3, hint="canny", name="three")
    assert again == scenes


def test_the_node_runs_again_when_its_folder_changes(host: Host, folder: Path):
    node = host.ours["MakeControlDataset"]
    values = {"folder": str(folder), "name": "mine", "captions": ""}
    before = node.fingerprint_inputs(**values)
    assert node.fingerprint_inputs(**values) == before
    (folder / "0.txt").write_text("another caption")
    assert node.fingerprint_inputs(**values) != before
    assert node.fingerprint_inputs(name="mine") == node.fingerprint_inputs(name="mine", folder=None)
