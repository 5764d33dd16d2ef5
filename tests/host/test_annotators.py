"""Learned annotators on the real host: weights on demand, kept between runs, moved by the host's memory management."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import Network

from ..annotators.loopback_hub import LoopbackHub, loopback_hub
from .fake_annotators import SIZE, WEIGHTS, Fake, Tiny, annotate, fake, pictures, weights, write

if TYPE_CHECKING:
    from hosting import Host

__all__ = ["fake", "weights"]  # fixtures: pytest finds them here


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
