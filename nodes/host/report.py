"""A CONTROL_NET in words."""

from __future__ import annotations

from typing import Any

from .control import ControlError, OwnControl
from .models import ModelError


def report(control: Any, model: Any = None) -> str:
    """Lines of "name: value" about `control`, and whether it fits the host's MODEL `model`."""
    if not isinstance(control, OwnControl):
        facts = {"format": f"{type(control).__name__} of another loader", "fits": "its own loader knows"}
        return _lines(facts)
    loaded = control.loaded
    parameters = list(loaded.control.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    config = loaded.config
    facts = {
        "file": control.name,
        "family": loaded.family,
        "format": loaded.format,
        "parameters": f"{count / 1e6:.1f} M in {len(parameters)} tensors",
        "weights": f"{str(parameters[0].dtype).removeprefix('torch.')}, "
        f"{sum(p.numel() * p.element_size() for p in parameters) / 2**20:.1f} MiB",
        "computes in": str(control.compute_dtype).removeprefix("torch."),
        "hint": f"{loaded.control.hint_channels} channels, 8 times the latent's size",
        "residuals": f"{len(config.skip_channels)}+1",
        "width": f"{config.model_channels} channels, multipliers {' '.join(map(str, config.channel_mult))}",
        "text": f"{config.context_dim} numbers a token",
    }
    if loaded.dropped:
        facts["left out"] = f"{loaded.dropped} tensors of the base model in the same file"
    if model is not None:
        try:
            control.check_fits(model.model)
            facts["fits"] = f"yes, the model is {loaded.family}"
        except (ControlError, ModelError) as error:
            facts["fits"] = f"no: {error}"
    return _lines(facts)


def _lines(facts: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
