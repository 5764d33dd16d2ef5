"""CONTROL_NET objects: what the host's samplers call at every step, whatever network is behind them.

One object rides on the conds of both guidance halves. The host loads `get_models()` with the model, crops areas,
batches conds, calls `pre_run` once or twice, `get_control` at every step, and `cleanup` unless something failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.controlnet
import comfy.model_management
import torch
from torch import Tensor

from ...controlnet_core.dosing.block_weights import BlockWeights
from ...controlnet_core.dosing.schedule import Schedule
from ...controlnet_core.dosing.strength import Dose, Guidance, Strength, Unit, Window
from ...controlnet_core.keys import times
from ...controlnet_core.networks import injection
from ...controlnet_core.networks.residuals import Residuals
from ...controlnet_core.networks.unet import UNetConfig
from .resize import Resize, resize

HALVES = "zeroconv_halves"
"""Key in `transformer_options`: for each number in `cond_or_uncond`, whether that list of conds is a negative one."""

RECORD = "zeroconv_record"
"""Key in `transformer_options`: the record that RecordControl makes of what each control adds."""


class ControlError(ValueError):
    """A control that does not fit the model or the graph it is used in."""


@dataclass(frozen=True)
class Options:
    """What the host's own apply nodes have no room for; it rides on the control object. `mask` is (B,1,H,W)."""

    unit: Unit = "percent"
    guidance: Guidance = "both"
    resize: Resize = "crop"
    mask: Tensor | None = None
    schedule: Schedule | None = None
    block_weights: BlockWeights | None = None


@dataclass(frozen=True)
class Step:
    """What one call of the UNet gives its controls, cut down to the conds that this control acts on.

    `x` (B,4,H,W), `t` (B,) and `cond` hold conds of equal size, one after the other; `chunks` are their numbers in the
    UNet's whole batch of `total` samples, and `rows` the places of their samples, `None` when they are all of it.
    `frames` are the numbers of a cond's samples in the run's batch: all of them, or those of a context window. `now` is
    the strength at this moment.
    """

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    chunks: list[int]
    rows: Tensor | None
    total: int
    frames: Tensor
    options: dict[str, Any]
    now: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent; less than the run's where a prompt is limited to an area."""
        return self.x.shape[2], self.x.shape[3]

    def of_frames(self, tensor: Tensor) -> Tensor:
        """One entry for all, or entry i for frame i of each cond, starting over when there are fewer than frames."""
        if tensor.shape[0] == 1:
            return tensor
        return tensor[(self.frames % tensor.shape[0]).repeat(len(self.chunks)).to(tensor.device)]

    def scattered(self, part: Tensor) -> Tensor:
        """`part` at this step's rows of the whole batch, zeros elsewhere."""
        if self.rows is None:
            return part
        whole = part.new_zeros((self.total, *part.shape[1:]))
        whole[self.rows] = part
        return whole


class Control(comfy.controlnet.ControlBase):
    """A control with a hint and a strength; what kind of control it is shows in `_residuals` alone."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.options = Options()
        self.latent_size: tuple[int, ...] | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._strength = Strength(0.0)
        self._off = True
        self._percent_to_sigma: Any = None
        self._model_config: UNetConfig | None = None
        self._masks: dict[tuple[int, int], Tensor] = {}

    # -- what nodes call -------------------------------------------------------------------------------------------

    def with_options(self, options: Options) -> Control:
        """A copy that `options` ride on."""
        c = self.copy()
        c.options = options
        return c

    def copy(self) -> Control:
        """Another control of the same network with the same settings."""
        raise NotImplementedError

    def copy_to(self, c: Any) -> None:
        """The host's settings and ours; what a run has computed stays behind."""
        super().copy_to(c)
        c.options = self.options
        c.latent_size = self.latent_size

    def strength_now(self) -> Strength:
        """The strength that the settings describe; raises for a window that cannot be meant."""
        options = self.options
        window = Window(*self.timestep_percent_range, unit=options.unit)
        return Strength(self.strength, window, options.guidance, options.mask, options.schedule, options.block_weights)

    def check_fits(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel); raises where the control or its dose does not fit."""
        config = self._config_of(model)
        self.strength_now().dose(0.0, len(config.skip_channels), 8)
        return config

    # -- what the host calls ---------------------------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run. The host calls this once for each half, so it starts over and does nothing else."""
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)
        self._forget_run()
        self._original_hint()  # says at once when there is none
        self._strength = self.strength_now()
        self._model_config = self.check_fits(model)
        self._off = self._strength.off or not any(self._dose(1.0, (8, 8), None).weights)
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
        """The residuals of this step, those of the controls before it included; `None` when nothing acts."""
        previous, before = None, self._before
        if before is not None:
            previous = before.get_control(x_noisy, t, cond, batched_number, transformer_options)
        step = self._step(x_noisy, t, cond, batched_number, transformer_options)
        return previous if step is None else self._act(step, previous)

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(
        self, x: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, options: dict[str, Any]
    ) -> Step | None:
        """This call of the UNet as far as the control acts in it; `None` when it does not."""
        now = self._now(t[0].item(), options.get("sample_sigmas"))
        chunks = self._chunks(batched_number, options)
        if now == 0.0 or not chunks:
            return None
        total = x.shape[0]
        frames = torch.arange(total // batched_number)
        window = options.get("context_window")
        if window is not None and getattr(window, "dim", None) == 0 and len(window.index_list) == len(frames):
            frames = torch.tensor(window.index_list)
        if len(chunks) == batched_number:
            return Step(x, t, cond, chunks, None, total, frames, options, now)
        rows = torch.tensor([c * len(frames) + i for c in chunks for i in range(len(frames))], device=x.device)
        cond = {
            key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] else value
            for key, value in cond.items()
        }
        return Step(x[rows], t[rows], cond, chunks, rows, total, frames, options, now)

    def _now(self, sigma: float, sigmas: Tensor | None) -> float:
        """The strength at this moment of a run over `sigmas`, 0 when nothing acts."""
        if self._off:
            return 0.0
        counted = sigmas.tolist() if sigmas is not None and self._strength.counts_steps else None
        return self._strength.now(sigma, counted, self._percent_to_sigma)

    @property
    def one_sided(self) -> bool:
        """Whether control acts on the conditional half of guidance alone."""
        return self.options.guidance != "both"

    def _chunks(self, batched_number: int, options: dict[str, Any]) -> list[int]:
        """The parts of the batch that control acts on."""
        numbers = options.get("cond_or_uncond", [0] * batched_number)
        # Without the wrapper that ApplyControl adds, the host's own meaning: list 0 is cond, list 1 uncond.
        negative = options.get(HALVES) or {1: True}
        return [i for i, number in enumerate(numbers) if not (self.one_sided and negative.get(number, False))]

    def _act(self, step: Step, previous: injection.HostControl | None) -> injection.HostControl | None:
        """What the UNet is given at a step in which this control acts; `previous` are the controls before it."""
        assert self._model_config is not None
        shapes = self._model_config.residual_shapes(*step.size)
        _watch_sizes(step.options, self._model_config)
        dosed = self._dose(step.now, step.size, self._mask(step)).apply(self._residuals(step))
        residuals = dosed.mapped(lambda _, residual: step.scattered(residual))
        if RECORD in step.options:
            step.options[RECORD].add(self.name, step.t[0].item(), residuals)
        if previous is not None:
            before = injection.from_host_control(previous, len(shapes) - 1)
            injection.check(before, shapes)
            injection.check(residuals, shapes)
            residuals = before + residuals
        return injection.as_host_control(residuals, shapes)

    def _dose(self, now: float, size: tuple[int, int], mask: Tensor | None) -> Dose:
        assert self._model_config is not None
        return self._strength.dose(now, len(self._model_config.skip_channels), size[0], mask)

    def _original_hint(self) -> Tensor:
        """The hint at its own size, (B,C,H,W)."""
        if self.cond_hint_original is None:
            raise ControlError(f"{self.name} has no hint: apply it with an image")
        return self.cond_hint_original

    def _hint(self, step: Step, multiple: int = 8) -> Tensor:
        """The hint at 8 times the latent's size, rounded up to `multiple`, at its own batch and on its own device."""
        height, width = (-(-8 * n // multiple) * multiple for n in step.size)
        return resize(self._original_hint(), height, width, self.options.resize)

    def _mask(self, step: Step) -> Tensor | None:
        """Where and on which pictures control acts, (B,1,8H,8W) or (B,1,1,1); `None` everywhere and on all."""
        mask, schedule = self._strength.mask, self._strength.schedule
        if mask is not None:
            size = (step.size[0] * 8, step.size[1] * 8)
            if size not in self._masks:
                self._masks[size] = resize(mask, *size, self.options.resize, smooth=True).to(step.x)
            mask = step.of_frames(self._masks[size])
        if schedule is None or not schedule.per_image:
            return mask
        pictures, last = len(step.frames), int(step.frames.max())
        windowed = "context_window" in step.options
        if last >= len(schedule.per_image) or (not windowed and len(schedule.per_image) != pictures):
            raise ControlError(
                f"{self.name}: the schedule's per_image has {len(schedule.per_image)} strengths, the batch "
                f"{f'at least {last + 1}' if windowed else pictures} pictures: write one for each"
            )
        strengths = step.of_frames(step.x.new_tensor(schedule.per_image).reshape(-1, 1, 1, 1))
        return strengths if mask is None else mask * strengths

    @property
    def _before(self) -> Any:
        """The control before this one in its chain."""
        return self.previous_controlnet

    # -- what kinds of control differ in ---------------------------------------------------------------------------

    def _config_of(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel); ControlError where the network does not fit it."""
        raise NotImplementedError

    def _residuals(self, step: Step) -> Residuals:
        """The residuals of this step at strength 1."""
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
