"""A ComfyUI held in this process: call nodes as its executor does, sample, and record which networks ran."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import execution
import folder_paths
import nodes
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_context_windows, nodes_controlnet, nodes_custom_sampler
from graphs import STEPS, Control, Event, Run, Scene, latent, prompt
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH, control_state_dict, tiny_model, write_control
from torch import Tensor


def _nothing_hidden() -> dict[str, Any]:
    """The argument by which this host's executor takes the hidden inputs of a node: it was renamed on the way."""
    if "v3_data" in inspect.signature(execution.get_output_data).parameters:
        return {"v3_data": {"hidden_inputs": {}}}
    return {"hidden_inputs": {}}


class Host:
    """The running host; `folder` is where its control files lie."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder_paths.folder_names_and_paths["controlnet"] = ([str(folder)], folder_paths.supported_pt_extensions)
        folder_paths.set_temp_directory(str(folder.parent / "temp"))  # where nodes put the pictures that they show
        folder_paths.set_input_directory(str(folder.parent / "input"))  # where the pack puts its examples
        # The host's own main() makes its progress bar raise when the user cancels; so does this.
        comfy.utils.set_progress_bar_global_hook(
            lambda *_, **__: comfy.model_management.throw_exception_if_processing_interrupted()
        )
        self._events: list[Event] = []
        self._sigma: float | None = None
        self._sigmas: list[float] = []
        self._models: dict[str, Any] = {}
        self._controls: dict[tuple, Any] = {}
        self._runs: dict[Any, Run] = {}
        self._hooked: set[torch.nn.Module] = set()
        self._kept: list[Any] = []  # the host keeps what nodes made; without that it searches for leaks at every load

    # -- nodes ---------------------------------------------------------------------------------------------------

    @cached_property
    def ours(self) -> dict[str, type]:
        """The pack's nodes by id, from its entry point as the host takes them."""
        pack = sys.modules["zeroconv"]

        async def collect() -> list[type]:
            extension = pack.comfy_entrypoint()
            if inspect.isawaitable(extension):
                extension = await extension
            return await extension.get_node_list()

        return {node.GET_SCHEMA().node_id: node for node in asyncio.run(collect())}

    def call(self, node: str, **inputs: Any) -> tuple:
        """The outputs of the node with this id, run as the host runs it; a widget left out has its default."""
        modules = (nodes_custom_sampler, nodes_controlnet, nodes_context_windows)
        extras = (getattr(module, node) for module in modules if hasattr(module, node))
        kind = next(extras, None) or nodes.NODE_CLASS_MAPPINGS.get(node) or self.ours[node]
        values: dict[str, Any] = {}
        declared = kind.INPUT_TYPES()
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if name in inputs:
                values[name] = inputs[name]
            elif "default" in options:
                values[name] = options["default"]
            elif isinstance(spec[0], list) or spec[0] == "COMBO":
                values[name] = (spec[0] if isinstance(spec[0], list) else options["options"])[0]
        unknown = set(inputs) - set(values)
        assert not unknown, f"{node} has no input {sorted(unknown)}; it has {sorted(declared.get('required', {}))}"
        with torch.inference_mode():
            output, *_ = asyncio.run(
                execution.get_output_data(
                    "prompt", "1", kind(), {name: [value] for name, value in values.items()}, **_nothing_hidden()
                )
            )
        return tuple(slot[0] for slot in output)

    def windows(self, model: Any, length: int, overlap: int, **options: Any) -> Any:
        """A clone of `model` that samples in context windows; what the host's node has besides keeps its default."""
        schedule = {"context_schedule": "standard_static", "fuse_method": "pyramid"}
        given = {"context_length": length, "context_overlap": overlap, **schedule, **options}
        return self.call("ContextWindowsManualNode", model=model, **given)[0]

    # -- models and controls -------------------------------------------------------------------------------------

    def model(self, family: str) -> Any:
        """The tiny model of `family`: one object for all tests, as a cached loader node would hand out."""
        if family not in self._models:
            self._models[family] = tiny_model(family)
        return self._models[family]

    def another_model(self, family: str) -> Any:
        """A second model of `family` with other weights."""
        key = f"another {family}"
        if key not in self._models:
            self._models[key] = tiny_model(family, seed=12)
        return self._models[key]

    def scene(self, family: str = "sd15") -> Scene:
        """The tiny model with a positive and a negative prompt."""
        return Scene(self.model(family), prompt(1), prompt(2))

    def load(self, name: str, native: bool = False, **options: Any) -> Any:
        """The CONTROL_NET in file `name` (without suffix), from our loader or the host's; its forwards are recorded."""
        key = (name, native, *sorted(options.items()))
        if key not in self._controls:
            write_control(self.folder, f"{name}.safetensors")
            node = "ControlNetLoader" if native else "LoadControlNet"
            (control,) = self.call(node, control_net_name=f"{name}.safetensors", **options)
            self.record(control)
            self._controls[key] = control
        return self._controls[key]

    def load_made(self, name: str, make: Callable[[], dict[str, Tensor]], **options: Any) -> Any:
        """The CONTROL_NET that our loader makes of the tensors `make` gives, written once under this name."""
        key = (name, *sorted(options.items()))
        if key not in self._controls:
            if not (self.folder / f"{name}.safetensors").exists():
                self.write(name, make())
            (self._controls[key],) = self.call("LoadControlNet", control_net_name=f"{name}.safetensors", **options)
        return self._controls[key]

    def place(self, *models: Any) -> torch.device:
        """The device that the host computes on, with these of its models on it, whole, for who calls them himself."""
        with torch.inference_mode():  # as nodes run; else the weights become tensors that those cannot change
            comfy.model_management.load_models_gpu(list(models), force_full_load=True)
            for model in models:
                model.model.to(model.load_device)  # what --novram leaves behind even so
        return comfy.model_management.get_torch_device()

    def record(self, control: Any) -> None:
        """Record the forward passes of this CONTROL_NET: one "control" each, and "hint" when it encodes its hint."""
        net = control.get_models()[-1].model
        if net in self._hooked:
            return
        self._hooked.add(net)
        hooked = set()
        for name, module in net.named_modules():
            for what, ending in (("control", "middle_block_out.0"), ("hint", "input_hint_block.0")):
                if name.endswith(ending):
                    hooked.add(what)
                    module.register_forward_pre_hook(self._hook(what, id(net)))
        assert hooked == {"control", "hint"}, f"{type(net)} has no middle_block_out.0 and input_hint_block.0"

    def _hook(self, what: str, module: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple) -> None:
            self._events.append(Event(what, self._sigma, args[0].shape[0], module))

        return hook

    def state(self, name: str) -> dict[str, Tensor]:
        """The tensors of control file `name`."""
        write_control(self.folder, f"{name}.safetensors")
        return load_file(self.folder / f"{name}.safetensors")

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        """Write a control file of these tensors."""
        save_file(state, self.folder / f"{name}.safetensors")

    def write_wide_control(self, name: str) -> None:
        """Write a control file of twice the tiny models' width."""
        self.write(name, control_state_dict("sd15", seed=404, width=2 * WIDTH))

    # -- graphs --------------------------------------------------------------------------------------------------

    def native(self, scene: Scene, family: str, *controls: Control, own: bool = False) -> Scene:
        """The host's own graph: one ControlNetApplyAdvanced after the other; `own` takes our loader's CONTROL_NETs."""
        for control in controls:
            positive, negative = self.call(
                "ControlNetApplyAdvanced",
                positive=scene.positive,
                negative=scene.negative,
                control_net=self.load(f"{family}_{control.file}", native=not own),
                image=control.image,
                strength=control.strength,
                start_percent=control.start,
                end_percent=control.end,
            )
            scene = replace(scene, positive=positive, negative=negative)
        return scene

    def apply(self, way: str, scene: Scene, family: str, *controls: Control, foreign: bool = False) -> Scene:
        """The same graph with our nodes, one of `WAYS`; `foreign` takes the CONTROL_NETs from the host's loader."""
        to_prompt = way in ("ApplyControlToPrompt", "StackControlsToPrompt")
        stacked = way.startswith("StackControls")
        given = [self.inputs(control, family, foreign) for control in controls]
        if stacked:
            given = [{"stack": self.stack(family, *controls, foreign=foreign)}]
        for inputs in given:
            if to_prompt:
                positive, negative = self.call(
                    "ApplyControlToPrompt", positive=scene.positive, negative=scene.negative, **inputs
                )
                scene = replace(scene, positive=positive, negative=negative)
            else:
                (model,) = self.call("ApplyControl", model=scene.model, **inputs)
                scene = replace(scene, model=model)
        return scene

    def inputs(self, control: Control, family: str, foreign: bool = False) -> dict[str, Any]:
        """What our apply and stack nodes take for this control."""
        return {
            "control_net": self.load(f"{family}_{control.file}", native=foreign),
            "image": control.image,
            "strength": control.strength,
            "start": control.start,
            "end": control.end,
            **control.options,
        }

    def stack(self, family: str, *controls: Control, foreign: bool = False) -> list:
        """A CONTROL_NET_STACK of these controls, made by one StackControls after the other."""
        chained: dict[str, Any] = {}
        for control in controls:
            (made,) = self.call("StackControls", **chained, **self.inputs(control, family, foreign))
            chained = {"stack": made}
        return chained["stack"]

    # -- sampling ------------------------------------------------------------------------------------------------

    def watched(self, model: Any, before_unet: Callable[[int], None] | None = None) -> Any:
        """A clone of `model` that records its forward passes; `before_unet` hears the number of each, from 1."""
        calls = 0

        def note_sigma(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._sigma = float(args[3].flatten()[0])
            self._sigmas = args[4]["transformer_options"]["sample_sigmas"].tolist()
            return executor(*args, **kwargs)

        def note_unet(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if before_unet is not None:
                before_unet(calls)
            self._events.append(Event("unet", self._sigma, x.shape[0]))
            return executor(x, *args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", note_sigma)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", note_unet)
        self._kept.append(clone)
        return clone

    def _recorded(self, sample: Callable[[], Tensor]) -> Run:
        self.forget()
        result = sample()
        assert torch.isfinite(result).all()
        return Run(result, self._sigmas, self._events)

    def forget(self) -> None:
        """Start a new record, for samplings that may end before they begin."""
        self._events, self._sigma, self._sigmas = [], None, []

    @property
    def unet_calls(self) -> int:
        """UNet calls since the last sampling began, for samplings that ended in an exception."""
        return sum(event.what == "unet" for event in self._events)

    def sample(
        self, scene: Scene, node: str = "KSampler", before_unet: Callable[[int], None] | None = None, **inputs: Any
    ) -> Run:
        """Sample with KSampler or KSamplerAdvanced."""
        given: dict[str, Any] = {
            "latent_image": latent(),
            "steps": STEPS,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "noise_seed" if node == "KSamplerAdvanced" else "seed": 5,
            **inputs,
        }
        given |= {"positive": scene.positive, "negative": scene.negative}
        model = self.watched(scene.model, before_unet)
        return self._recorded(lambda: self.call(node, model=model, **given)[0]["samples"])

    def sample_guided(
        self,
        model: Any,
        guider: str,
        steps: int = STEPS,
        latent_image: dict[str, Tensor] | None = None,
        sampler: Any = None,
        sigmas: Tensor | None = None,
        **inputs: Any,
    ) -> Run:
        """Sample with SamplerCustomAdvanced and the guider node of this id; euler over normal sigmas unless given."""
        model = self.watched(model)
        custom = {
            "guider": self.call(guider, model=model, **inputs)[0],
            "noise": self.call("RandomNoise", noise_seed=5)[0],
            "sampler": sampler or self.call("KSamplerSelect", sampler_name="euler")[0],
            "sigmas": self.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0]
            if sigmas is None
            else sigmas,
            "latent_image": latent_image or latent(),
        }
        return self._recorded(lambda: self.call("SamplerCustomAdvanced", **custom)[0]["samples"])

    def once(self, key: Any, run: Callable[[], Run]) -> Run:
        """The run under this key, sampled only the first time it is asked for."""
        if key not in self._runs:
            self._runs[key] = run()
        return self._runs[key]
