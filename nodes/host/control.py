"""CONTROL_NET objects: what the host's samplers call at every step, for our networks and for those of its own loader.

One object rides on the conds of both guidance halves. The host loads `get_models()` with the model, crops areas,
batches conds, calls `pre_run` once or twice, `get_control` at every step, and `cleanup` unless something failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...controlnet_core import injection
from ...controlnet_core.configuration import ConfigurationError, describe_mismatch, read_unet_config
from ...controlnet_core.loading import LoadedControl
from ...controlnet_core.residuals import Residuals
from ...controlnet_core.strength import Guidance, Strength, Unit, Window
from ...controlnet_core.unet import UNetConfig
from .models import unet_config
from .resize import Resize, resize

HALVES = "zeroconv_halves"
"""Key in `transformer_options`: for each number in `cond_or_uncond`, whether that list of conds is a negative one."""


class ControlError(ValueError):
    """A control that does not fit the model or the graph it is used in."""


@dataclass(frozen=True)
class Options:
    """What the host's own apply nodes have no room for; it rides on the control object."""

    unit: Unit = "percent"
    guidance: Guidance = "both"
    resize: Resize = "crop"
    mask: Tensor | None = None


class Control(comfy.controlnet.ControlBase):
    """A control with a hint and a strength; `_residuals` is where the two kinds differ."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.options = Options()
        self.latent_size: tuple[int, ...] | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self._strength = Strength(0.0)
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
        window = Window(*self.timestep_percent_range, unit=self.options.unit)
        return Strength(self.strength, window, self.options.guidance, self.options.mask)

    def check_fits(self, model: Any) -> UNetConfig:
        """The configuration of the host's `model` (a BaseModel), or ControlError where this does not fit."""
        raise NotImplementedError

    # -- what the host calls ---------------------------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run. The host calls this once for each half, so it starts over and does nothing else."""
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)
        self._forget_run()
        self._hint()  # says at once when there is none
        self._strength = self.strength_now()
        self._model_config = self.check_fits(model)
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
    ) -> dict[str, list[Tensor | None]] | None:
        """The residuals of this step, those of the controls before it included; `None` when nothing acts."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self._strength.off or not self._in_window(t, transformer_options):
            return previous
        chunks = self._chunks(batched_number, transformer_options)
        if not chunks:
            return previous

        per_chunk = x_noisy.shape[0] // batched_number
        batch = _Batch(x_noisy, t, cond, batched_number)
        rows = None
        if len(chunks) < batched_number:
            rows = torch.cat([torch.arange(c * per_chunk, (c + 1) * per_chunk) for c in chunks]).to(x_noisy.device)
            batch = batch.only(rows, len(chunks))
        mask = self._mask(batch)
        lists = {
            place: [
                None if r is None else _scatter(self._strength.weigh(r, x_noisy.shape[2], mask), rows, x_noisy.shape[0])
                for r in residuals
            ]
            for place, residuals in self._residuals(batch, transformer_options).items()
        }
        return _add(previous, lists)

    def _hint(self) -> Tensor:
        """The hint at its own size, (B,C,H,W)."""
        if self.cond_hint_original is None:
            raise ControlError(f"{self.name} has no hint: apply it with an image")
        return self.cond_hint_original

    def _in_window(self, t: Tensor, transformer_options: dict[str, Any]) -> bool:
        window, sigmas = self._strength.window, None
        if window.unit == "step" and "sample_sigmas" in transformer_options:
            sigmas = transformer_options["sample_sigmas"].tolist()
        return window.contains(t[0].item(), sigmas, self._percent_to_sigma)

    def _chunks(self, batched_number: int, transformer_options: dict[str, Any]) -> list[int]:
        """The parts of the batch that control acts on."""
        numbers = transformer_options.get("cond_or_uncond", [0] * batched_number)
        # Without the wrapper that ApplyControl adds, the host's own meaning: list 0 is cond, list 1 uncond.
        negative = transformer_options.get(HALVES) or {1: True}
        return [i for i, number in enumerate(numbers) if self._strength.halves[negative.get(number, False)]]

    def _mask(self, batch: _Batch) -> Tensor | None:
        mask = self._strength.mask
        if mask is None:
            return None
        size = (batch.x.shape[2] * 8, batch.x.shape[3] * 8)
        if size not in self._masks:
            self._masks[size] = resize(mask, *size, self.options.resize, smooth=True).to(batch.x)
        return _repeat(self._masks[size], batch.x.shape[0], batch.chunks)

    def _residuals(self, batch: _Batch, transformer_options: dict[str, Any]) -> dict[str, list[Tensor | None]]:
        """Fresh residuals of this step at strength 1, in the host's lists."""
        raise NotImplementedError


class OwnControl(Control):
    """A ControlNet that our core runs."""

    def __init__(self, name: str, loaded: LoadedControl, patcher: Any, compute_dtype: torch.dtype):
        super().__init__(name)
        self.loaded = loaded
        self.patcher = patcher
        self.compute_dtype = compute_dtype

    def _forget_run(self) -> None:
        super()._forget_run()
        self._guided: dict[tuple[int, int], Tensor] = {}
        self._sampling: Any = None

    def copy(self) -> OwnControl:
        """Another control of the same network: its weights and their place in memory are shared."""
        c = OwnControl(self.name, self.loaded, self.patcher, self.compute_dtype)
        self.copy_to(c)
        return c

    def get_models(self) -> list[Any]:
        """The host loads these with the model."""
        return [*super().get_models(), self.patcher]

    def check_fits(self, model: Any) -> UNetConfig:
        config = unet_config(model, self.name, self.loaded.family)
        mismatch = describe_mismatch(self.loaded.config, config)
        if mismatch:
            raise ControlError(f"{self.name}: {mismatch}")
        return config

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self._sampling = model.model_sampling

    def _guided_hint(self, batch: _Batch) -> Tensor:
        """The guided hint, encoded once per run and size at the hint's own batch."""
        size = (batch.x.shape[2] * 8, batch.x.shape[3] * 8)
        if size not in self._guided:
            hint = resize(self._hint(), *size, self.options.resize)
            hint = hint.to(device=batch.x.device, dtype=self.compute_dtype)
            if hint.shape[1] != self.loaded.control.hint_channels:
                raise ControlError(
                    f"{self.name} takes a hint of {self.loaded.control.hint_channels} channels, found {hint.shape[1]}"
                )
            self._guided[size] = self.loaded.control.encode_hint(hint)
        return _repeat(self._guided[size], batch.x.shape[0], batch.chunks)

    def _residuals(self, batch: _Batch, transformer_options: dict[str, Any]) -> dict[str, list[Tensor | None]]:
        assert self._model_config is not None
        dtype, device = self.compute_dtype, batch.x.device
        context = batch.cond.get("crossattn_controlnet", batch.cond["c_crossattn"])
        y = batch.cond.get("y")
        residuals = self.loaded.control(
            self._sampling.calculate_input(batch.t, batch.x).to(dtype),
            self._sampling.timestep(batch.t).to(dtype),
            context.to(device=device, dtype=dtype),
            self._guided_hint(batch),
            None if y is None else y.to(device=device, dtype=dtype),
        )
        return injection.as_host_control(residuals, self._model_config.residual_shapes(*batch.x.shape[2:]))


class ForeignControl(Control):
    """A CONTROL_NET of another loader, its residuals dosed like our own."""

    def __init__(self, inner: Any):
        super().__init__(f"the {type(inner).__name__} of another loader")
        self.inner = inner
        self.latent_format = inner.latent_format  # the host keeps a VAE only for controls that have one

    def copy(self) -> ForeignControl:
        """Another control around a copy of the same network."""
        c = ForeignControl(self.inner.copy())
        self.copy_to(c)
        return c

    def get_models(self) -> list[Any]:
        """The host loads these with the model."""
        return [*super().get_models(), *self.inner.get_models()]

    def get_extra_hooks(self) -> list[Any]:
        """Hooks of the wrapped control and of those before."""
        return [*super().get_extra_hooks(), *self.inner.get_extra_hooks()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Our reckoning, and what the wrapped control asks for itself."""
        return super().inference_memory_requirements(dtype) + self.inner.inference_memory_requirements(dtype)

    def set_extra_arg(self, argument: str, value: Any = None) -> None:
        """Handed on to the wrapped control."""
        self.inner.set_extra_arg(argument, value)

    def check_fits(self, model: Any) -> UNetConfig:
        config = unet_config(model, self.name, None)
        network = getattr(self.inner, "control_model", None)
        if isinstance(network, torch.nn.Module):
            own = _config_of(network)
            mismatch = own and describe_mismatch(own, config)
            if mismatch:
                raise ControlError(f"{self.name}: {mismatch}")
        return config

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.inner.set_cond_hint(
            self.cond_hint_original, 1.0, (0.0, 1.0), vae=self.vae, extra_concat=self.extra_concat_orig
        )
        self.inner.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        super().cleanup()
        self.inner.cleanup()

    def _residuals(self, batch: _Batch, transformer_options: dict[str, Any]) -> dict[str, list[Tensor | None]]:
        assert self._model_config is not None
        if self.options.resize != "crop":
            size = (batch.x.shape[2] * 8, batch.x.shape[3] * 8)
            if self.inner.cond_hint_original.shape[2:] != size:
                self.inner.cond_hint_original = resize(self._hint(), *size, self.options.resize)
        lists = self.inner.get_control(batch.x, batch.t, batch.cond, batch.chunks, transformer_options)
        shapes = self._model_config.residual_shapes(*batch.x.shape[2:])
        if len(lists["output"]) + len(lists["middle"]) == len(shapes):
            injection.check(Residuals.of([*lists["output"], *lists["middle"]]), shapes)
        return lists


@dataclass(frozen=True)
class _Batch:
    """What a step is computed on: `chunks` conds of equal size, one after the other."""

    x: Tensor
    t: Tensor
    cond: dict[str, Any]
    chunks: int

    def only(self, rows: Tensor, chunks: int) -> _Batch:
        """The given rows of everything that has one for each sample."""
        cond = {
            key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == self.x.shape[:1] else value
            for key, value in self.cond.items()
        }
        return _Batch(self.x[rows], self.t[rows], cond, chunks)


def _config_of(network: torch.nn.Module) -> UNetConfig | None:
    """The configuration of another loader's network, `None` when it is not of the SD UNet's layout."""
    state = network.state_dict()
    if "input_blocks.0.0.weight" not in state or "zero_convs.0.0.weight" not in state:
        return None
    try:
        return read_unet_config(state)
    except ConfigurationError:
        return None


def _repeat(tensor: Tensor, total: int, chunks: int) -> Tensor:
    """One entry for all, or entry i for sample i of every chunk, starting over when there are fewer than samples."""
    if tensor.shape[0] == 1:
        return tensor
    index = torch.arange(total // chunks, device=tensor.device) % tensor.shape[0]
    return tensor[index.repeat(chunks)]


def _scatter(part: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """`part` at `rows` of a batch of `total`, zeros elsewhere."""
    if rows is None:
        return part
    whole = part.new_zeros((total, *part.shape[1:]))
    whole[rows] = part
    return whole


def _add(a: dict[str, list[Tensor | None]] | None, b: dict[str, list[Tensor | None]]) -> dict[str, list[Tensor | None]]:
    """Several controls add; the host's lists are aligned at their first entry."""
    if a is None:
        return b
    out: dict[str, list[Tensor | None]] = {}
    for place in ("input", "middle", "output"):
        x, y = list(a.get(place, [])), list(b.get(place, []))
        length = max(len(x), len(y))
        x += [None] * (length - len(x))
        y += [None] * (length - len(y))
        out[place] = [q if p is None else p if q is None else p + q for p, q in zip(x, y, strict=True)]
    return out
