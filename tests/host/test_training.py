"""TrainControlNet: the core's own training on the host's objects, and its control as a file that the host lists."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Scene, latent, picture, prompt
from safetensors.torch import load_file
from torch import Tensor

from zeroconv.annotators.compare import compare
from zeroconv.controlnet_core.data.dataset import Dataset
from zeroconv.controlnet_core.diffusion import alphas_cumprod
from zeroconv.controlnet_core.training import checkpoint, loop, memory
from zeroconv.controlnet_core.training.controlled_unet import ControlledUNet
from zeroconv.controlnet_core.training.options import TrainingOptions

from .small_training import (
    OPTIONS,
    RARER,
    SIZE,
    Run,
    assert_bits,
    cached,
    cancel_after,
    dataset,
    encoders,
    losses,
    model,
    output,
    run,
    small_model,
    trained_by_the_core,
    weights_of,
)

if TYPE_CHECKING:
    from hosting import Host

__all__ = ["dataset", "encoders", "model", "output", "run"]  # fixtures: pytest finds them here

KEY = "output_blocks.11.0.in_layers.2.weight"


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_the_node_trains_as_the_core_does(run: Run, model: Any, dataset: Dataset, output: Path, tmp_path: Path):
    before = weights_of(model)
    _, plot, samples, _ = run()
    assert losses(output / "mine") == trained_by_the_core(model, before, dataset, tmp_path / "core")
    assert len(losses(output / "mine")) == 4
    assert_bits(*(load_file(folder / "control.safetensors") for folder in (output / "mine", tmp_path / "core")))
    assert_bits(weights_of(model), before)
    assert plot.shape[0] == samples.shape[0] == 1
    assert plot.shape[3] == samples.shape[3] == 3
    assert samples.shape[1] > 2 * SIZE  # two rows
    assert samples.shape[2] > 4 * SIZE  # hint, picture, sample before training, sample now
    assert 0 <= samples.min() < 0.3 < 0.7 < samples.max() <= 1
    kept = json.loads((output / "mine" / "options.json").read_text(encoding="utf-8"))
    assert kept == {**OPTIONS.as_dict(), "recompute": "off", "fidelity": "structure"}  # auto is off on a CPU


def test_loras_on_the_model_are_trained_on(run: Run, model: Any, dataset: Dataset, output: Path, tmp_path: Path):
    import comfy.model_management

    plain = weights_of(model)
    patch = torch.full_like(plain[KEY], 0.1)
    patched = model.clone()
    assert patched.add_patches({f"diffusion_model.{KEY}": ("diff", (patch,))}, 0.5)
    comfy.model_management.load_models_gpu([patched])
    run(model=patched, steps=2)
    assert_bits(weights_of(model), plain)
    merged = {**plain, KEY: plain[KEY] + 0.05}
    assert losses(output / "mine") == trained_by_the_core(model, merged, dataset, tmp_path / "core", steps=2)
    assert losses(output / "mine") != trained_by_the_core(model, plain, dataset, tmp_path / "plain", steps=2)


def test_what_a_model_predicts_is_read_from_it(run: Run, dataset: Dataset, output: Path, tmp_path: Path):
    velocity = small_model("sd21")
    run(model=velocity, steps=2)
    expected = trained_by_the_core(velocity, weights_of(velocity), dataset, tmp_path / "v", steps=2, prediction="v")
    assert losses(output / "mine") == expected
    assert json.loads((output / "mine" / "options.json").read_text(encoding="utf-8"))["prediction"] == "v"


@pytest.mark.parametrize(
    ("widgets", "kind"), [({"kind": "control_lora"}, "Control-LoRA"), ({"kind": "lite"}, "ControlNet-lite")]
)
def test_other_kinds(run: Run, widgets: dict[str, Any], kind: str):
    control, *_ = run(steps=2, precision="bf16", gradient_checkpointing=True, sample_every=0, **widgets)
    assert control.loaded.control.kind == kind


def test_an_unlocked_decoder_is_a_model_for_load_diffusion_model(
    run: Run, host: Host, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import folder_paths

    folders = [str(tmp_path / "unet"), str(tmp_path / "diffusion_models")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (folders, {".safetensors"}))
    run(steps=2, sample_every=0, options={**RARER, "unlock_decoder": True, "decoder_learning_rate": 1e-3})
    (name,) = folder_paths.get_filename_list("diffusion_models")
    assert Path(name) == Path("zeroconv/mine.safetensors")
    assert (Path(folders[1]) / name).is_file()
    written, base = load_file(Path(folders[1]) / name), weights_of(model)
    assert written.keys() == {f"model.diffusion_model.{key}" for key in base}
    moved = {key for key in base if not torch.equal(written[f"model.diffusion_model.{key}"], base[key])}
    assert moved
    assert all(key.startswith(("output_blocks.", "out.")) for key in moved)


# -- its control -------------------------------------------------------------------------------------------------------


def test_the_control_is_the_file_that_the_host_lists(run: Run, host: Host, model: Any, output: Path):
    import folder_paths

    control, _, _, name = run()
    assert name in folder_paths.get_filename_list("controlnet")
    assert Path(name) == Path("zeroconv/mine.safetensors")
    file = load_file(host.folder / name)
    assert_bits(file, load_file(output / "mine" / "control.safetensors"))
    assert_bits({key: t.cpu() for key, t in control.loaded.control.state_dict().items()}, file)
    (loaded,) = host.call("LoadControlNet", control_net_name=name)
    assert loaded.loaded is control.loaded
    latents = []
    for net in (control, None):
        applied = model if net is None else host.call("ApplyControl", model=model, control_net=net, image=picture(1))[0]
        latents.append(host.sample(Scene(applied, prompt(1), prompt(2)), latent_image=latent()).latent)
    assert (latents[0] - latents[1]).abs().max() > 1e-4


def test_a_run_replaces_its_own_file_and_no_other(run: Run, host: Host):
    file = host.folder / "zeroconv" / "mine.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"the user's")
    *_, name = run(steps=1, sample_every=0)
    assert Path(name) == Path("zeroconv/mine_2.safetensors")
    ours = file.with_name("mine_2.safetensors")
    first = ours.read_bytes()
    *_, name = run(steps=2, sample_every=0)
    assert Path(name).name == "mine_2.safetensors"
    assert ours.read_bytes() != first
    ours.write_bytes(b"the user's now")
    *_, name = run(steps=3, sample_every=0)
    assert Path(name).name == "mine_3.safetensors"
    assert file.read_bytes() == b"the user's"
    assert ours.read_bytes() == b"the user's now"
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "mine.safetensors", "mine_2.safetensors", "mine_3.safetensors"
    ]  # fmt: skip


def test_a_file_that_is_in_use_and_cannot_be_replaced_stays(run: Run, host: Host, monkeypatch: pytest.MonkeyPatch):
    run(steps=1, sample_every=0)
    file = host.folder / "zeroconv" / "mine.safetensors"
    before, replace_it = file.read_bytes(), Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if target == file:  # as Windows answers while its tensors are mapped
            raise PermissionError(13, "used by another process", str(target))
        return replace_it(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    *_, name = run(steps=2, sample_every=0)
    assert Path(name) == Path("zeroconv/mine_2.safetensors")
    assert file.read_bytes() == before
    assert file.with_name("mine_2.safetensors").read_bytes() != before


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_cancel_keeps_everything_and_the_next_queue_goes_on(
    run: Run, model: Any, dataset: Dataset, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import comfy.model_management

    def controlled_unets() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if type(thing) is ControlledUNet}

    before, others = weights_of(model), controlled_unets()
    with monkeypatch.context() as patch:
        cancel_after(patch, 3)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(steps=6)
    assert [path.name for path in checkpoint.files(output / "mine" / "checkpoints")] == ["step-00000003.safetensors"]
    gc.collect()
    assert controlled_unets() <= others
    assert_bits(weights_of(model), before)
    assert not (output / "mine" / "control.safetensors").exists()
    _, _, samples, _ = run(steps=6)
    assert losses(output / "mine") == trained_by_the_core(model, before, dataset, tmp_path / "core", steps=6)
    assert_bits(*(load_file(folder / "control.safetensors") for folder in (output / "mine", tmp_path / "core")))
    assert samples.shape[2] > 4 * SIZE  # the sample before training is still there


def test_cancel_inside_a_score_keeps_the_step_too(
    run: Run, encoders: dict[str, Any], output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import comfy.model_management

    from zeroconv.nodes.host import watching

    made = cached(tmp_path / "made", **encoders, hints="canny")
    scored: list[Any] = []

    def compared(*given: Any) -> Any:
        scored.append(given)
        if len(scored) > 2:  # both pictures of the measurement before training
            raise comfy.model_management.InterruptProcessingException
        return compare(*given)

    monkeypatch.setattr(watching, "compare", compared)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(dataset=made, fidelity="annotator")
    assert [path.name for path in checkpoint.files(output / "mine" / "checkpoints")] == ["step-00000002.safetensors"]


def test_after_cancel_its_control_is_listed_and_fewer_steps_give_it(
    run: Run, host: Host, output: Path, monkeypatch: pytest.MonkeyPatch
):
    import comfy.model_management
    import folder_paths

    from zeroconv.nodes.host import training

    said: list[str] = []
    monkeypatch.setattr(training, "say", lambda text, _: said.append(text))
    with monkeypatch.context() as patch:
        cancel_after(patch, 3)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(steps=6, options={**RARER, "ema": 0.9})
    file = host.folder / "zeroconv" / "mine.safetensors"
    interim = load_file(file)
    assert "zeroconv/mine.safetensors" in [
        Path(name).as_posix() for name in folder_paths.get_filename_list("controlnet")
    ]
    assert {tensor.dtype for tensor in interim.values()} == {torch.float16}
    (text,) = said
    assert text.startswith(
        f"stopped: {Path('zeroconv/mine.safetensors')} is the control so far. Queue again to train on"
    )
    (output / "mine" / "plot.png").unlink(missing_ok=True)
    before = losses(output / "mine")
    control, plot, samples, name = run(steps=2, options={**RARER, "ema": 0.9})
    assert losses(output / "mine") == before
    assert len(before) == 3
    assert Path(name) == Path("zeroconv/mine.safetensors")
    assert sorted(path.name for path in file.parent.iterdir()) == ["mine-best.safetensors", "mine.safetensors"]
    assert_bits({key: tensor.half() for key, tensor in load_file(file).items()}, interim)
    assert plot.shape[1] > 200
    assert samples.shape[1] > 2 * SIZE
    (again,) = host.call("LoadControlNet", control_net_name=name)
    assert again.loaded is control.loaded
    whole = file.read_bytes()
    with pytest.raises(Exception, match="this run began with seed 0, found 1"):
        run(steps=6, seed=1, options={**RARER, "ema": 0.9})
    assert file.read_bytes() == whole  # what is there is no less than what there is to hand out


def test_a_checkpoint_in_the_controlnet_folder_is_loaded_and_trained_on(run: Run, host: Host, output: Path):
    control, *_ = run(steps=2, sample_every=0, options={**RARER, "ema": 0.9})
    saved = output / "mine" / "checkpoints" / "step-00000002.safetensors"
    (host.folder / "zeroconv" / "resumed.safetensors").write_bytes(saved.read_bytes())
    (loaded,) = host.call("LoadControlNet", control_net_name="zeroconv/resumed.safetensors")
    assert_bits(loaded.loaded.control.state_dict(), control.loaded.control.state_dict())
    begun, *_ = run(name="next", steps=1, sample_every=0, learning_rate=0.0, control_net=loaded)
    assert_bits(begun.loaded.control.state_dict(), control.loaded.control.state_dict())


def test_a_control_lora_of_the_loader_is_trained_on_as_a_full_copy(run: Run, host: Host, model: Any):
    from zeroconv.nodes.host.weights import base_weights

    lora, *_ = run(steps=2, sample_every=0, kind="control_lora")
    full, *_ = run(name="full", steps=1, sample_every=0, learning_rate=0.0, control_net=lora)
    assert full.loaded.control.kind == "ControlNet"
    merged = lora.loaded.control.merged(base_weights(model))
    assert_bits({key: tensor.cpu() for key, tensor in full.loaded.control.state_dict().items()}, merged)
    with pytest.raises(
        Exception, match="a Control-LoRA cannot be trained on here: kind lite goes on with a ControlNet-l"
    ):
        run(name="lite", steps=1, control_net=lora, kind="lite")


def test_zeroconv_is_not_put_twice_into_a_name(run: Run, output: Path):
    *_, name = run(name="zeroconv/named", steps=1, sample_every=0)
    assert Path(name) == Path("zeroconv/named.safetensors")
    assert (output / "named" / "control.safetensors").is_file()
    (output / "zeroconv" / "earlier").mkdir(parents=True)  # as an earlier version of the pack began it
    run(name="zeroconv/earlier", steps=1, sample_every=0)
    assert (output / "zeroconv" / "earlier" / "control.safetensors").is_file()


def test_a_run_whose_options_were_half_written_goes_on(run: Run, output: Path):
    run(steps=1, sample_every=0)
    (output / "mine" / "options.json").write_text('{"steps": ', encoding="utf-8")  # as a full disk may leave it
    run(steps=2, sample_every=0)
    assert len(losses(output / "mine")) == 2
    assert json.loads((output / "mine" / "options.json").read_text(encoding="utf-8"))["steps"] == 2


def test_a_finished_run_is_given_as_it_is_and_goes_on_with_more_steps(
    run: Run, model: Any, dataset: Dataset, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, plot, samples, name = run()
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    def again(*_: Any) -> Iterator[Any]:
        raise AssertionError("it is trained again")
        yield  # as `loop.train`, a generator: calling it trains nothing yet

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", again)
        control, *same = run()
        assert torch.equal(same[0], plot)
        assert torch.equal(same[1], samples)
        assert same[2] == name
        assert control.name == name
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == written
        with pytest.raises(AssertionError, match="trained again"):
            run(steps=6)
        with pytest.raises(Exception, match="this run began with seed 0, found 1"):
            run(seed=1)
        with pytest.raises(Exception, match="this run is scored by fidelity structure, found annotator: give the same"):
            run(fidelity="annotator")
    run(steps=6)
    assert losses(output / "mine") == trained_by_the_core(model, weights_of(model), dataset, tmp_path / "a", steps=6)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_other_encoders_than_the_datasets_are_refused(run: Run, encoders: dict[str, Any], output: Path):
    class Clip:
        def tokenize(self, text: str) -> Any:
            return encoders["clip"].tokenize(text)

        def encode_from_tokens(self, tokens: Any, **options: Any) -> Any:
            context, pooled = encoders["clip"].encode_from_tokens(tokens, **options)
            return context.flip(-1), pooled

    class Vae:
        def encode(self, pictures: Tensor) -> Tensor:
            return encoders["vae"].encode(pictures).flip(1)

    for name, other in (("clip", Clip()), ("vae", Vae())):
        with pytest.raises(Exception, match=f"nine was made with another {name} than the one that is connected"):
            run(**{name: other})
    assert not output.exists()


@pytest.mark.parametrize("name", ["", "a/../../b", "con", "a:b"])
def test_names_that_are_no_files_are_refused(run: Run, name: str, output: Path):
    with pytest.raises(Exception, match="expected names with / between them"):
        run(name=name)
    assert not output.exists()


def test_models_that_are_trained_in_another_way_are_refused(run: Run, model: Any, output: Path):
    from comfy_extras import nodes_model_advanced as advanced

    from zeroconv.nodes.host.training import train

    (lcm,) = advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    (edm,) = advanced.ModelSamplingContinuousEDM().patch(model, "edm_playground_v2.5", 120.0, 0.002)
    for other, words in ((lcm, "ModelSamplingDiscreteDistilled, LCM"), (edm, "ModelSamplingContinuousEDM, EDM")):
        with pytest.raises(
            Exception, match=f"the model is sampled by {words}: training knows models of 1000 timesteps"
        ):
            run(model=other)
    flux = model.clone()
    flux.model = type("Flux", (), {"model_config": type("Flux", (), {"unet_config": {"image_model": "flux"}})()})()
    with pytest.raises(Exception, match="what is trained here is a ControlNet of the SD UNet, the model is Flux"):
        train(flux, None, None, None, "mine", OPTIONS)
    assert not output.exists()


def test_the_noise_schedule_is_the_models_own(host: Host, model: Any):
    from comfy_extras import nodes_model_advanced as advanced

    from zeroconv.nodes.host.training import noise_schedule

    alphas, prediction = noise_schedule(model)
    assert torch.equal(alphas, alphas_cumprod())
    assert prediction == "eps"
    (velocity,) = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)
    alphas, prediction = noise_schedule(velocity)
    assert prediction == "v"
    assert alphas.shape == (1000,)
    assert alphas[0].item() == pytest.approx(alphas_cumprod()[0].item(), rel=1e-4)
    assert alphas[-1].item() == pytest.approx(4.8973451890853435e-08, rel=1e-3)


def test_options_that_do_not_go_together_are_refused_where_they_are_made(host: Host):
    (options,) = host.call("TrainingOptions", timesteps="cubic")
    assert options["timesteps"] == "cubic"
    assert TrainingOptions(**options) == TrainingOptions(timesteps="cubic")
    with pytest.raises(Exception, match="middle_only is for little compute, unlock_decoder for much"):
        host.call("TrainingOptions", middle_only=True, unlock_decoder=True)


def test_on_a_card_that_is_too_small_it_trains_with_what_takes_least(
    run: Run, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(memory, "available", lambda device: 1e6)
    caplog.set_level("INFO")
    run(precision="bf16", steps=1, sample_every=0)
    assert (
        "GB of memory, 0.0 GB are free: it is trained with batch_size 1, accumulation 2, gradient_check" in caplog.text
    )
    kept = json.loads((output / "mine" / "options.json").read_text(encoding="utf-8"))
    assert (kept["optimizer_in_ram"], kept["base_weights"], kept["control_weights"]) == (True, "fp8", "bf16")
    assert len(losses(output / "mine")) == 1
    asked = len(caplog.records)
    run(precision="bf16", steps=1, sample_every=0)  # finished: nothing is counted
    assert not any("GB of memory" in record.message for record in caplog.records[asked:])
