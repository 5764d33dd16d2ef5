"""What a training can be told: one frozen record, whose names are those of the TOML file and of the node."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

import torch

from ..errors import ZeroConvError
from ..limits import BATCH
from ..networks.controlnet import CONNECTIONS, HINT_ENCODERS

KINDS = ("controlnet", "control_lora", "lite")
PREDICTIONS = ("eps", "v")
TIMESTEPS = ("uniform", "cubic")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion")
SCHEDULES = ("constant", "cosine", "linear")
FIT_MEMORY = ("auto", "propose", "off")
RECOMPUTE = ("auto", "on", "off")
BASE_WEIGHTS = ("precision", "fp8")
CONTROL_WEIGHTS = ("fp32", "bf16")


class OptionsError(ZeroConvError):
    """Options that cannot be trained with; the message says what is expected."""


@dataclass(frozen=True)
class TrainingOptions:
    """A training's options; steps are optimizer steps.

    `batch_size` counts the examples of one forward pass over all processes, and `accumulation` the passes of a step.
    `kind` is what is trained: the full copy, a Control-LoRA of `rank`, or ControlNet-lite (the paper's ablation).
    `middle_only` is the paper's small-scale training, `unlock_decoder` its large-scale one, at
    `decoder_learning_rate`. `empty_prompts` is the share of prompts that become the empty one. `min_snr` is the gamma
    of min-SNR weighting (Hang et al., 2023), `ema` the decay of the average of the weights; 0 turns either off.
    `warmup` is in steps, `clip` the largest norm of a step's gradient. Every `sample_every` steps `held_out` pictures
    that are never trained on are sampled and scored; 0 turns that off. Timesteps are drawn from
    `min_timestep <= t < max_timestep`. `huber` is the c of the pseudo-Huber loss, 0 for squares. `graphs` captures a
    step as CUDA graphs. `shard_optimizer` divides the optimizer's state among the processes that share a training.
    """

    steps: int = 10_000
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-5
    seed: int = 0

    kind: str = "controlnet"
    rank: int = 64
    connections: str = "zero"
    hint_encoder: str = "released"
    middle_only: bool = False
    unlock_decoder: bool = False
    decoder_learning_rate: float = 2e-6

    prediction: str = "eps"
    empty_prompts: float = 0.5
    timesteps: str = "uniform"
    min_snr: float = 0.0

    precision: str = "bf16"
    gradient_checkpointing: bool = False
    clip: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup: int = 0
    ema: float = 0.0

    save_every: int = 250
    keep: int = 2
    sample_every: int = 250
    held_out: int = 4
    sample_steps: int = 20
    guidance_scale: float = 5.0

    huber: float = 0.0
    offset_noise: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000
    zero_terminal_snr: bool = False

    fit_memory: str = "auto"
    recompute: str = "auto"
    optimizer_in_ram: bool = False
    base_weights: str = "precision"
    control_weights: str = "fp32"
    keep_controls: int = 4
    control_dtype: str = "fp16"
    graphs: bool = False
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainingOptions)
        for field in fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise OptionsError(f"{field.name} is {value!r}: expected {_TYPES[kind]}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionsError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                most = "" if high == _MANY else f" to {high:g}"
                raise OptionsError(f"{name} is {getattr(self, name):g}: expected {low:g}{most or ' or more'}")
        if self.kind == "lite" and self.unlock_decoder:
            raise OptionsError("unlock_decoder goes with kind controlnet or control_lora: choose one of them")
        if self.middle_only and self.unlock_decoder:
            raise OptionsError("middle_only is for little compute, unlock_decoder for much: choose one of the two")
        if self.base_weights == "fp8" and self.unlock_decoder:
            raise OptionsError("base_weights fp8 are locked, and unlock_decoder trains some: choose one of the two")
        if self.control_weights == "bf16" and self.precision != "bf16":
            raise OptionsError(f"control_weights bf16 go with precision bf16, found {self.precision}: choose that")
        if self.optimizer == "prodigy" and (self.optimizer_in_ram or self.control_weights == "bf16"):
            raise OptionsError(
                "prodigy needs all weights at once in fp32: choose another optimizer, or optimizer_in_ram off and "
                "control_weights fp32"
            )
        if self.min_timestep >= self.max_timestep:
            raise OptionsError(
                f"min_timestep is {self.min_timestep} and max_timestep {self.max_timestep}: expected a smaller one and "
                "a larger one, 0 and 1000 for all timesteps"
            )

    @property
    def trained_dtype(self) -> torch.dtype:
        """The dtype of the weights that are trained."""
        return torch.bfloat16 if self.control_weights == "bf16" else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in."""
        return PRECISIONS[self.precision]

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which networks with weights in fp32 compute at this precision on `device`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)


MEANINGS = {
    "steps": "optimizer steps in all; more of them later go on where the run stopped",
    "batch_size": "examples of one forward pass, over all processes together",
    "accumulation": "passes of one step: a step sees batch_size * accumulation examples",
    "learning_rate": "the optimizer's learning rate for the control",
    "seed": "everything random follows from it: order of the data, noise, timesteps, held-out pictures",
    "kind": "what is trained: the full copy (controlnet), a Control-LoRA (control_lora: little memory), or the paper's "
    "ControlNet-lite (lite)",
    "rank": "rank of a Control-LoRA; the other kinds do not read it",
    "connections": "how the convolutions that join control and UNet begin: zero, or gaussian (the paper's ablation)",
    "hint_encoder": "released (as in published weights), or paper (as the paper's text has it)",
    "middle_only": "join the control to the middle block alone: the paper's training with little compute",
    "unlock_decoder": "train the UNet's decoder too: the paper's training with much compute",
    "decoder_learning_rate": "the unlocked decoder's learning rate",
    "prediction": "what the model predicts: eps (SD1.x, SDXL), or v (SD2.x 768)",
    "empty_prompts": "share of the prompts that are left out in training, so that the hint is read and not the prompt",
    "timesteps": "how timesteps are drawn: uniform, or cubic (more of the noisy ones, where the layout is decided)",
    "min_snr": "gamma of min-SNR loss weighting, usually 5; 0 is off",
    "precision": "what the networks compute in: bf16, fp16 or fp32; trained weights are fp32 if nothing else is said",
    "gradient_checkpointing": "compute activations twice instead of keeping them: less memory, a third slower",
    "clip": "largest norm of a step's gradient; 0 is off",
    "optimizer": "adamw, adamw8bit (a quarter of its memory; needs bitsandbytes), adafactor (hardly any), lion (half; "
    "needs lion-pytorch) or prodigy (finds its step by itself: learning_rate 1; needs prodigyopt)",
    "weight_decay": "the optimizer's weight decay",
    "schedule": "the learning rate over the steps: constant, cosine or linear",
    "warmup": "steps in which the learning rate rises from 0",
    "ema": "decay of the running average of the weights that is saved in the end, such as 0.999; 0 is off",
    "save_every": "steps between checkpoints; a run that was killed loses this much at most",
    "keep": "checkpoints that are kept",
    "sample_every": "steps between samples of the held-out pictures, by which convergence is seen; 0 is off",
    "held_out": "pictures that are never trained on, only sampled and scored",
    "sample_steps": "sampling steps of such a sample",
    "guidance_scale": "guidance scale of such a sample",
    "huber": "c of the pseudo-Huber loss, such as 0.1: errors larger than it count less than their square; 0 is off",
    "offset_noise": "how much the noise of a whole channel is shifted, such as 0.05, for darker and brighter pictures; "
    "0 is off",
    "min_timestep": "first timestep that is trained on, of 0 (no noise) to 999 (noise alone)",
    "max_timestep": "the timestep that training ends before; 1000 is all",
    "zero_terminal_snr": "rescale the noise schedule so that the last timestep is noise alone; for prediction v",
    "fit_memory": "count before training whether it fits into the GPU's memory, and where it does not, change these "
    "options so that it does (auto), or say which ones (propose); off: do not count",
    "recompute": "compute norms and activations twice instead of keeping them: on, off, or auto: off on a CPU, and on "
    "a GPU where everything fits",
    "optimizer_in_ram": "keep the optimizer's state in main memory and bring it to the GPU part by part: the same "
    "numbers, a slower step",
    "base_weights": "what the locked model's weights lie in: as precision says, or fp8 (half of that)",
    "control_weights": "what the trained weights lie in: fp32, or bf16 (half of it; steps are rounded at random, so "
    "that small ones are not lost)",
    "keep_controls": "controls that are kept in the folder controls: one is written with each checkpoint",
    "control_dtype": "what these controls are written in: fp16, bf16 or fp32; control.safetensors in the end is exact",
    "graphs": "capture a step as CUDA graphs, which NVIDIA's GPUs launch at once; no GPU has tried this yet",
    "shard_optimizer": "of many processes each keeps a part of the optimizer's state alone: the same training in less "
    "memory; no GPU has tried this yet",
}
"""Each option in words: comments of a TOML file, help of the command, tooltips of the node."""

STRUCTURE = (
    "seed",
    "kind",
    "rank",
    "connections",
    "hint_encoder",
    "middle_only",
    "unlock_decoder",
    "prediction",
)
"""What a run keeps from its beginning; the rest may be changed when it is resumed."""

NUMBERS = ("batch_size", "accumulation", "base_weights", "control_weights")
"""What `fit_memory` may change and by which other numbers are computed: a run that goes on keeps it where it can."""


def from_dict(values: Mapping[str, Any]) -> TrainingOptions:
    """Options from names and values; raises OptionsError naming one that does not exist, and the nearest that does."""
    from difflib import get_close_matches

    known = [field.name for field in fields(TrainingOptions)]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else f": the options are {', '.join(known)}"
            raise OptionsError(f"there is no option {name!r}{hint}")
    return TrainingOptions(**values)


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
CHOICES = {
    "kind": KINDS,
    "connections": CONNECTIONS,
    "hint_encoder": tuple(HINT_ENCODERS),
    "prediction": PREDICTIONS,
    "timesteps": TIMESTEPS,
    "precision": tuple(PRECISIONS),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "fit_memory": FIT_MEMORY,
    "recompute": RECOMPUTE,
    "base_weights": BASE_WEIGHTS,
    "control_weights": CONTROL_WEIGHTS,
    "control_dtype": tuple(PRECISIONS),
}
_MANY = float("inf")
RANGES = {
    "steps": (1, _MANY),
    "batch_size": (1, BATCH),
    "accumulation": (1, BATCH),
    "learning_rate": (0, 1),
    "decoder_learning_rate": (0, 1),
    "seed": (0, 2**63 - 1),
    "rank": (1, 1024),
    "empty_prompts": (0, 1),
    "min_snr": (0, _MANY),
    "clip": (0, _MANY),
    "weight_decay": (0, 1),
    "warmup": (0, _MANY),
    "ema": (0, 0.999999),
    "save_every": (1, _MANY),
    "keep": (1, _MANY),
    "sample_every": (0, _MANY),
    "held_out": (0, BATCH),
    "sample_steps": (1, 1000),
    "guidance_scale": (0, _MANY),
    "huber": (0, _MANY),
    "offset_noise": (0, 1),
    "min_timestep": (0, 999),
    "max_timestep": (1, 1000),
    "keep_controls": (1, _MANY),
}
