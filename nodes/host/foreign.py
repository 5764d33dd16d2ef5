"""A CONTROL_NET of the host's own loader, or of another pack's, dosed like ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...controlnet_core.networks import injection
from ...controlnet_core.networks.configuration import ConfigurationError, describe_mismatch, read_unet_config
from ...controlnet_core.networks.residuals import Residuals
from ...controlnet_core.networks.unet import UNetConfig
from .call import Call
from .control import Control, ControlError
from .models import unet_config
from .resize import check_crop, resize


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

    def foreign_hooks(self) -> list[Any]:
        """Hooks of the wrapped control and of those before."""
        return [*super().foreign_hooks(), *self.inner.get_extra_hooks()]

    def _memory(self, dtype: torch.dtype) -> float:
        return super()._memory(dtype) + self.inner.inference_memory_requirements(dtype)

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> ForeignControl:
        """Another control around a copy of the same network on another device."""
        c = ForeignControl(self.inner.deepclone_multigpu(load_device, autoregister=False))
        self.copy_to(c)
        if autoregister:
            self.multigpu_clones[load_device] = c  # type: ignore[attr-defined] - newer hosts have it
        return c

    def set_extra_arg(self, argument: str, value: Any = None) -> None:
        """Handed on to the wrapped control."""
        self.inner.set_extra_arg(argument, value)

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Begin a run of the wrapped control at full strength and all over sampling: the dose is ours."""
        super().pre_run(model, percent_to_timestep_function)
        self._show(self._original_hint())
        self.inner.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        """End a run."""
        super().cleanup()
        self.inner.cleanup()
        self.inner.cond_hint_original = None

    def _forget_run(self) -> None:
        super()._forget_run()
        self._shown: Any = None

    def _show(self, hint: Tensor) -> None:
        """Give the wrapped control a hint at full strength and all over sampling: strength and window are ours."""
        inner = self.inner
        inner.set_cond_hint(hint, 1.0, (0.0, 1.0), vae=self.vae, extra_concat=self.extra_concat_orig)
        inner.cond_hint = inner.control_input = None  # of another piece

    def _order(self, call: Call, count: int) -> tuple[int, ...]:
        """For the frames of one part of the batch, the places of their hints among the rows."""
        numbers = call.piece.numbers(count)
        one_part = call.piece.frames[: len(call.piece.frames) // len(call.halves)]
        return (0,) if count == 1 else tuple(numbers.index(frame % count) for frame in one_part)

    def _config_of(self, model: Any) -> UNetConfig:
        config = unet_config(model, self.name, None)
        network = getattr(self.inner, "control_model", None)
        if isinstance(network, torch.nn.Module):
            own = _config_of(network)
            mismatch = own and describe_mismatch(own, config)
            if mismatch:
                raise ControlError(f"{self.name}: {mismatch}")
        return config

    def _residuals(self, call: Call) -> Residuals:
        assert self._model_config is not None
        hint = self._hint(call)
        # It knows of no frames: what it is shown is for the samples of one part of the batch, in their order. One of
        # Advanced-ControlNet's own is told of AnimateDiff's windows, and cuts the whole hint by itself.
        cuts_itself = hint.alive is None and "ad_params" in call.options and hasattr(self.inner, "sub_idxs")
        order = None if hint.count is None or cuts_itself else self._order(call, hint.count)
        if self._shown is None or self._shown[0] != (hint.key, order):
            rows, size = self._original_hint() if cuts_itself else hint.rows, (call.size[0] * 8, call.size[1] * 8)
            if self.resize == "crop":
                check_crop(rows, *size)
            elif rows.shape[2:] != size:
                rows = resize(rows, *size, self.resize)
            self._show(rows if order is None else rows[list(order)])
            self._shown = (hint.key, order), hint.alive
        # It is told of the conds that it acts on, and of no others.
        told = {
            key: [call.options[key][i] for i in call.halves]
            for key in ("cond_or_uncond", "uuids")
            if key in call.options
        }
        control = self.inner.get_control(call.x, call.t, call.cond, len(call.halves), {**call.options, **told})
        if control is None:
            raise ControlError(
                f"{self.name} hands out no residuals here, so that they cannot be dosed: use the apply node of the "
                "pack that it comes from"
            )
        return injection.from_host_control(control, len(self._model_config.skip_channels))


def _config_of(network: torch.nn.Module) -> UNetConfig | None:
    """The configuration of another loader's network, `None` when it is not of the SD UNet's layout."""
    state = network.state_dict()
    if "input_blocks.0.0.weight" not in state or "zero_convs.0.0.weight" not in state:
        return None
    try:
        return read_unet_config(state)
    except ConfigurationError:
        return None
