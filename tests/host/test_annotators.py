"""Learned annotators on the real host: weights on demand, kept between runs, moved by the host's memory management."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

if TYPE_CHECKING:
    from hosting import Host

from zeroconv.annotators import ANNOTATORS, PARAMETERS, Annotator, Parameter
from zeroconv.annotators.cache import HintCache
from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import File, Network

from ..annotators.loopback_hub import LoopbackHub, loopback_hub

WEIGHTS = {"scale": torch.tensor([0.5, 0.25, 0.125])}
SIZE = len(save(WEIGHTS))


class Tiny(torch.nn.Module):
    """A network of one parameter. As those of transformers, it has a `device` of its own, which nobody may set."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(3))

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture * self.scale


class Fake:
    """What ran: paths that networks were built from, and pictures that were annotated, by their sizes."""

    def __init__(self) -> None:
        self.built: list[Path] = []
        self.ran: list[tuple[int, ...]] = []
        self.devices: list[torch.device] = []
        self.before: Any = None

    def build(self, path: Path) -> Tiny:
        self.built.append(path)
        network = Tiny()
        network.load_state_dict(load_file(path))
        return network.eval()

    def tiny(self, network: Tiny, picture: Any, gain: float = 1.0) -> Any:
        if self.before is not None:
            self.before(len(self.ran))
        self.ran.append(picture.shape)
        self.devices.append(network.device)
        return (network(torch.from_numpy(picture).to(network.device)) * gain).cpu().numpy()

    def plain(self, picture: Any) -> Any:
        self.ran.append(picture.shape)
        return picture


@pytest.fixture
def fake(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Three annotators of this test alone; `annotators` is an empty folder of the host, no other pack has weights."""
    import folder_paths
    from huggingface_hub import constants

    assert "Annotate" in host.ours
    fake = Fake()
    annotate, adapter = sys.modules["zeroconv.nodes.annotate"], sys.modules["zeroconv.nodes.host.annotators"]
    module = SimpleNamespace(build=fake.build)
    monkeypatch.setitem(sys.modules, "zeroconv.annotators.networks.fake", module)
    entries = (
        Annotator("tiny", fake.tiny, (Parameter("gain", "How bright."),), networks=("tiny",), multiple=64),
        Annotator("plain", fake.plain),
        Annotator("lacking", fake.tiny, networks=("tiny",), packages=("no_such_package",)),
    )
    monkeypatch.setattr(annotate, "ANNOTATORS", (*entries, *ANNOTATORS))
    listed = [(entry, parameter) for entry in entries for parameter in entry.parameters]
    monkeypatch.setattr(annotate, "PARAMETERS", (*listed, *PARAMETERS))
    monkeypatch.setattr(annotate, "HINTS", HintCache(10**8))
    file = File("someone/tiny", "tiny.safetensors", SIZE, hashlib.sha256(save(WEIGHTS)).hexdigest())
    monkeypatch.setattr(adapter, "NETWORKS", (Network("tiny", "fake:build", (file,), "MIT"),))
    monkeypatch.setattr(adapter, "_patchers", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.delenv("AUX_ANNOTATOR_CKPTS_PATH", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    others = {name: kept for name, kept in folder_paths.folder_names_and_paths.items() if name != "annotators"}
    others["custom_nodes"] = ([str(tmp_path / "custom_nodes")], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", others)
    return fake


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights where the pack's users have them: models/annotators/<repository>/<name>."""
    return write(tmp_path / "models" / "annotators" / "someone" / "tiny" / "tiny.safetensors")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(WEIGHTS, path)
    return path


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def annotate(host: Host, image: torch.Tensor, annotator: str = "tiny", **inputs: Any) -> torch.Tensor:
    return host.call("Annotate", image=image, annotator=annotator, resolution=0, **inputs)[0]


# -- networks ----------------------------------------------------------------------------------------------------------


def test_a_network_is_built_once_and_kept_between_runs(host: Host, fake: Fake, weights: Path):
    for seed in range(3):
        image = pictures(2, seed)
        before = image.clone()
        torch.testing.assert_close(annotate(host, image), image * WEIGHTS["scale"])
        assert torch.equal(image, before)
        weights.unlink(missing_ok=True)  # the second run reads nothing
    assert fake.built == [weights]
    assert fake.ran == [(64, 128, 3)] * 6  # padded to 64 inside, cropped back


def test_the_network_is_the_hosts_to_move(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    annotate(host, pictures(1))
    held = next(
        loaded
        for loaded in management.current_loaded_models
        if type(getattr(loaded.model.model, "network", None)) is Tiny
    )
    assert held.model.model_size() == 3 * 4
    assert held.device == management.get_torch_device() == fake.devices[0]
    management.unload_all_models()
    assert held not in management.current_loaded_models
    torch.testing.assert_close(annotate(host, pictures(1, 1)), pictures(1, 1) * WEIGHTS["scale"])
    assert len(fake.built) == 1
    assert len(fake.ran) == 2


def test_the_hosts_models_and_ours_live_side_by_side(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    management.load_models_gpu([host.model("sd15")])
    annotate(host, pictures(1))
    assert any(loaded.model is host.model("sd15") for loaded in management.current_loaded_models)


def test_networks_used_longest_ago_are_let_go(host: Host, fake: Fake, weights: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = sys.modules["zeroconv.nodes.host.annotators"]
    (tiny,) = adapter.NETWORKS
    names = ["a", "b", "c"]
    monkeypatch.setattr(adapter, "NETWORKS", tuple(Network(n, tiny.build, tiny.files, "MIT") for n in names))
    monkeypatch.setattr(adapter, "KEPT", 2 * 12)  # two networks of three floats
    kept = {name: adapter.networks([name], None)[0] for name in ("a", "b")}
    assert adapter.networks(["a"], None) == [kept["a"]]
    adapter.networks(["c"], None)
    assert len(fake.built) == 3
    assert adapter.networks(["a"], None) == [kept["a"]]  # b was let go
    assert len(fake.built) == 3
    assert adapter.networks(["b"], None) != [kept["b"]]
    assert len(fake.built) == 4
    monkeypatch.setattr(adapter, "KEPT", 0)
    assert len(adapter.networks(names, None)) == 3  # what is needed now stays, whatever it takes


def test_weights_are_found_where_other_packs_and_settings_have_them(host: Host, fake: Fake, tmp_path: Path):
    import folder_paths

    adapter = sys.modules["zeroconv.nodes.host.annotators"]
    own, extra, set_by_user = tmp_path / "models" / "annotators", tmp_path / "extra", tmp_path / "elsewhere"
    aux = tmp_path / "custom_nodes" / "comfyui_controlnet_aux" / "ckpts"
    aux.mkdir(parents=True)
    assert adapter.folders() == [own, aux]
    folder_paths.add_model_folder_path("annotators", str(extra))  # extra_model_paths.yaml's `annotators:`
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUX_ANNOTATOR_CKPTS_PATH", str(set_by_user))
        assert adapter.folders() == [own, extra, set_by_user, aux]
    for path in (
        aux / "someone" / "tiny" / "tiny.safetensors",
        extra / "tiny.safetensors",
        own / "tiny" / "tiny.safetensors",
    ):
        adapter._patchers.clear()
        write(path)
        annotate(host, pictures(1, len(fake.ran)))
        assert fake.built[-1] == path
    assert len(fake.built) == 3


def test_a_folder_of_the_users_own_settings_comes_first(host: Host, fake: Fake, tmp_path: Path):
    """extra_model_paths.yaml is read before packs are loaded."""
    import folder_paths

    folder_paths.add_model_folder_path("annotators", str(tmp_path / "extra"))
    adapter = sys.modules["zeroconv.nodes.host.annotators"]
    assert adapter.folders() == [tmp_path / "extra", tmp_path / "models" / "annotators"]


def test_a_file_that_cannot_be_read_is_named(host: Host, fake: Fake, weights: Path):
    weights.write_bytes(bytes(SIZE))
    with pytest.raises(AnnotatorError) as caught:
        annotate(host, pictures(1))
    said = str(caught.value)
    assert said.startswith(f"tiny: tiny cannot be built from {weights}: SafetensorError: ")
    assert said.endswith("If a download broke off there, delete the file: the next run fetches it again")
    write(weights)
    annotate(host, pictures(1))  # an error is not kept


# -- downloads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(fake: Fake) -> Iterator[LoopbackHub]:
    with loopback_hub() as served:
        served.files["someone/tiny/tiny.safetensors"] = save(WEIGHTS)
        yield served


def test_weights_are_fetched_with_the_nodes_progress_bar(
    host: Host, fake: Fake, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import comfy.utils

    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: shown.append((int(value), int(total)))
    )
    for seed in range(2):
        torch.testing.assert_close(annotate(host, pictures(1, seed)), pictures(1, seed) * WEIGHTS["scale"])
    path = tmp_path / "models" / "annotators" / "someone" / "tiny" / "tiny.safetensors"
    assert fake.built == [path]
    assert path.read_bytes() == save(WEIGHTS)
    assert hub.sent == SIZE
    assert shown == [(0, SIZE), (SIZE, SIZE), (1, 1), (1, 1)]


def test_cancel_stops_a_download(host: Host, fake: Fake, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management as management
    import comfy.utils

    def cancel(value: int, total: int, *_: Any, **__: Any) -> None:
        if (value, total) == (0, SIZE):
            management.interrupt_current_processing(True)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(management.InterruptProcessingException):
        annotate(host, pictures(1))
    assert fake.built == []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    annotate(host, pictures(1))
    assert len(fake.built) == 1
    assert hub.sent == SIZE  # what had come was kept


def test_without_a_network_the_error_says_what_to_do(host: Host, fake: Fake, hub: LoopbackHub, tmp_path: Path):
    hub.close()
    with pytest.raises(AnnotatorError) as caught:
        annotate(host, pictures(1))
    assert str(caught.value) == (
        f"tiny: no connection: get someone/tiny/tiny.safetensors (0.1 MB) from {hub.url} and put it into "
        f"{tmp_path / 'models' / 'annotators'}, in the folders of its name"
    )


def test_nothing_is_fetched_for_an_annotator_that_cannot_run(host: Host, fake: Fake, hub: LoopbackHub):
    with pytest.raises(AnnotatorError, match="lacking needs no_such_package, which this Python lacks"):
        annotate(host, pictures(1), "lacking")
    with pytest.raises(AnnotatorError, match="tiny: image has 18432 numbers that are not finite"):
        annotate(host, torch.full((1, 64, 96, 3), torch.nan))
    assert hub.sent == 0


# -- the node ----------------------------------------------------------------------------------------------------------


def test_hints_are_kept_by_picture_and_own_parameters(host: Host, fake: Fake, weights: Path):
    image = pictures(3)
    first = annotate(host, image)
    assert len(fake.ran) == 3
    assert torch.equal(annotate(host, image, canny_low=7.0), first)  # another annotator's parameter
    assert len(fake.ran) == 3
    changed = image.clone()
    changed[1] = pictures(1, 5)[0]
    hints = annotate(host, changed)  # one frame of many
    assert len(fake.ran) == 4
    assert torch.equal(hints[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(hints[1], changed[1] * WEIGHTS["scale"])
    torch.testing.assert_close(annotate(host, image, tiny_gain=0.5), image * WEIGHTS["scale"] * 0.5)
    assert len(fake.ran) == 7
    masked = annotate(host, image, mask=torch.zeros(1, 64, 96))  # laid on afterwards
    assert masked.abs().max() == 0
    assert torch.equal(annotate(host, image), first)
    assert len(fake.ran) == 7


def test_changing_a_later_parameter_of_a_long_video_runs_no_annotator_again(
    host: Host, fake: Fake, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    annotate_node = sys.modules["zeroconv.nodes.annotate"]
    (record,) = (entry for entry in ANNOTATORS if entry.name == "depth_small")
    depths = torch.linspace(1, 2, 64 * 96).reshape(64, 96).numpy()

    def see(network: Tiny, pictures: Any) -> Any:
        fake.ran.append(pictures.shape)
        return [depths * (1 + picture.mean()) for picture in pictures]

    listed = replace(record, function=see, networks=("tiny",))
    monkeypatch.setattr(annotate_node, "ANNOTATORS", (listed,))
    monkeypatch.setattr(annotate_node, "AT_ONCE", 5 * 64 * 96)
    image = torch.linspace(0.1, 0.9, 12).reshape(12, 1, 1, 1).expand(12, 64, 96, 3)
    each = annotate(host, image, "depth_small")
    assert fake.ran == [(5, 64, 96, 3), (5, 64, 96, 3), (2, 64, 96, 3)]
    together = annotate(host, image, "depth_small", depth_small_range="batch")
    masked = annotate(host, image, "depth_small", depth_small_range="batch", mask=torch.ones(1, 64, 96))
    assert len(fake.ran) == 3
    assert (each.amin((1, 2, 3)) == 0).all() and (each.amax((1, 2, 3)) == 1).all()
    assert together.amin() == 0 and together.amax() == 1 and together[0].amax() < 0.5
    assert torch.equal(masked, together)
    changed = image.clone()
    changed[7] = 0.3
    annotate(host, changed, "depth_small")
    assert fake.ran[3:] == [(1, 64, 96, 3)]


def growth_during(run: Callable[[], object]) -> int:
    """Bytes by which this process was larger at most while something ran."""
    import psutil

    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    most = [before]

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return most[0] - before


def test_a_video_takes_little_more_than_itself_and_its_hints(host: Host, fake: Fake):
    """24 frames of 1024x576: beside their 170 MB and as much of hints, the node takes half of that sum at most."""
    image = torch.rand(24, 36, 64, 3).repeat(1, 16, 16, 1)
    annotate(host, image[:2], "canny")
    hints = []
    grown = growth_during(lambda: hints.append(annotate(host, image, "canny")))
    size = image.numel() * 4
    assert hints[0].shape == image.shape
    assert grown < size + 0.5 * 2 * size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["canny", "depth_moge"])
def test_beside_a_long_video_and_its_hints_there_is_little_and_depth_does_not_flicker(
    name: str, host: Host, fake: Fake, monkeypatch: pytest.MonkeyPatch
):
    """120 frames of 1024x576, a wall and something that comes nearer: 850 MB, and as much of hints.

    What the node takes beside those is within 1.5 times the bytes of both if they had 8 bits: 640 MB. Inverse depth is
    the red channel here; no network is part of the sum.
    """
    (record,) = [record for record in ANNOTATORS if record.name == name]

    def see(pictures: Any) -> Any:
        fake.ran.append(pictures.shape)
        return pictures[..., 0]

    annotate_node = sys.modules["zeroconv.nodes.annotate"]
    monkeypatch.setattr(annotate_node, "HINTS", HintCache(512 << 20))
    if record.networks:
        monkeypatch.setattr(annotate_node, "ANNOTATORS", (replace(record, function=see, networks=()),))
    image = torch.full((120, 576, 1024, 3), 0.1)
    image += torch.linspace(0, 0.1, 1024)[:, None]
    for i in range(120):
        image[i, 200:400, 300 + i : 600 + i] = 0.25 + 0.006 * i
    annotate(host, image[:2], name)
    hints: list[torch.Tensor] = []
    grown = growth_during(lambda: hints.append(annotate(host, image, name, depth_moge_range="batch")))
    beside, bound = grown - image.numel() * 4, 1.5 * 2 * image.numel()

    def flicker(hints: torch.Tensor) -> float:
        """Grey levels by which the wall changes at most."""
        return float((hints[:, :150, :, 0].amax(0) - hints[:, :150, :, 0].amin(0)).max() * 255)

    moved = flicker(hints[0])
    print(f"{name}: {beside / 1e6:.0f} of {bound / 1e6:.0f} MB beside input and hints; the wall moves by {moved:.2f}")
    assert beside < bound
    assert moved == 0
    if record.networks:
        assert hints[0][-1, 300, 500, 0] > hints[0][0, 300, 500, 0] + 0.5
        count = len(fake.ran)
        assert flicker(annotate(host, image, name)) > 50
        assert len(fake.ran) == count  # another range: nothing is looked at again


def test_a_hint_that_another_node_wrote_into_is_not_given_again(host: Host, fake: Fake, weights: Path):
    first = annotate(host, pictures(1))
    expected = first.clone()
    with torch.inference_mode():
        first.zero_()
    assert torch.equal(annotate(host, pictures(1)), expected)


def test_networks_stay_where_they_are_when_no_hint_is_to_be_made(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    annotate(host, pictures(1))
    management.unload_all_models()
    annotate(host, pictures(1))
    assert not any(isinstance(getattr(m.model.model, "network", None), Tiny) for m in management.current_loaded_models)


def test_cancel_stops_between_two_pictures(host: Host, fake: Fake, weights: Path):
    import comfy.model_management as management

    def cancel(ran: int) -> None:
        if ran == 1:
            management.interrupt_current_processing(True)

    fake.before = cancel
    with pytest.raises(management.InterruptProcessingException):
        annotate(host, pictures(4))
    assert len(fake.ran) == 2
    fake.before = None
    annotate(host, pictures(4))
    assert len(fake.ran) == 4  # the two that were made are kept


@pytest.mark.parametrize("annotator", ["tiny", "plain"])
def test_an_empty_batch_is_an_error(host: Host, fake: Fake, annotator: str):
    with pytest.raises(
        AnnotatorError, match=r"image is an empty batch of shape \(0, 64, 96, 3\): connect at least one"
    ):
        annotate(host, torch.zeros(0, 64, 96, 3), annotator)
    assert fake.ran == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_in_half_precision_are_read(host: Host, fake: Fake, dtype: torch.dtype):
    image = pictures(1).to(dtype)
    hint = annotate(host, image, "plain")
    assert hint.dtype == torch.float32
    assert torch.equal(hint, image.float())
