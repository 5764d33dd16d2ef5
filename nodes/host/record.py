"""Measures what residuals join inside the host's UNet, through its own wrappers and patches; nothing is changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...controlnet_core.dosing.record import TOGETHER, Record, RecordError, power
from ...controlnet_core.networks import injection
from ...controlnet_core.networks.residuals import Residuals
from . import run
from .control import RECORD
from .models import unet_config
from .run import WrappersMP

KEY = "zeroconv_record"


def recorded(model: Any) -> tuple[Any, Record]:
    """A clone of the host's MODEL whose samplings are recorded, and the record, which starts over at each of them."""
    skips = len(unet_config(model.model, "Record Control", None).skip_channels)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise RecordError("this model is recorded already: take off one of the two Record Control nodes")
    record = Record()

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.bound(executor, args, kwargs)
        record.start()
        executor.class_obj.model_options["transformer_options"][RECORD] = record  # the run's own options
        run.begin(call.arguments, executor.class_obj)
        return executor(*call.args, **call.kwargs)

    def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.bound(executor, args, kwargs)
        options, control = call.arguments["transformer_options"], call.arguments.get("control")
        moment = options[run.RUN].moment(options["sigmas"])
        together = injection.from_host_control(control or {}, skips)
        record.add(TOGETHER, moment, together)
        targets = _Targets(together)
        patches = dict(options.get("patches", {}))
        for place, see in (
            ("input_block_patch_after_skip", targets.see_skip),
            ("output_block_patch", targets.see_middle),
        ):
            # First, so that it sees what the UNet made and not what other patches make of it.
            patches[place] = [see, *patches.get(place, [])]
        call.arguments["transformer_options"] = {**options, "patches": patches}
        output = executor(*call.args, **call.kwargs)
        record.met(moment, targets.powers)
        return output

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, diffusion_model)
    return clone, record


class _Targets:
    """The power of what residuals join in one call of the UNet: its activations without any control."""

    def __init__(self, together: Residuals):
        self._together = together
        self._skips: list[Tensor] = []
        self._encoder: list[Tensor] = []
        self._middle: Tensor | None = None

    def see_skip(self, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """The host's patch behind each encoder block; what joins the encoder is in `h` already."""
        added = self._together.encoder[len(self._skips)] if self._together.encoder else None
        self._skips.append(power(h))
        self._encoder.append(self._skips[-1] if added is None else power(h - added))
        return h

    def see_middle(self, h: Tensor, skip: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The host's patch before each decoder block; the first of them gets the middle block's output, controlled."""
        if self._middle is None:
            added = self._together.middle
            self._middle = power(h if added is None else h - added)
        return h, skip

    @property
    def powers(self) -> Residuals:
        """All of it, (B,) each."""
        return Residuals(tuple(self._skips), self._middle, tuple(self._encoder))
