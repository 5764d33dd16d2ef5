"""What a training takes of a GPU's memory, counted before it starts; what to change where that is too much."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import eq
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.dataset import Dataset
from ..networks.recompute import _autocast
from ..networks.unet import UNet, UNetConfig
from .controlled_unet import ControlledUNet, build, keep_activations
from .distributed import ALONE, Process
from .optimizer import unsharded
from .options import NUMBERS, TrainingOptions
from .parts import AT_ONCE

GB = 2.0**30
"""As cards are sold."""

RESERVE = 0.4 * GB
"""What kernels work in and what the allocator's blocks lose, beside what is counted."""


MOVABLE = ("adamw", "adafactor", "lion")
"""The optimizers whose state can lie in main memory."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up: CUDA's, cuBLAS's or the CPU's, which has no class of its own."""
    words = str(error).lower()
    return any(said in words for said in ("can't allocate memory", "out of memory", "status_alloc_failed"))


def advice(options: TrainingOptions, world: int = 1, sampling: bool = False) -> str:
    """What to lower, the mildest first; where memory ended while held-out pictures were sampled, what they take."""
    if sampling:
        fewer = f"Set held_out {options.held_out // 2} in a new run, or " if options.held_out > 1 else "Set "
        return f"{fewer}sample_every 0 and resume."
    if options.batch_size > world:
        split = _split(options, world)
        return (
            f"Set batch_size {split.batch_size} and accumulation {split.accumulation}, which trains the same, and "
            "resume."
        )
    if not options.gradient_checkpointing:
        return "Turn gradient_checkpointing on and resume."
    if options.optimizer != "adamw8bit":
        kept = options.optimizer_in_ram or options.optimizer not in MOVABLE
        moved = "" if kept else "Turn optimizer_in_ram on and resume, or choose "
        return f"{moved or 'Choose '}optimizer adamw8bit and resume, or kind control_lora in a new run."
    return "Choose kind control_lora, or a dataset of a lower resolution."


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """What a training reads, as memory sees it: its largest picture in pixels, tokens of a prompt, hint channels.

    And how many `prompts` of the user's own are sampled.
    """

    height: int
    width: int
    tokens: int = 77
    hint_channels: int = 3
    prompts: int = 0

    @classmethod
    def of(cls, dataset: Dataset, prompts: int = 0) -> Examples:
        """Those of a dataset, and of so many prompts beside it."""
        height, width = max(dataset.buckets, key=lambda size: size[0] * size[1])
        return cls(height, width, len(dataset.empty_prompt[0]), dataset.hint_channels, prompts)


@dataclass(frozen=True)
class Needs:
    """Bytes that a training takes at once, by what takes them.

    `weights` are those of the locked and of the trained networks, `optimizer` its state, `averages` those of the
    weights, `step` what is added at the worst moment: gradients, and activations or what the optimizer works in; or
    what held-out pictures are sampled in. `ram` is what lies in main memory instead.
    """

    weights: int
    optimizer: int
    averages: int
    step: int
    ram: int = 0

    @property
    def total(self) -> float:
        """All of it that lies on the GPU, and the reserve."""
        return self.weights + self.optimizer + self.averages + self.step + RESERVE


@dataclass
class Counter:
    """Counts what trainings on UNets of `config` need. What was counted once is remembered."""

    config: UNetConfig
    examples: Examples
    device: str = "cuda"
    _networks: dict[Any, ControlledUNet] = field(default_factory=dict)
    _peaks: dict[Any, int] = field(default_factory=dict)

    def needs(self, options: TrainingOptions, world: int = 1) -> Needs:
        """What one of `world` processes needs; a pass is run on tensors without numbers (torch's FakeTensorMode)."""
        controlled = self._network(options)
        trained = [p for p in controlled.parameters() if p.requires_grad]
        state = sum(state_bytes(options.optimizer, p) for p in trained)
        shares = world if options.shard_optimizer and not unsharded(options, world) else 1
        step = gradients = sum(p.numel() * p.element_size() for p in trained)
        if options.optimizer_in_ram or options.control_weights == "bf16":  # a part of the state, weights, gradients
            step += 4 * 4 * min(max(AT_ONCE, *(p.numel() for p in trained)), gradients // 4)
        return Needs(
            weights=sum(t.nbytes for t in (*controlled.parameters(), *controlled.buffers())),
            optimizer=0 if options.optimizer_in_ram else state // shares,
            averages=sum(4 * p.numel() for p in trained) if options.ema else 0,
            step=max(step, self.passing(options, options.batch_size // world), self.sampling(options, world)),
            ram=state if options.optimizer_in_ram else 0,
        )

    def _network(self, options: TrainingOptions) -> ControlledUNet:
        """The networks of these options, without numbers."""
        same = {"gradient_checkpointing": False, "batch_size": 1, "accumulation": 1, "optimizer_in_ram": False}
        key = replace(options, **same, recompute="on")
        if key not in self._networks:
            with self._without_numbers():
                weights = UNet(self.config, device="meta").state_dict()
                base = {name: torch.empty(tensor.shape) for name, tensor in weights.items()}
                self._networks[key] = build(options, base, self.config, self.examples.hint_channels)
            for module in self._networks[key].modules():
                if self.device == "cuda" and isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                    module.forward = partial(_norm_in_fp32, module)  # type: ignore[assignment]
        return self._networks[key]

    def passing(self, options: TrainingOptions, batch: int) -> int:
        """The most bytes at once, beside the weights, in a forward and a backward pass: activations and gradients."""
        controlled = self._network(options)
        key = id(controlled), options.gradient_checkpointing, options.recompute, batch
        if key in self._peaks:
            return self._peaks[key]
        keep_activations(controlled, options)
        with self._without_numbers(), Peak(controlled) as peak:
            noisy, timesteps, context, hints, y = self._inputs(batch)
            with options.autocast(torch.device("cpu")):
                predicted = controlled(noisy, timesteps, context, hints, y)
            (predicted.float() - noisy).square().mean().backward()
            controlled.zero_grad(set_to_none=True)
        self._peaks[key] = peak.most
        return peak.most

    def sampling(self, options: TrainingOptions, world: int = 1) -> int:
        """The most bytes at once, beside the weights, while one of `world` processes samples, both halves at once.

        Its share of the held-out pictures, or one of the user's own prompts, which come one after the other.
        """
        controlled = self._network(options)
        at_once = max(-(-options.held_out // world), min(1, self.examples.prompts))
        pictures = at_once if options.sample_every else 0
        key = id(controlled), pictures, options.guidance_scale == 1
        if pictures and key not in self._peaks:
            n = 1 if options.guidance_scale == 1 else 2
            with self._without_numbers(), Peak(controlled) as peak, torch.no_grad():
                noisy, timesteps, context, _, y = self._inputs(pictures * n)
                *_, hints, _ = self._inputs(pictures)
                with options.autocast(torch.device("cpu")):
                    guided_hint = controlled.control.encode_hint(hints).repeat(n, 1, 1, 1)
                    controlled.predict(noisy, timesteps, context, guided_hint, y)
            self._peaks[key] = peak.most
        return self._peaks.get(key, 0)

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Latents, timesteps, context, hints and vector y of a pass."""
        examples, pooled = self.examples, self.config.adm_in_channels
        return (
            torch.zeros(batch, self.config.out_channels, examples.height // 8, examples.width // 8),
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, examples.tokens, self.config.context_dim),
            torch.zeros(batch, examples.hint_channels, examples.height, examples.width),
            None if pooled is None else torch.zeros(batch, pooled),
        )

    def _without_numbers(self) -> AbstractContextManager[Any]:
        if not hasattr(self, "_mode"):
            self._mode = FakeTensorMode()
        return self._mode


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that live at once while it is on, `most` of them beside those of `module`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.now = self.most = 0
        self._living = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return
        self._living.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, partial(self._gone, key, size))

    def _gone(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.now -= size


def _norm_in_fp32(norm: Any, x: Tensor) -> Tensor:
    """A norm as CUDA's autocast has it, in fp32; the CPU's, under which passes are counted, leaves it in x's dtype."""
    if not _autocast("cpu")[-1]:
        return type(norm).forward(norm, x)
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = x.float(), norm.weight.float(), norm.bias.float()
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x, list(norm.normalized_shape), weight, bias, norm.eps)


def state_bytes(optimizer: str, p: Tensor) -> int:
    """Bytes of an optimizer's state for a parameter; a test compares them with the optimizers'."""
    n = p.numel()
    if optimizer == "adafactor":  # factors of the last two dimensions; what has one keeps it whole
        return 4 * (n // p.shape[-1] + n // p.shape[-2]) if p.ndim > 1 else 4 * n
    if optimizer == "adamw8bit" and n >= 4096:  # bytes, with a scale for each 256; smaller ones are not worth it
        return 2 * (n + 4 * -(-n // 256))
    return {"adamw": 8, "adamw8bit": 8, "lion": 4, "prodigy": 16}[optimizer] * n


# -- fitting -----------------------------------------------------------------------------------------------------------


def available(device: torch.device) -> float | None:
    """Bytes that a training can have on a GPU, None where nobody says."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitted(
    options: TrainingOptions,
    config: UNetConfig,
    examples: Examples,
    process: Process = ALONE,
    saved: Mapping[str, Any] | None = None,
) -> tuple[TrainingOptions, str]:
    """The options to train with in the memory that there is, and a sentence about it; empty where nothing is counted.

    Of `measures` as few are taken as do, the mildest first. `recompute` auto becomes on or off in any case, the rest is
    changed with `fit_memory` auto alone. Where nothing does, all of them are taken, and what would do is said. With
    `fit_memory` auto a run that goes on from options `saved` keeps those measures of theirs that change its numbers.
    On the CPU nothing is counted, and `recompute` auto is off: time is scarce there, memory is not.
    """
    room = available(process.device)
    if room is None and process.device.type == "cpu" and options.recompute == "auto":
        options = replace(options, recompute="off")
    if options.fit_memory == "off" or room is None or options.batch_size % process.world:  # the last is refused later
        return options, ""
    room = float(min(process.gather(int(room))))
    counter = Counter(config, examples)
    needed = partial(_total, counter, process.world)
    asked = replace(options, recompute="off") if options.recompute == "auto" else options
    plain = _as_before(asked, saved, process.world) if saved and options.fit_memory == "auto" else asked
    before = f"{_changes(asked, plain)} as before (fit_memory off takes what is asked): " if plain != asked else ""
    taken = choose(plain, room, needed, process.world)
    total, fits = needed(taken), needed(taken) <= room
    head = f"{before}this training needs about {needed(plain) / GB:.1f} GB of memory, {room / GB:.1f} GB are free"
    if taken == plain:
        return plain, f"{head}{'' if fits else ': ' + _beyond(options, counter, process.world)}"

    ram = counter.needs(taken, process.world).ram
    with_ram = f" and {ram / GB:.1f} GB of main memory" if ram else ""
    what = f"{_changes(plain, taken)}, with which it needs about {total / GB:.1f} GB{with_ram}"
    beyond = "" if fits else f". That is still too much: {_beyond(taken, counter, process.world)}"
    only_recompute = replace(taken, recompute=options.recompute) == options
    if options.fit_memory == "auto" or only_recompute:
        return taken, f"{head}: it is trained with {what}{beyond}"
    mildest = replace(options, recompute=taken.recompute) if options.recompute == "auto" else options
    return mildest, f"{head}: set {what}{beyond}"


def _as_before(options: TrainingOptions, saved: Mapping[str, Any], world: int) -> TrainingOptions:
    """`options` after those of `measures` that a run with options `saved` had taken and that change its numbers."""
    reached = [options]
    for each in reached:  # which grows meanwhile
        for following in measures(each, world):
            others = {name: getattr(options, name) for name in following.as_dict() if name not in NUMBERS}
            if following == replace(following, **others) and following not in reached:
                reached.append(following)
    wanted = _numbers(saved)
    return max(reached, key=lambda each: sum(map(eq, _numbers(each.as_dict()), wanted)))


def _numbers(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of NUMBERS, a batch and its passes as one of them."""
    batch_size, accumulation, *others = (options.get(name) for name in NUMBERS)
    return (batch_size, accumulation), *others


def _total(counter: Counter, world: int, options: TrainingOptions) -> float:
    return counter.needs(options, world).total


def choose(options: TrainingOptions, room: float, needed: Any, world: int = 1) -> TrainingOptions:
    """`options` with as few of `measures` as fit into `room` bytes by what `needed` says of options."""
    steps = [options]
    while needed(steps[-1]) > room:
        following = next(measures(steps[-1], world), None)
        if following is None:
            return steps[-1]
        steps.append(following)
    # What was taken on the way and is not needed in the end is given back, the costliest in time first.
    taken = steps[-1]
    for name in ("batch_size", "gradient_checkpointing", "recompute"):
        before = getattr(options, name)
        given = {name: before, "accumulation": options.accumulation} if name == "batch_size" else {name: before}
        back = replace(taken, **given)
        if back != taken and needed(back) <= room:
            taken = back
    return taken


def measures(options: TrainingOptions, world: int = 1) -> Iterator[TrainingOptions]:
    """`options` with one measure more that saves memory, in the order of preference.

    First what leaves all numbers as they are (recomputing, gradient checkpointing, the optimizer's state in main
    memory), then what leaves the training as it is (a batch in two passes), then what rounds (the base in fp8, control
    weights in bf16). Another kind of control, or another optimizer, is never chosen for the user.
    """
    if options.recompute == "off":
        yield replace(options, recompute="on")
    if not options.gradient_checkpointing:
        yield replace(options, gradient_checkpointing=True)
    if not options.optimizer_in_ram and options.optimizer in MOVABLE:
        yield replace(options, optimizer_in_ram=True)
    if options.batch_size > world:
        yield _split(options, world)
    if options.base_weights != "fp8" and not options.unlock_decoder:
        yield replace(options, base_weights="fp8")
    if options.control_weights != "bf16" and options.precision == "bf16" and options.optimizer != "prodigy":
        yield replace(options, control_weights="bf16")


def _split(options: TrainingOptions, world: int) -> TrainingOptions:
    """The same batch in the fewest more passes that processes can share."""
    each = options.batch_size // world
    parts = next(n for n in range(2, each + 1) if each % n == 0)
    return replace(options, batch_size=options.batch_size // parts, accumulation=options.accumulation * parts)


def _changes(before: TrainingOptions, after: TrainingOptions) -> str:
    """What differs, as a user would set it: "gradient_checkpointing on, batch_size 2, accumulation 2"."""
    said = []
    for name, value in after.as_dict().items():
        if value != getattr(before, name):
            said.append(f"{name} {'on' if value is True else value}")
    return ", ".join(said)


def _beyond(options: TrainingOptions, counter: Counter, world: int) -> str:
    """What would do where no measure does."""
    if options.kind != "controlnet":
        return "choose a dataset of a lower resolution"
    total = counter.needs(replace(options, kind="control_lora"), world).total
    return f"choose kind control_lora (about {total / GB:.1f} GB), or a dataset of a lower resolution"
