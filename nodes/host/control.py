"""CONTROL_NET objects: what the host's samplers call at every step, whatever network is behind them.

One object rides on the conds of both guidance halves. The host loads `get_models()` with the model, crops areas,
batches conds, calls `pre_run` once or twice, `get_control` at every step, and `cleanup` unless something failed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.controlnet
import comfy.model_management
import torch
from torch import Tensor

from ...controlnet_core.dosing.clock import Moment
from ...controlnet_core.dosing.piece import Piece, parts
from ...controlnet_core.dosing.strength import ControlScales, Strength
from ...controlnet_core.dosing.window import Window
from ...controlnet_core.keys import times
from ...controlnet_core.networks import injection
from ...controlnet_core.networks.residuals import Residuals
from ...controlnet_core.networks.unet import UNetConfig
from . import run
from .resize import Resize, resize

RECORD = "zeroconv_record"
"""Key in `transformer_options`: the record that RecordControl makes of what each control adds."""


class ControlError(ValueError):
    """A control that does not fit the model or the graph it is used in."""


@dataclass(frozen=True)
class Call:
    """One call of the UNet, cut down to the samples that this control acts on, at strength `value`.

    `x` (B,4,H,W), `t` (B,) and `cond` hold conds of equal size one after the other, such as the halves of guidance:
    those numbered `halves` of the whole call, whose samples are `piece`. `options` are the host's for this call.
    """

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    halves: tuple[int, ...]
    piece: Piece
    options: dict[str, Any]
    value: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent; less than the run's where a prompt is limited to an area."""
        return self.x.shape[2], self.x.shape[3]


class Control(comfy.controlnet.ControlBase):
    """A control with a hint and a strength; what kind of control it is shows in `_residuals` alone."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.dosing = Strength()
        self.resize: Resize = "crop"
        self.latent_size: tuple[int, ...] | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._strength = Strength(0.0)
        self._off = True
        self._percent_to_sigma: Any = None
        self._model_config: UNetConfig | None = None
        self._masks: dict[tuple[int, int], Tensor] = {}

    # -- what nodes call -------------------------------------------------------------------------------------------

    def with_dosing(self, dosing: Strength, resize: Resize) -> Control:
        """A copy that rides with what the host's own nodes have no room for; value and window are theirs to set."""
        c = self.copy()
        c.dosing, c.resize = dosing, resize
        return c

    def copy(self) -> Control:
        """Another control of the same network with the same settings."""
        raise NotImplementedError

    def copy_to(self, c: Any) -> None:
        """The host's settings and ours; what a run has computed stays behind."""
        super().copy_to(c)
        c.dosing, c.resize = self.dosing, self.resize
        c.latent_size = self.latent_size

    def full_strength(self) -> Strength:
        """The strength that all settings describe, the host's and ours; raises for a window that cannot be meant."""
        window = Window(*self.timestep_percent_range, unit=self.dosing.window.unit)
        return replace(self.dosing, value=self.strength, window=window)

    @property
    def counts_steps(self) -> bool:
        """Whether it must be told the step of a call."""
        return self.full_strength().counts_steps

    def foreign_hooks(self) -> list[Any]:
        """Hooks that are not our own: what another loader's control acts through."""
        return super().get_extra_hooks()

    def get_extra_hooks(self) -> list[Any]:
        """The host's question for hooks; ours tell of the run where the control must know more than a call says."""
        return [*self.foreign_hooks(), *([run.hook()] if self.one_sided or self.counts_steps else [])]

    def check_fits(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel); raises where the control or its dose does not fit."""
        config = self._config_of(model)
        self.full_strength().scales(0.0, len(config.skip_channels), 8)
        return config

    # -- what the host calls ---------------------------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run. The host calls this once for each half, so it starts over and does nothing else."""
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)
        self._forget_run()
        self._original_hint()  # says at once when there is none
        self._strength = self.full_strength()
        self._model_config = self.check_fits(model)
        self._off = self._strength.off or not any(self._scales(1.0, (8, 8), None).weights)
        self._percent_to_sigma = percent_to_timestep_function

    def cleanup(self) -> None:
        """End a run."""
        super().cleanup()
        self._forget_run()

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Bytes of working memory: like the UNet's own at this latent, of which a control runs the first half."""
        if self.latent_size is not None:
            batch, height, width = self.latent_size[0], self.latent_size[-2], self.latent_size[-1]
        elif self.cond_hint_original is not None:
            batch = self.cond_hint_original.shape[0]
            height, width = (n // 8 for n in self.cond_hint_original.shape[-2:])
        else:
            batch, height, width = 1, 64, 64
        # The host reckons 0.01 MiB per latent pixel and byte for a UNet, and both guidance halves run at once.
        own = 2 * batch * height * width * comfy.model_management.dtype_size(dtype) * 0.005 * 1024**2
        return own + super().inference_memory_requirements(dtype)

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, transformer_options: dict[str, Any]
    ) -> injection.HostControl | None:
        """The residuals of this call, those of the controls before it included; `None` when nothing acts."""
        previous, before = None, self._before
        if before is not None:
            previous = before.get_control(x_noisy, t, cond, batched_number, transformer_options)
        call = self._call(x_noisy, t, cond, batched_number, transformer_options)
        return previous if call is None else self._act(call, previous)

    # -- one call --------------------------------------------------------------------------------------------------

    def _call(
        self, x: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, options: dict[str, Any]
    ) -> Call | None:
        """This call of the UNet as far as the control acts in it; `None` when it does not."""
        halves = self._halves(batched_number, options)
        value = self._value(options, t) if halves else 0.0
        if value == 0.0:
            return None
        size = x.shape[0] // batched_number
        window, frames = options.get("context_window"), None
        if window is not None and getattr(window, "dim", None) == 0 and len(window.index_list) == size:
            frames = tuple(window.index_list)
        piece = parts(x.shape[0], batched_number, halves, frames)
        cond = {
            key: piece.take(value) if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] else value
            for key, value in cond.items()
        }
        return Call(piece.take(x), piece.take(t), cond, halves, piece, options, value)

    def _value(self, options: dict[str, Any], sigma: Tensor) -> float:
        """The strength of this call, 0 when nothing acts."""
        if self._off or self._strength.steady:
            return 0.0 if self._off else self._strength.value
        return self._strength.at(self._moment(options, sigma))

    def _moment(self, options: dict[str, Any], sigma: Tensor) -> Moment:
        return run.moment(options, sigma, self._percent_to_sigma)

    @property
    def one_sided(self) -> bool:
        """Whether control acts on the conditional half of guidance alone."""
        return self.dosing.guidance != "both"

    def _halves(self, batched_number: int, options: dict[str, Any]) -> tuple[int, ...]:
        """The parts of the batch that control acts on."""
        numbers = options.get("cond_or_uncond", [0] * batched_number)
        # Without the wrapper that tells, the host's own meaning: list 0 is cond, list 1 uncond.
        negative = options.get(run.HALVES) or {1: True}
        return tuple(i for i, number in enumerate(numbers) if not (self.one_sided and negative.get(number, False)))

    def _act(self, call: Call, previous: injection.HostControl | None) -> injection.HostControl | None:
        """What the UNet is given in a call in which this control acts; `previous` are the controls before it."""
        assert self._model_config is not None
        shapes = self._model_config.residual_shapes(*call.size)
        _watch_sizes(call.options, self._model_config)
        scaled = self._scales(call.value, call.size, self._mask(call)).apply(self._residuals(call))
        residuals = scaled.mapped(lambda _, residual: call.piece.scatter(residual))
        if RECORD in call.options:
            call.options[RECORD].add(self.name, self._moment(call.options, call.t), residuals)
        if previous is not None:
            before = injection.from_host_control(previous, len(shapes) - 1)
            injection.check(before, shapes)
            injection.check(residuals, shapes)
            residuals = before + residuals
        return injection.as_host_control(residuals, shapes)

    def _scales(self, value: float, size: tuple[int, int], mask: Tensor | None) -> ControlScales:
        assert self._model_config is not None
        return self._strength.scales(value, len(self._model_config.skip_channels), size[0], mask)

    def _original_hint(self) -> Tensor:
        """The hint at its own size, (B,C,H,W)."""
        if self.cond_hint_original is None:
            raise ControlError(f"{self.name} has no hint: apply it with an image")
        return self.cond_hint_original

    def _hint(self, call: Call, multiple: int = 8) -> Tensor:
        """The hint at 8 times the latent's size, rounded up to `multiple`, at its own batch and on its own device."""
        height, width = (-(-8 * n // multiple) * multiple for n in call.size)
        return resize(self._original_hint(), height, width, self.resize)

    def _mask(self, call: Call) -> Tensor | None:
        """Where and on which pictures control acts, (B,1,8H,8W) or (B,1,1,1); `None` everywhere and on all."""
        mask, schedule, frames = self._strength.mask, self._strength.schedule, call.piece.frames
        if mask is not None:
            size = (call.size[0] * 8, call.size[1] * 8)
            if size not in self._masks:
                self._masks[size] = resize(mask, *size, self.resize, smooth=True).to(call.x)
            mask = call.piece.of_frames(self._masks[size])
        if schedule is None or not schedule.per_image:
            return mask
        pictures, last = len(frames) // len(call.halves), max(frames)
        windowed = "context_window" in call.options
        if last >= len(schedule.per_image) or (not windowed and len(schedule.per_image) != pictures):
            raise ControlError(
                f"{self.name}: the schedule's per_image has {len(schedule.per_image)} strengths, the batch "
                f"{f'at least {last + 1}' if windowed else pictures} pictures: write one for each"
            )
        strengths = call.piece.of_frames(call.x.new_tensor(schedule.per_image).reshape(-1, 1, 1, 1))
        return strengths if mask is None else mask * strengths

    @property
    def _before(self) -> Any:
        """The control before this one in its chain."""
        return self.previous_controlnet

    # -- what kinds of control differ in ---------------------------------------------------------------------------

    def _config_of(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel); ControlError where the network does not fit it."""
        raise NotImplementedError

    def _residuals(self, call: Call) -> Residuals:
        """The residuals of this call at strength 1."""
        raise NotImplementedError


def _watch_sizes(options: dict[str, Any], config: UNetConfig) -> None:
    """Let this call of the UNet raise where its blocks have other sizes than residuals: the host only logs that.

    Other nodes may shrink the features inside the UNet. The sizes are those of what the UNet is really given, which a
    tiled sampler may cut down.
    """
    patches, place = options.get("patches", {}), "input_block_patch_after_skip"
    if any(getattr(patch, "func", None) is _check_size for patch in patches.get(place, ())):
        return
    options["patches"] = {**patches, place: [partial(_check_size, config), *patches.get(place, ())]}


def _check_size(config: UNetConfig, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
    """The host's patch behind each encoder block: `h` as it came."""
    number = transformer_options["block"][1]
    expected = config.residual_shapes(*transformer_options["original_shape"][2:])[number]
    if tuple(h.shape[1:]) != expected:
        raise injection.InjectionError(
            f"encoder block {number} of the model gives {times(h.shape[1:])}, and control has {times(expected)} for "
            "it: another node changes the size inside the model (Deep Shrink does); take that node off, or the control"
        )
    return h
