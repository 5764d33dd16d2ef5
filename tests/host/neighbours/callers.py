"""What other packs do to a control before they call it, each in a few lines; the packs themselves where one is named.

Read in shiimizu/ComfyUI-TiledDiffusion a155b1b, BlenderNeko/ComfyUI_TiledKSampler 2fd9b05,
ssitu/ComfyUI_UltimateSDUpscale 34a3c2c and Kosinkadink/ComfyUI-AnimateDiff-Evolved d8d163c.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from graphs import Run, Scene, latent
from torch import Tensor

if TYPE_CHECKING:
    from hosting import Host

Box = tuple[int, int, int, int]
"""Top, left, height and width of a piece of the latent."""


def grid(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """Overlapping tiles of one size that cover the latent, row by row."""

    def starts(size: int) -> list[int]:
        count = max(1, -(-(size - overlap) // (tile - overlap)))
        return [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]

    return [(y, x, tile, tile) for y in starts(height) for x in starts(width)]


def cut(tensor: Tensor, box: Box, scale: int = 1) -> Tensor:
    """The rectangle of a (B,C,H,W); `scale` 8 for pictures."""
    y, x, height, width = (scale * n for n in box)
    return tensor[:, :, y : y + height, x : x + width]


def chain(control: Any) -> Iterator[Any]:
    """The control and those before it."""
    while control is not None:
        yield control
        control = control.previous_controlnet


def repeated(tensor: Tensor, count: int) -> Tensor:
    """`count` rows, starting over or cut off."""
    return tensor[torch.arange(count) % tensor.shape[0]]


# -- TiledDiffusion ---------------------------------------------------------------------------------------------------


@dataclass
class MultiDiffusion:
    """TiledDiffusion's wrapper of the model: tiles are batched, and each control of the chain is given its slices.

    A batch holds all samples of its first tile, then those of the second.
    """

    tile: int = 16
    overlap: int = 8
    at_once: int = 4
    written: dict[Any, Tensor] = field(default_factory=dict)

    def __call__(self, apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, c = args["input"], args["c"]
        boxes = grid(x.shape[2], x.shape[3], self.tile, self.overlap)
        canvas, count = torch.zeros_like(x), torch.zeros_like(x)
        for start in range(0, len(boxes), self.at_once):
            batch = boxes[start : start + self.at_once]
            tiles = torch.cat([cut(x, box) for box in batch])
            given = {k: repeated(v, len(tiles)) if isinstance(v, Tensor) else v for k, v in c.items()}
            t = repeated(args["timestep"], len(tiles))
            if "control" in c:
                given["control"] = self.ask(
                    c["control"], x, batch, (tiles, t, given), {**args, "model": apply_model.__self__}
                )
            for box, part in zip(batch, apply_model(tiles, t, **given).chunk(len(batch)), strict=True):
                cut(canvas, box).add_(part)
                cut(count, box).add_(1)
        return canvas / count

    def ask(self, control: Any, x: Tensor, batch: list[Box], call: tuple, args: dict[str, Any]) -> Any:
        """What the controls give for a batch of tiles of `x`."""
        for i, one in enumerate(chain(control)):
            self.write(one, (i, batch[0], call[0].shape), x, batch)
        return control.get_control_orig(*call, len(args["cond_or_uncond"]), args["c"]["transformer_options"])

    def write(self, control: Any, key: Any, x: Tensor, batch: list[Box]) -> None:
        """Write the slices of a batch of tiles, cut at the first step and kept from then on."""
        import comfy.utils

        if control.cond_hint is None or key not in self.written:
            height, width = (n * control.compression_ratio for n in x.shape[2:])
            whole = control.cond_hint_original
            whole = comfy.utils.common_upscale(whole, width, height, control.upscale_algorithm, "center").to(x)
            whole = repeated(control.preprocess_image(whole), len(x))
            self.written[key] = torch.cat([cut(whole, box, control.compression_ratio) for box in batch])
        control.cond_hint = self.written[key]


class Definition(MultiDiffusion):
    """What tiles are given by definition, without anything written on a control that a run has begun with.

    Every sample of a batch of tiles is a picture of its own, whose hint, mask and strength are cut from the whole.
    """

    def ask(self, control: Any, x: Tensor, batch: list[Box], call: tuple, args: dict[str, Any]) -> Any:
        """What the controls give for the batch as a run of its own of one prompt."""
        before = [(one, dict(one.__dict__)) for one in chain(control)]
        control.cleanup()
        for one in chain(control):
            hint = one.cond_hint_original[:, :3]
            if hasattr(one, "dosing"):
                hint, one.dosing = pieces(hint, one.dosing, x, batch, args["cond_or_uncond"])
            else:
                hint, _ = pieces(hint, None, x, batch, args["cond_or_uncond"])
            one.set_cond_hint(hint, one.strength, one.timestep_percent_range)
        control.pre_run(args["model"], args["model"].model_sampling.percent_to_sigma)
        alone = {"cond_or_uncond": [0], "uuids": args["c"]["transformer_options"]["uuids"][:1], "sigmas": call[1]}
        call[2]["transformer_options"] = {**call[2]["transformer_options"], **alone}
        result = control.get_control_orig(*call, 1, call[2]["transformer_options"])
        for one, attributes in before:
            one.__dict__.update(attributes)
        return result


def pieces(hint: Tensor, dosing: Any, x: Tensor, batch: list[Box], numbers: list[int]) -> tuple[Tensor, Any]:
    """The hint of every sample of a batch of tiles of `x`, and our strength with the dose of each in a mask."""
    from zeroconv.nodes.host.resize import resize

    height, width = (8 * n for n in x.shape[2:])
    count = len(x) // len(numbers)

    def rows(whole: Tensor) -> Tensor:
        each = whole if len(whole) == len(x) else repeated(repeated(whole, count), len(x))
        return torch.cat([cut(each, box, 8) for box in batch])

    hint = rows(resize(hint, height, width, "crop"))
    if dosing is None:
        return hint, None
    mask = torch.ones(1, 1, height, width)
    if dosing.mask is not None:
        mask = resize(dosing.mask, height, width, "crop", smooth=True)
    if dosing.schedule is not None and dosing.schedule.per_image:
        mask = mask * torch.tensor(dosing.schedule.per_image).reshape(-1, 1, 1, 1)
        dosing = replace(dosing, schedule=replace(dosing.schedule, per_image=()))
    if dosing.guidance == "cond_only":
        halves = torch.tensor([float(number == 0) for number in numbers]).repeat_interleave(count)
        mask = repeated(repeated(mask, count), len(x)) * halves.reshape(-1, 1, 1, 1)
        dosing = replace(dosing, guidance="both")
    plain = dosing.mask is None and len(mask) == 1
    return hint, dosing if plain else replace(dosing, mask=rows(mask))


def told_of_tiles(patch: pytest.MonkeyPatch) -> None:
    """Let the host ask controls nothing itself, and begin a run with `cleanup`, as TiledDiffusion's hooks do."""
    import comfy.samplers

    area = comfy.samplers.get_area_and_mult

    def get_area_and_mult(conds: dict[str, Any], *args: Any) -> Any:
        control = conds.get("control")
        if control is not None and not hasattr(control, "get_control_orig"):
            control.get_control_orig = control.get_control
            control.get_control = lambda *_, **__: control
        return area(conds, *args)

    def pre_run_control(model: Any, conds: list[dict[str, Any]]) -> None:
        for cond in conds:
            if "control" in cond:
                with contextlib.suppress(AttributeError):  # of a native Control-LoRA that no run has begun with
                    cond["control"].cleanup()
                cond["control"].pre_run(model, model.model_sampling.percent_to_sigma)

    patch.setattr(comfy.samplers, "get_area_and_mult", get_area_and_mult)
    patch.setattr(comfy.samplers, "pre_run_control", pre_run_control)


def in_tiles(host: Host, scene: Scene, sampler: Callable[..., Tensor] | None, **inputs: Any) -> Run:
    """A sampling in tiles, by a wrapper of the model such as MultiDiffusion(), without hooks when that is `None`."""
    with pytest.MonkeyPatch.context() as patch:
        if sampler is not None:
            told_of_tiles(patch)
            scene = replace(scene, model=scene.model.clone())
            scene.model.set_model_unet_function_wrapper(sampler)
        return host.sample(scene, **{"latent_image": latent(1, 32, 32), "steps": 2, **inputs})


# -- AnimateDiff-Evolved ----------------------------------------------------------------------------------------------


def animatediff(model: Any, length: int = 4, overlap: int = 2) -> Any:
    """A clone of `model` that samples a few frames at a time, and tells each control of the chain which they are."""
    from comfy.patcher_extension import WrappersMP

    def sliding(executor: Any, base: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
        total, count = [torch.zeros_like(x) for _ in conds], torch.zeros_like(x)
        for start in range(0, len(x) - overlap, length - overlap):
            frames = [(start + i) % len(x) for i in range(length)]  # a last window goes on with the first frames
            for cond in itertools.chain.from_iterable(entries for entries in conds if entries):
                for control in reversed(list(chain(cond.get("control")))):
                    if not hasattr(control, "sub_idxs"):
                        raise ValueError(f"Control type {type(control).__name__} may not support required features")
                    control.sub_idxs, control.full_latent_length, control.context_length = frames, len(x), length
            told = {"sub_idxs": frames, "full_length": len(x), "context_length": length}
            options["transformer_options"]["ad_params"] = told
            for whole, part in zip(total, executor(base, conds, x[frames], timestep[frames], options), strict=True):
                whole[frames] += part
            count[frames] += 1
        return [whole / count for whole in total]

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "AnimateDiff", sliding)
    return clone


# -- what samples a piece of the picture as a picture -----------------------------------------------------------------


def cropped(entries: list, boxes: list[Box]) -> list:
    """UltimateSDUpscale's prompts of one batch of tiles: copies of the chain, each with its whole hint cropped."""

    def copied(control: Any) -> Any:
        if control is None:
            return None
        copy = control.copy()
        copy.cond_hint_original = torch.cat([cut(control.cond_hint_original, box, 8) for box in boxes])
        copy.set_previous_controlnet(copied(control.previous_controlnet))
        return copy

    return [[embedding, {**options, "control": copied(options.get("control"))}] for embedding, options in entries]


def slice_written(entries: list, box: Box) -> None:
    """TiledKSampler: the slice of a tile in `cond_hint` of what the host knows for a ControlNet or an adapter."""
    import comfy.controlnet

    for control in itertools.chain.from_iterable(chain(options.get("control")) for _, options in entries):
        given: Any = control  # older hosts give it a device
        if isinstance(control, comfy.controlnet.T2IAdapter):
            given.control_input = None
            given.cond_hint = cut(given.cond_hint_original, box, 8).float().to(given.device)
        elif isinstance(control, comfy.controlnet.ControlLora):
            given.cond_hint = cut(given.cond_hint_original, box, 8).float().to(given.device)
        elif isinstance(control, comfy.controlnet.ControlNet):
            piece = cut(given.cond_hint_original, box, 8)
            given.cond_hint = piece.to(given.control_model.dtype).to(given.device)


# -- the packs themselves ---------------------------------------------------------------------------------------------

_numbers = itertools.count()


def pack(variable: str, patch: pytest.MonkeyPatch, file: str = "__init__.py") -> Any:
    """The pack whose folder this variable of the environment names, or one file of it, loaded as the host loads it."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout")
    name = f"neighbour_{next(_numbers)}"
    inside = [folder] if file == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, Path(folder) / file, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
