"""CONTROL_NETs whose networks are our core's, one class for each kind."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules import attention
from torch import Tensor

from ...controlnet_core.files.loading import LoadedControl
from ...controlnet_core.networks.control_lora import ControlLora
from ...controlnet_core.networks.controlnet import ControlNet
from ...controlnet_core.networks.lite import ControlNetLite
from ...controlnet_core.networks.network import ControlNetwork
from ...controlnet_core.networks.residuals import Residuals
from ...controlnet_core.networks.t2i_adapter import T2IAdapter
from ...controlnet_core.networks.unet import UNetConfig
from ...controlnet_core.networks.union import TYPES, UnionControlNet
from . import graphs
from .call import Call, Hint, repeats
from .control import RECORD, Control, ControlError
from .models import on_device, unet_config
from .resize import resize

ENCODED_PIXELS = 2 * 512 * 512
"""Pixels of hints that are encoded at once: at full size an encoder's features are many times what it gives."""


TEXTS = 8
"""Texts of a run that stay on the device for its next steps: one or two a prompt, more where prompts have areas."""


Inputs = tuple[Tensor | None, ...]
"""What a network's forward takes, on its device and in the dtype that it computes in."""


class NetworkControl(Control):
    """A control with a network of ours; its weights and their place in memory are shared by all copies."""

    network: ControlNetwork

    def __init__(self, name: str, loaded: LoadedControl, patcher: Any, compute_dtype: torch.dtype):
        super().__init__(name)
        self.loaded = loaded
        self.network = loaded.control
        self.patcher = patcher
        self.compute_dtype = compute_dtype

    def copy(self) -> NetworkControl:
        """Another control of the same network with the same settings."""
        c = type(self)(self.name, self.loaded, self.patcher, self.compute_dtype)
        self.copy_to(c)
        return c

    @property
    def hint_channels(self) -> int:
        """Channels of the hint that it takes; 1 is the mean of a picture's."""
        return self.network.hint_channels

    def get_models(self) -> list[Any]:
        """The host loads these with the model."""
        return [*super().get_models(), self.patcher]

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> NetworkControl:
        """Another control with the same settings whose network is on another device."""
        c = type(self)(self.name, *on_device(self.loaded, self.patcher, load_device), self.compute_dtype)
        self.copy_to(c)
        if autoregister:
            self.multigpu_clones[load_device] = c  # type: ignore[attr-defined] - newer hosts have it
        return c

    def _config_of(self, model: Any) -> UNetConfig:
        config = unet_config(model, self.name, self.network.family)
        mismatch = self.network.mismatch(config)
        if mismatch:
            raise ControlError(f"{self.name}: {mismatch}")
        if self.extra_args.get("control_type") and not isinstance(self, UnionControl):
            raise ControlError(
                f"{self.name} is a {self.network.kind}, which has one type only: take SetUnionControlNetType off"
            )
        return config

    def _encode(self, call: Call, multiple: int = 8) -> tuple[Hint, Any]:
        """The hint of this call and what the network makes of its rows, once per run, at 8 times the latent's size.

        That size is rounded up to `multiple`. Large batches are encoded in pieces, so that they need little memory.
        """
        hint = self._hint(call)
        height, width = (-(-8 * n // multiple) * multiple for n in call.size)

        def encode() -> Any:
            at_once = max(1, ENCODED_PIXELS // (height * width))
            parts = [self._encode_rows(call, rows, height, width) for rows in hint.rows.split(at_once)]
            return parts[0] if len(parts) == 1 else self._joined(parts)

        return hint, self._kept.get((hint.key, multiple), encode, hint.alive)

    def _encode_rows(self, call: Call, rows: Tensor, height: int, width: int) -> Any:
        rows = resize(rows, height, width, self.resize).to(device=call.x.device, dtype=self.compute_dtype)
        channels = self.network.hint_channels
        if channels == 1:
            rows = rows.mean(dim=1, keepdim=True)
        if rows.shape[1] != channels:
            raise ControlError(f"{self.name} takes a hint of {channels} channels, found {rows.shape[1]}")
        return self.network.encode_hint(rows)

    def _joined(self, parts: list[Any]) -> Any:
        """What several pieces of a batch were encoded to, as one."""
        return torch.cat(parts)


class ControlNetControl(NetworkControl):
    """A ControlNet. With the host's `global_average_pooling`, one for shuffle: pooled, on the prompt's half alone."""

    network: ControlNet | ControlNetLite

    def _forget_run(self) -> None:
        super()._forget_run()
        self._sampling: Any = None
        self._weights: graphs.Weights | None = None
        self._runs_beside: graphs.Beside | None = None
        self._texts: list[tuple[Tensor, Tensor]] = []

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run."""
        super().pre_run(model, percent_to_timestep_function)
        self._sampling = model.model_sampling
        graphs.RUNNER.begin()
        self._weights = graphs.Weights(self.patcher, self.network)

    @contextmanager
    def _beside(self, device: torch.device, options: dict[str, Any]) -> Iterator[graphs.Beside | None]:
        if self._weights is None or RECORD in options:  # a record is read while the run goes on
            yield None
            return
        with graphs.RUNNER.beside(self.name, self._weights, device, options) as beside:
            self._runs_beside = beside
            try:
                yield beside
            finally:
                self._runs_beside = None

    @property
    def one_sided(self) -> bool:
        """Whether control acts on the conditional half of guidance alone."""
        return self.global_average_pooling or super().one_sided

    def _residuals(self, call: Call) -> Residuals:
        inputs, samples, beside = self._inputs(call), len(call.x), self._runs_beside
        run = partial(self._run, samples)
        return run(*inputs) if beside is None else beside.run(run, inputs, (*self._baked, samples))

    @property
    def _baked(self) -> tuple[Hashable, ...]:
        """What a pass depends on besides its inputs and weights: attention is a name that other nodes set anew."""
        return type(self), self.global_average_pooling, attention.optimized_attention

    def _run(self, samples: int, *inputs: Tensor | None) -> Residuals:
        """One pass of the network, from its inputs to the residuals at strength 1 of so many samples.

        It depends on these alone. Inputs of fewer samples count as repeated, and so do residuals.
        """
        residuals = self.network(*inputs).repeated(samples)
        return residuals.pooled() if self.global_average_pooling else residuals

    def _inputs(self, call: Call) -> Inputs:
        """What the network's forward takes; what is the same in both halves of guidance, once."""
        place: dict[str, Any] = {"device": call.x.device, "dtype": self.compute_dtype}
        x, t, once = call.x[: call.distinct], call.t[: call.distinct], call.distinct
        guided_hint = self._guided_hint(call)
        texts = [call.cond.get("crossattn_controlnet", call.cond["c_crossattn"]), call.cond.get("y")]
        # The same prompt for both halves: the same residuals.
        if len(guided_hint) <= once and all(text is None or repeats(text, once) for text in texts):
            texts = [None if text is None else text[:once] for text in texts]
        context, y = (None if text is None else self._moved(text, place) for text in texts)
        return (
            self._sampling.calculate_input(t, x).to(**place),
            self._sampling.timestep(t).to(x.device, torch.float32),  # bf16 has no number for most timesteps
            context,
            guided_hint,
            y,
        )

    def _moved(self, text: Tensor, place: dict[str, Any]) -> Tensor:
        """`text` where the network is; the host gives it on the CPU at every call, and what stays is moved once."""
        if text.device == place["device"]:
            return text.to(**place)
        for given, moved in self._texts:
            if given.device == text.device and torch.equal(given, text):
                return moved
        self._texts = [(text.clone(), text.to(**place)), *self._texts[: TEXTS - 1]]
        return self._texts[0][1]

    def _guided_hint(self, call: Call) -> Tensor:
        """The guided hint of each of the samples that differ, or a single one for all of them."""
        return self._of_samples(call, *self._encode(call))

    def _of_samples(self, call: Call, hint: Hint, made: Tensor) -> Tensor:
        """What was made of a hint, for each of the samples; for those that differ, where it goes by frames alone."""
        found = hint.of(call.piece, made)
        return found if hint.count is None else found[: call.distinct]


class ControlLoraControl(ControlNetControl):
    """A Control-LoRA: it borrows the layers of the model that it is applied to, in that model's dtype."""

    network: ControlLora

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run on `model`."""
        super().pre_run(model, percent_to_timestep_function)
        self.network.bind(model.diffusion_model)
        self.compute_dtype = model.manual_cast_dtype or model.get_dtype()
        graphs.RUNNER.drop(self.network)  # they read what was bound before
        self._weights = graphs.Weights(self.patcher, self.network, model)

    def cleanup(self) -> None:
        """End a run; the model is let go, whatever is wrong with what was computed."""
        try:
            super().cleanup()
        finally:
            self.network.unbind()
            graphs.RUNNER.drop(self.network)


class UnionControl(ControlNetControl):
    """A ControlNet Union; what its hint is, comes from `control_type` or the host's SetUnionControlNetType.

    With `joins` it is fused in one pass with the one before it in its chain, which shares its network: each with its
    own hint, type, strength, window and schedule (xinsir6/ControlNetPlus). The rest of the dose is the same for both.
    """

    network: UnionControlNet
    joins = False

    @property
    def type_number(self) -> int | None:
        """Index into the core's `TYPES`; `None` for a plain hint, which is never fused."""
        types = self.extra_args.get("control_type") or [None]
        return types[0]

    def fuses_with(self, other: Control) -> bool:
        """Whether `other` may share a pass with this one."""
        return (
            isinstance(other, UnionControl)
            and other.network is self.network
            and other.type_number is not None
            and self.type_number is not None
            and other.dosing.guidance == self.dosing.guidance
            and other.dosing.reuse == self.dosing.reuse
            and _same(other.dosing.mask, self.dosing.mask)
            and other.dosing.block_weights == self.dosing.block_weights
            and not any(c.dosing.schedule and c.dosing.schedule.per_image for c in (self, other))
        )

    def copy_to(self, c: Any) -> None:
        """The host's settings and ours; what a run has computed stays behind."""
        super().copy_to(c)
        c.joins = self.joins

    def _forget_run(self) -> None:
        super()._forget_run()
        self._acting: list[tuple[UnionControl, float]] = []

    @property
    def _group(self) -> list[UnionControl]:
        """The controls that share this one's pass, itself the last."""
        before = self.previous_controlnet
        return [*before._group, self] if self.joins and isinstance(before, UnionControl) else [self]

    @property
    def _before(self) -> Any:
        return self._group[0].previous_controlnet

    def _value(self, options: dict[str, Any], sigma: Tensor) -> float:
        values = [(control, ControlNetControl._value(control, options, sigma)) for control in self._group]
        self._acting = [(control, value) for control, value in values if value != 0.0]
        # Of several, each strength goes into the fuse; of one, it multiplies the residuals.
        return 1.0 if len(self._acting) > 1 else sum(value for _, value in self._acting)

    def _numbers(self, call: Call, count: int) -> tuple[int, ...]:
        # In the authors' network the pictures of a batch see each other: a window must not change what they see.
        return super()._numbers(call, count) if self.type_number is None else tuple(range(count))

    def _made_of(self, call: Call) -> tuple[Hashable, Any]:
        # Fused, strengths are no factors of the residuals.
        strengths = [value for _, value in self._acting] if len(self._acting) > 1 else []
        parts = [ControlNetControl._made_of(control, call) for control, _ in self._acting]
        return (tuple(key for key, _ in parts), tuple(strengths), self._types), [alive for _, alive in parts]

    @property
    def _types(self) -> tuple[int, ...]:
        """The types of the hints that act now."""
        return tuple(control.type_number for control, _ in self._acting if control.type_number is not None)

    def _inputs(self, call: Call) -> Inputs:
        x, *inputs = super()._inputs(call)
        assert x is not None
        types = self._types
        key = ("types", types, x.device, x.dtype)
        return (x, *inputs, self._kept.get(key, lambda: self.network.embed_types(types, x)))

    def _guided_hint(self, call: Call) -> Tensor:
        """The hints of those that act now, fused; kept as long as nothing in it changes."""
        types = self._types
        hints, features = zip(*(control._encode(call) for control, _ in self._acting), strict=True)
        if len({len(feature) for feature in features} - {1}) > 1:
            raise ControlError(
                f"{self.name}: hints that are fused come for as many frames or for one, found "
                f"{', '.join(str(len(feature)) for feature in features)}: give each the same number"
            )
        largest = max(range(len(features)), key=lambda i: len(features[i]))
        if not types:
            return self._of_samples(call, hints[largest], features[largest])
        strengths = [value for _, value in self._acting]
        key = (tuple(id(feature) for feature in features), tuple(strengths))
        fused = self._kept.get(key, lambda: self.network.fuse(features, types, strengths), features)
        return self._of_samples(call, hints[largest], fused)


class AdapterControl(NetworkControl):
    """A T2I-Adapter: its residuals do not depend on time, and are computed once per run and size."""

    network: T2IAdapter

    def _joined(self, parts: list[Residuals]) -> Residuals:
        return Residuals.cat(parts)

    @property
    def _reuses(self) -> bool:
        return False  # it computes nothing again as it is

    @property
    def _keeps(self) -> bool:
        return True

    def _residuals(self, call: Call) -> Residuals:
        hint, encoded = self._encode(call, self.network.hint_multiple)
        # One hint for all samples: its residuals broadcast over them.
        return encoded.mapped(lambda _, residual: hint.of(call.piece, residual))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def set_control_type(control: NetworkControl, control_type: str) -> None:
    """Tell a control what its hint is: "auto", "shuffle", or one of the Union's types; raises where that means nothing.

    A file that SaveControlNet wrote says so itself, and one whose name ends with shuffle is one, as the host takes it:
    its weights look like any other's.
    """
    union = isinstance(control, UnionControl)
    if control_type in TYPES and union:
        number = TYPES.index(control_type)
        if number >= control.network.n_types:
            raise ControlError(
                f"{control.name} is a ControlNet Union of {control.network.n_types} types, {control_type!r} is number "
                f"{number + 1}: use a ProMax Union, which has 8"
            )
        control.set_extra_arg("control_type", [number])
    elif control_type in TYPES:
        raise ControlError(
            f"{control.name} is a {control.network.kind}, which has one type only, found control_type "
            f"{control_type!r}: choose auto"
        )
    elif control_type == "shuffle" and type(control) is not ControlNetControl:
        raise ControlError(f"{control.name} is a {control.network.kind}, which has no shuffle: choose auto")
    elif type(control) is ControlNetControl:
        said = control.loaded.metadata.get("control_type")
        stem = control.name.rpartition(".")[0].removesuffix("_fp16")
        control.global_average_pooling = "shuffle" in (control_type, said) or stem.endswith("_shuffle")
