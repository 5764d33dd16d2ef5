"""CONTROL_NET objects: what the host's samplers call at every step, whatever network is behind them.

One object rides on the conds of both guidance halves. The host loads `get_models()` with the model, crops areas,
batches conds, calls `pre_run` once or twice, `get_control` at every step, and `cleanup` unless something failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import comfy.controlnet
import comfy.model_management
import torch
from torch import Tensor

from ...controlnet_core.dosing import reuse
from ...controlnet_core.dosing.clock import Moment
from ...controlnet_core.dosing.piece import parts
from ...controlnet_core.dosing.strength import ControlScales, Strength
from ...controlnet_core.dosing.window import Window
from ...controlnet_core.errors import ZeroConvError, printable
from ...controlnet_core.networks import injection
from ...controlnet_core.networks.residuals import Residuals
from ...controlnet_core.networks.unet import SD15, UNetConfig
from . import given, run
from .call import Call, Hint, repeats, tiles, watch_sizes
from .graphs import Beside
from .kept import Kept
from .resize import Resize, at_positions, resize, with_positions
from .watch import Finite

RECORD = "zeroconv_record"
"""Key in `transformer_options`: the record that RecordControl makes of what each control adds."""


class ControlError(ZeroConvError):
    """A control that does not fit the model or the graph it is used in."""


class HintsAsGiven:
    """What stands for a network where others ask in which dtype a hint is wanted: as it is."""

    dtype = torch.float32


class Control(comfy.controlnet.ControlNet):
    """A control with a hint and a strength; what kind of control it is shows in `_residuals` alone.

    It is one of the host's ControlNets in name alone, without a network of the host's: TiledKSampler tells no others of
    their tiles, and asks them for a `device` and for the dtype of `control_model`.

    Others may cut the hint while a run goes on or before it: tiled samplers set `cond_hint` for each tile, upscalers
    replace `cond_hint_original` on a copy. A control with a mask therefore hands out a hint that says where its pixels
    lie, and its mask follows.
    """

    sub_idxs: list[int] | None
    full_latent_length: int | None
    context_length: int | None

    def __init__(self, name: str):
        super().__init__(None)
        self.name = printable(name)
        self.device = comfy.model_management.get_torch_device()
        self.control_model: Any = HintsAsGiven()
        self.dosing = Strength()
        self.resize: Resize = "crop"
        self.on_both_prompts = False
        self._uncut: Tensor | None = None
        self._channels = 0
        self._held, self._held_long = _held(SD15.residual_shapes(64, 64), 1), 0  # until it is known
        self._forget_run()

    def _forget_run(self) -> None:
        # AnimateDiff-Evolved asks for these and says there which frames a window has. Outside a run they are not there:
        # Advanced-ControlNet takes everything that has them for one of its own.
        for name in ("sub_idxs", "full_latent_length", "context_length"):
            self.__dict__.pop(name, None)
        self._strength = Strength(0.0)
        self._off = True
        self._percent_to_sigma: Any = None
        self._model_config: UNetConfig | None = None
        self._kept = Kept()
        self._reused = reuse.Reused(self.dosing.reuse)
        self._evaluated: Tensor | None = None
        self._asked: Counter[Hashable] = Counter()
        self._finite = Finite(self.name)

    # -- what nodes call -------------------------------------------------------------------------------------------

    def with_dosing(self, dosing: Strength, resize: Resize) -> Control:
        """A copy that rides with what the host's own nodes have no room for; value and window are theirs to set."""
        c = self.copy()
        c.dosing, c.resize = dosing, resize
        return c

    def copy(self) -> Control:
        """Another control of the same network with the same settings."""
        raise NotImplementedError

    def get_models(self) -> list[Any]:
        """What the host loads with the model: here that of the controls before."""
        return comfy.controlnet.ControlBase.get_models(self)

    def copy_to(self, c: Any) -> None:
        """The host's settings and ours; what a run has computed stays behind."""
        super().copy_to(c)
        c.dosing, c.resize = self.dosing, self.resize
        c.on_both_prompts = self.on_both_prompts
        c._uncut, c._channels = self._uncut, self._channels

    def set_cond_hint(self, cond_hint: Tensor, *args: Any, **kwargs: Any) -> Control:
        """Take a hint (B,C,H,W) and the host's settings, whose number differs between its versions."""
        cond_hint = given.hint(cond_hint, self.hint_channels, self.name)
        super().set_cond_hint(cond_hint, *args, **kwargs)
        self.cond_hint_original = self._uncut = cond_hint if self.dosing.mask is None else with_positions(cond_hint)
        self._channels = cond_hint.shape[1]
        return self

    @property
    def hint_channels(self) -> int:
        """Channels of the hint that it takes."""
        return 3

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
        """The host's question for hooks; ours tells of the run, and ends it when sampling ends in whatever way.

        Conds with other hooks are no more sampled in one call, so that it rides on both prompts, or where it must.
        """
        needed = self.on_both_prompts or self.one_sided or self.counts_steps
        return [*self.foreign_hooks(), *([run.hook()] if needed else [])]

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
        weights = self._strength.scales(1.0, len(self._model_config.skip_channels), 8).weights
        self._off = self._strength.off or not any(weights)
        self._percent_to_sigma = percent_to_timestep_function
        self.sub_idxs = self.full_latent_length = self.context_length = None

    def cleanup(self) -> None:
        """End a run; raises NotFiniteError where it gave residuals that nothing can be made of."""
        finite = self._finite
        try:
            super().cleanup()
        finally:
            self._forget_run()
        finite.check()

    def let_go(self) -> None:
        """End a run whose end is told by another error already."""
        self._finite = Finite(self.name)
        self.cleanup()

    def expect(self, model: Any, frames: int, height: int, width: int, whole: int) -> None:
        """Hear, before memory is reckoned, on which `model` and with how many latents one call of the UNet will be.

        `whole` are those of the run, where windows divide it.
        """
        shapes = self._config_of(model).residual_shapes(height, width)
        self._held = _held(shapes, frames)
        self._held_long = reuse.HELD * 2 * whole * sum(map(prod, shapes)) if self._reuses else 0

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Bytes beyond the UNet's own that a call holds; controls of a chain add into the same residuals.

        What is held from step to step is each control's own.
        """
        held_long = min(self._held_long * comfy.model_management.dtype_size(dtype), reuse.LIMIT)
        return held_long + max(self._memory(dtype), super().inference_memory_requirements(dtype))

    def _memory(self, dtype: torch.dtype) -> float:
        return self._held * comfy.model_management.dtype_size(dtype)

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, transformer_options: dict[str, Any]
    ) -> injection.HostControl | None:
        """The residuals of this call, those of the controls before it included; `None` when nothing acts."""
        previous, before = None, self._before
        if before is not None:
            previous = before.get_control(x_noisy, t, cond, batched_number, transformer_options)
        with self._beside(x_noisy.device, transformer_options) as beside:
            call = self._call(x_noisy, t, cond, batched_number, transformer_options)
            given = previous if call is None else self._act(call, previous)
            return given if beside is None or call is None or given is None else beside.waited(given)

    # -- one call --------------------------------------------------------------------------------------------------

    def _call(
        self, x: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, options: dict[str, Any]
    ) -> Call | None:
        """This call of the UNet as far as the control acts in it; `None` when it does not."""
        halves = self._halves(batched_number, options)
        value = self._value(options, t) if halves else 0.0
        if value == 0.0:
            return None
        copies = tiles(x, t, batched_number, options)
        piece = parts(x.shape[0], batched_number, halves, self._frames(options), copies)
        cond = {
            key: piece.take(value) if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] else value
            for key, value in cond.items()
        }
        x, t, whole = piece.take(x), piece.take(t), (len(x) // batched_number, *x.shape[1:])
        distinct = len(x) // len(halves)
        # The host gives one latent to all conds. Where nobody tells that this is what they have, not a part of it each,
        # looking is cheap on the CPU alone: a GPU would have to finish first.
        alike = options.get(run.LATENT) == whole or (repeats(x, distinct) and repeats(t, distinct))
        return Call(x, t, cond, halves, piece, distinct if copies == 1 and alike else len(x), options, value)

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

    def _frames(self, options: dict[str, Any]) -> tuple[int, ...] | None:
        """The numbers of the frames that a call is about, where it is about some of the run's alone."""
        told = getattr(self, "sub_idxs", None)
        if told is not None:
            return tuple(told)
        window = options.get("context_window")
        if window is None or getattr(window, "dim", None) != 0:
            return None
        # The window itself knows: newer hosts put an anchor frame before those that it lists.
        all_frames = torch.arange(max(window.index_list) + 2)
        return tuple(window.get_tensor(all_frames, dim=0).tolist())

    def _act(self, call: Call, previous: injection.HostControl | None) -> injection.HostControl | None:
        """What the UNet is given in a call in which this control acts; `previous` are the controls before it."""
        assert self._model_config is not None
        shapes = self._model_config.residual_shapes(*call.size)
        watch_sizes(call.options, self._model_config)
        residuals = self._weighed(call, self._scales(call)).mapped(lambda _, part: self._in_batch(call, part))
        self._finite.see(call.x, residuals)
        if RECORD in call.options:
            call.options[RECORD].add(self.name, self._moment(call.options, call.t), residuals)
        if previous is not None:
            before = injection.from_host_control(previous, len(shapes) - 1)
            injection.check(before, shapes)
            injection.check(residuals, shapes)
            residuals = before + residuals
        return injection.as_host_control(residuals, shapes)

    @property
    def _reuses(self) -> bool:
        """Whether residuals of earlier steps may tell those of a call."""
        return self.dosing.reuse > 0

    @property
    def _keeps(self) -> bool:
        """Whether residuals at strength 1 stay here for later calls."""
        return self._reuses

    def _weighed(self, call: Call, scales: ControlScales) -> Residuals:
        """The residuals of this call, which others may change as they like."""
        current = self._current(call)
        weighed = scales.apply(current)
        kept = {id(residual) for residual in (*current, *current.encoder)} if self._keeps else ()
        return weighed.mapped(lambda _, residual: residual.clone() if id(residual) in kept else residual)

    def _current(self, call: Call) -> Residuals:
        """The residuals of this call at strength 1: computed, or told from those of the steps before."""
        if not self._reuses:
            return self._residuals(call)
        # Calls of one evaluation of the model have the same sigmas, the very tensor. Where tiles of one size follow one
        # another in it and nothing else tells them apart, their number does.
        sigmas = call.options.get("sigmas", call.t)
        if self._evaluated is not sigmas:
            self._evaluated, self._asked = sigmas, Counter()
        prompts = call.options.get("uuids")
        made_of, alive = self._made_of(call)
        piece = (call.x.shape, call.piece, tuple(prompts[i] for i in call.halves) if prompts else (), made_of)
        self._asked[piece] += 1
        moment = self._moment(call.options, call.t)
        return self._reused.at((piece, self._asked[piece]), moment, lambda: self._residuals(call), alive)

    def _made_of(self, call: Call) -> tuple[Hashable, Any]:
        """What residuals depend on besides the latent and the moment, and the objects whose ids are in it."""
        hint = self._hint(call)
        return hint.key, hint.alive

    def _in_batch(self, call: Call, part: Tensor) -> Tensor:
        """The residual of the samples that control acts on, with zeros for the others of the call."""
        if call.piece.whole:
            return part
        key = ("zeros", part.shape[1:], part.dtype, part.device)
        zeros = self._kept.get(key, lambda: part.new_zeros(1, *part.shape[1:]))
        return call.piece.scatter(part, zeros.expand(call.piece.samples, *part.shape[1:]))

    def _scales(self, call: Call) -> ControlScales:
        """What multiplies the residuals of this call; but for its value it is made once a run for each piece."""
        assert self._model_config is not None
        skips, hint = len(self._model_config.skip_channels), None if self._strength.mask is None else self._hint(call)
        scales = self._kept.get(
            ("scales", call.size, call.piece, hint and hint.key),
            lambda: self._strength.scales(1.0, skips, call.size[0], self._mask(call)),
            hint and hint.alive,
        )
        return scales.times(call.value)

    def _original_hint(self) -> Tensor:
        """The hint at its own size, (B,C,H,W)."""
        if self.cond_hint_original is None:
            raise ControlError(f"{self.name} has no hint: apply it with an image")
        return self.cond_hint_original[:, : self._channels]

    def _hint(self, call: Call) -> Hint:
        """The hint of this call: what somebody has set for it, as the host's own controls take it, or the whole one."""
        self._original_hint()  # says when there is none
        given, size = self.cond_hint, tuple(8 * n for n in call.size)
        if given is not None and tuple(given.shape[2:]) != size:
            given = None  # as the host's own controls take it
        if given is not None and self.resize != "crop":
            raise ControlError(
                f"{self.name}: a tiled sampler cuts the hint, and that is exact for resize crop alone, found "
                f"{self.resize}: give the hint the picture's shape and choose crop"
            )
        if given is not None and len(given) == call.piece.samples:
            return Hint(given, self._channels, call.piece.rows, None, (id(given), call.piece.rows), given)
        source = self.cond_hint_original if given is None else given
        numbers = self._numbers(call, len(source))
        key = (call.size if given is None else id(given), numbers)
        return Hint(source, self._channels, numbers, len(source), key, given)

    def _numbers(self, call: Call, count: int) -> tuple[int, ...]:
        """Which of `count` entries of the hint are encoded for this call."""
        return call.piece.numbers(count)

    def _mask(self, call: Call) -> Tensor | None:
        """Where and on which pictures control acts, (B,1,8H,8W) or (B,1,1,1); `None` everywhere and on all."""
        mask, schedule = self._strength.mask, self._strength.schedule
        if mask is not None:
            mask = self._mask_of(call, mask)
        if schedule is None or not schedule.per_image:
            return mask
        frames, whole = call.piece.frames, self._frames(call.options) is None
        if max(frames) >= len(schedule.per_image) or (whole and len(schedule.per_image) != max(frames) + 1):
            raise ControlError(
                f"{self.name}: the schedule's per_image has {len(schedule.per_image)} strengths, the batch "
                f"{f'{max(frames) + 1}' if whole else f'at least {max(frames) + 1}'} pictures: write one for each"
            )
        strengths = call.piece.of_frames(call.x.new_tensor(schedule.per_image).reshape(-1, 1, 1, 1))
        return strengths if mask is None else mask * strengths

    def _mask_of(self, call: Call, mask: Tensor) -> Tensor:
        """The mask (B,1,8H,8W) for this call: cut like the hint, where somebody has cut that."""
        height, width = (8 * n for n in call.size)
        pictures = max(call.piece.frames) + 1
        if len(mask) > pictures and self._frames(call.options) is None:
            raise ControlError(
                f"{self.name}: the mask has {len(mask)} pictures, and {pictures} {'is' if pictures == 1 else 'are'} "
                "sampled: connect one for all or one for each"
            )
        hint = self._hint(call)
        if hint.source is self._uncut:
            made = self._kept.get(
                ("mask", call.size), lambda: resize(mask, height, width, self.resize, smooth=True).to(call.x)
            )
            return call.piece.of_frames(made)
        positions = hint.positions
        if positions is None or self._uncut is None:
            raise ControlError(
                f"{self.name}: another node has replaced the hint by one that does not say where it lies, so the mask "
                "cannot follow: take the mask off, or that node"
            )
        shape = self._uncut.shape[2:]
        if mask.shape[2] * shape[1] != mask.shape[3] * shape[0]:
            raise ControlError(
                f"{self.name}: a tiled sampler cuts the hint, {shape[1]}x{shape[0]}, and the mask, "
                f"{mask.shape[3]}x{mask.shape[2]}, has another shape: give both the picture's shape"
            )
        positions = resize(hint.of(call.piece, positions), height, width, self.resize)
        return at_positions(call.piece.of_frames(mask).to(call.x), positions)

    @property
    def _before(self) -> Any:
        """The control before this one in its chain."""
        return self.previous_controlnet

    # -- what kinds of control differ in ---------------------------------------------------------------------------

    def _config_of(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel); ControlError where the network does not fit it."""
        raise NotImplementedError

    def _beside(self, device: torch.device, options: dict[str, Any]) -> AbstractContextManager[Beside | None]:
        """Where a call runs: beside the UNet, which then waits for what it is given, or, with `None`, before it."""
        return nullcontext()

    def _residuals(self, call: Call) -> Residuals:
        """The residuals of this call at strength 1, computed."""
        raise NotImplementedError


def _held(shapes: Sequence[tuple[int, ...]], frames: int) -> int:
    """Numbers that a control leaves for the UNet: residuals for both halves of guidance, and guided hints.

    What it needs while it runs it gives back before the UNet takes as much or more.
    """
    return 2 * frames * sum(map(prod, shapes)) + frames * prod(shapes[0])
