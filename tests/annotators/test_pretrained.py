"""Files as they are published become transformers' networks: RT-DETR and ViTPose, small and random."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zeroconv.annotators.images import AnnotatorError
from zeroconv.annotators.networks import pretrained
from zeroconv.annotators.networks.people import build_detector, build_estimator

from . import pretrained_tiny as tiny

transformers = pytest.importorskip("transformers")


def test_files_become_the_networks_that_were_saved(folders: tuple[Path, Path], detector: Any, estimator: Any):
    inputs = (torch.rand(1, 3, 640, 640), torch.rand(2, 3, 64, 48))
    kinds = (transformers.RTDetrForObjectDetection, transformers.VitPoseForPoseEstimation)
    for folder, network, kind, values in zip(folders, (detector, estimator), kinds, inputs, strict=True):
        assert isinstance(network, kind) and not network.training
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in network.parameters())
        expected = kind.from_pretrained(folder).eval()(values)
        for ours, theirs in zip(network(values).values(), expected.values(), strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs)


def test_files_of_another_network_are_refused(folders: tuple[Path, Path], tmp_path: Path):
    (detector, _), (estimator, estimator_weights) = map(tiny.files, folders)
    with pytest.raises(AnnotatorError, match=r"config\.json describes a network of type vitpose; expected rt_detr"):
        build_detector(estimator, estimator_weights)
    with pytest.raises(AnnotatorError, match=r"lacks \d+ weights of RTDetrForObjectDetection"):
        build_detector(detector, estimator_weights)
    state = load_file(estimator_weights)
    save_file({**state, "head.conv.bias": torch.zeros(3)}, tmp_path / "wide.safetensors")
    with pytest.raises(AnnotatorError, match=r"wide\.safetensors does not fit .*head\.conv\.bias"):
        build_estimator(estimator, tmp_path / "wide.safetensors")
    del state["head.conv.bias"]
    save_file(state, tmp_path / "lacking.safetensors")
    with pytest.raises(AnnotatorError, match=r"lacks 1 weights of VitPoseForPoseEstimation, head\.conv\.bias among"):
        build_estimator(estimator, tmp_path / "lacking.safetensors")


@pytest.mark.parametrize("names", ["short", "long", "both"])
def test_the_detectors_heads_are_read_under_either_of_their_names(
    folders: tuple[Path, Path], detector: Any, tmp_path: Path, names: str
):
    """transformers 4 has them twice and saves the long names; transformers 5 has the long ones alone."""
    config, weights = tiny.files(folders[0])
    rest = load_file(weights)
    heads = {
        key: rest.pop(key) for key in list(rest) if key.startswith(("model.decoder.class_", "model.decoder.bbox_"))
    }
    assert len(heads) == 16
    short = {key.removeprefix("model.decoder."): weight.clone() for key, weight in heads.items()}
    chosen = {"short": short, "long": heads, "both": {**short, **heads}}[names]
    save_file({**rest, **chosen}, tmp_path / "heads.safetensors")
    picture = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(0))
    network: Any = build_detector(config, tmp_path / "heads.safetensors")
    assert torch.equal(network(picture).logits, detector(picture).logits)
    for key in [key for key in chosen if key.endswith("class_embed.1.bias")]:
        del chosen[key]
    save_file({**rest, **chosen}, tmp_path / "lacking.safetensors")
    with pytest.raises(AnnotatorError, match=r"lacks 1 weights of RTDetrForObjectDetection, .*class_embed\.1\.bias"):
        build_detector(config, tmp_path / "lacking.safetensors")


def test_tables_of_a_frozen_normalisation_are_weights(folders: tuple[Path, Path], tmp_path: Path):
    config, weights = tiny.files(folders[0])
    state = load_file(weights)
    for end in (".running_mean", ".weight", ".bias"):
        key = f"model.backbone.model.embedder.embedder.0.normalization{end}"
        save_file({name: weight for name, weight in state.items() if name != key}, tmp_path / "lacking.safetensors")
        with pytest.raises(AnnotatorError, match=f"lacks 1 weights of RTDetrForObjectDetection, {key} among"):
            build_detector(config, tmp_path / "lacking.safetensors")


def test_published_names_that_only_transformers_translates_are_read(
    folders: tuple[Path, Path], estimator: Any, tmp_path: Path
):
    """As those of most networks since transformers 5, whose `from_pretrained` translates and nothing else does."""

    class Renamed(transformers.VitPoseForPoseEstimation):
        @classmethod
        def from_pretrained(cls, *place: Any, state_dict: dict[str, torch.Tensor], **rest: Any) -> Any:
            translated = {key.replace("published.", "head."): weight for key, weight in state_dict.items()}
            return super().from_pretrained(*place, state_dict=translated, **rest)

    config, weights = tiny.files(folders[1])
    published = {key.replace("head.", "published."): weight for key, weight in load_file(weights).items()}
    assert any(key.startswith("published.") for key in published)
    save_file(published, tmp_path / "published.safetensors")
    network = pretrained.build(Renamed, transformers.VitPoseConfig, config, tmp_path / "published.safetensors")
    crops = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(crops).heatmaps, estimator(crops).heatmaps)


def test_loading_is_quiet_and_in_full_precision_whatever_the_config_says(
    folders: tuple[Path, Path], estimator: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config, weights = tiny.files(folders[1])
    said = json.loads(config.read_text(encoding="utf-8"))
    for part in (said, said["backbone_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    save_file({**load_file(weights), "of.training": torch.zeros(1)}, tmp_path / "more.safetensors")
    heard = io.StringIO()
    listener = logging.StreamHandler(heard)
    before = transformers.logging.get_verbosity()
    logging.getLogger("transformers").addHandler(listener)
    try:
        network = build_estimator(tmp_path / "config.json", tmp_path / "more.safetensors")
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert heard.getvalue() == "" and capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == before
    for ours, theirs in zip(network.parameters(), estimator.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_an_old_transformers_is_told(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.40.0"))
    with pytest.raises(AnnotatorError, match=r"transformers 4\.40\.0 has no VitPose: update it with `python -m pip"):
        build_estimator(*tiny.files(folders[1]))
