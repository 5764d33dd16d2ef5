"""The locked base with the control that is trained on it, in each of the paper's variants."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..files import saving
from ..files.kinds import KINDS, kind_of
from ..keys import State
from ..networks import fp8
from ..networks.control_lora import ControlLora
from ..networks.controlnet import BaseMismatch, ControlBranch, ControlNet, connect
from ..networks.layers import Block, FeedForward, ResBlock
from ..networks.lite import ControlNetLite
from ..networks.network import ControlNetwork
from ..networks.residuals import Residuals
from ..networks.unet import UNet, UNetConfig
from .options import TrainingOptions


class ControlledUNet(nn.Module):
    """A UNet, locked but for its decoder if that is unlocked, and a control: one module, called once a pass.

    Under autocast the control computes as autocast has it, from weights in fp32. A UNet that is locked as a whole
    computes in the dtype of its weights throughout, as it does when pictures are made.
    """

    def __init__(self, unet: UNet, control: ControlNet | ControlNetLite, options: TrainingOptions):
        super().__init__()
        self.unet, self.control = unet, control
        self.middle_only = options.middle_only
        self.dtype = None if options.unlock_decoder else options.dtype
        self.checkpointing = options.gradient_checkpointing
        if isinstance(control, ControlLora):
            control.bind(unet)
        # The locked base is the same in all processes: DistributedDataParallel need not send it, and gloo cannot fp8.
        locked = [name for name, p in self.named_parameters() if not p.requires_grad]
        self._ddp_params_and_buffers_to_ignore: list[str] = locked

    def forward(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, hints: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Prediction (B,4,h,w) for noisy latents; `hints` are (B,C,8h,8w) in [0,1]."""
        encode = self.control.encode_hint
        guided_hint = (
            checkpoint(encode, hints, use_reentrant=False, preserve_rng_state=False)
            if self.checkpointing
            else encode(hints)
        )
        return self.predict(noisy, timesteps, context, guided_hint, y)  # type: ignore[arg-type]

    def predict(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, guided_hint: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """As `forward`, with hints that are encoded already: what sampling calls at every step."""
        residuals = self.control(noisy, timesteps, context, guided_hint, y)
        if self.middle_only:
            residuals = Residuals((None,) * len(residuals.skips), residuals.middle)
        if self.dtype is None:
            return self.unet(noisy, timesteps, context, y, residuals)
        noisy, context = noisy.to(self.dtype), context.to(self.dtype)
        y = None if y is None else y.to(self.dtype)
        with torch.autocast(noisy.device.type, enabled=False):
            return self.unet(noisy, timesteps, context, y, residuals)


def build(
    options: TrainingOptions, base: State, config: UNetConfig, hint_channels: int, begin: ControlNetwork | None = None
) -> ControlledUNet:
    """The controlled UNet at step 0, on the CPU, its control in fp32 or as `control_weights` says.

    `base` holds the whole UNet's weights, ldm keys without prefix. The control begins as a copy of `begin`, of which it
    then has the rank and the hint encoder too; without one, as the seed says, whatever was drawn before. Raises
    controlnet.BaseMismatch where the weights are not those of `config`, or `begin` is no control to train on it.
    """
    if config.in_channels != config.out_channels:
        raise BaseMismatch(
            f"the base UNet takes {config.in_channels} channels (inpainting) and a dataset holds latents of "
            f"{config.out_channels}: train on the model that it was made from; the control fits both"
        )
    full = {key: tensor.to("cpu", torch.float32) for key, tensor in base.items()}
    if begin is not None:
        control = _copied(begin, options, full, config, hint_channels)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            control = _fresh(options, full, config, hint_channels)
            connect(control, options.connections)
    unet = _locked(options, full, config)
    if options.middle_only:
        for parameter in control.zero_convs.requires_grad_(False).parameters():
            nn.init.zeros_(parameter)  # whoever applies the control adds them: what is not trained adds nothing
    for module in control.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().to(options.trained_dtype), p.requires_grad))
    controlled = ControlledUNet(unet, control, options)
    keep_activations(controlled, options)
    return controlled


def keep_activations(controlled: ControlledUNet, options: TrainingOptions) -> None:
    """Say what `controlled` keeps for its backward pass: all, what is costly (`recompute`), or blocks' inputs alone."""
    controlled.checkpointing = options.gradient_checkpointing
    for module in controlled.modules():
        if isinstance(module, Block):
            module.checkpointing = options.gradient_checkpointing
        if isinstance(module, (ResBlock, FeedForward, ControlBranch)):
            module.recomputing = options.recompute != "off"


TRAINED = {"controlnet": ControlNet, "control_lora": ControlLora, "lite": ControlNetLite}
"""The network of each `kind`."""


def _copied(
    begin: ControlNetwork, options: TrainingOptions, base: State, config: UNetConfig, hint_channels: int
) -> ControlNet | ControlNetLite:
    """A network of its own with the weights of `begin` in fp32; a Control-LoRA may become a full copy."""
    what = f"a {begin.kind} cannot be trained on here"
    if mismatch := begin.mismatch(config):
        raise BaseMismatch(f"{what}: {mismatch}")
    if begin.hint_channels != hint_channels:
        raise BaseMismatch(
            f"{what}: its hint has {begin.hint_channels} channels, those of the dataset have {hint_channels}: begin "
            "with another control, or with none"
        )
    network = TRAINED[options.kind]
    metadata = kind_of(begin).metadata(begin)
    if isinstance(begin, ControlLora) and network is ControlNet:
        weights = begin.merged(base)
    elif type(begin) is network:
        weights = begin.state_dict()
    else:
        fitting = next((f"kind {kind}" for kind, each in TRAINED.items() if type(begin) is each), "another control")
        raise BaseMismatch(f"{what}: kind {options.kind} goes on with a {network.kind}: choose {fitting}")
    record = next(kind for kind in KINDS if kind.network is network)
    control = record.build(weights, metadata, device="meta")
    own = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in weights.items()}
    control.load_state_dict(own, assign=True)
    return control.requires_grad_(True)  # type: ignore[return-value]


def _fresh(
    options: TrainingOptions, base: State, config: UNetConfig, hint_channels: int
) -> ControlNet | ControlNetLite:
    if options.kind == "lite":
        return ControlNetLite(config, hint_channels, options.hint_encoder)
    if options.kind == "control_lora":
        return ControlLora.fresh(config, options.rank, hint_channels, options.hint_encoder)
    return saving.fresh(config, base, hint_channels, options.hint_encoder)


def _locked(options: TrainingOptions, base: State, config: UNetConfig) -> UNet:
    """A copy of the base, locked: as a whole in the dtype of the precision (or fp8), or but for its decoder in fp32."""
    dtype = torch.float32 if options.unlock_decoder else options.dtype
    weights = {key: tensor.to(dtype, copy=True) for key, tensor in base.items()}
    if options.base_weights == "fp8":
        unet, weights = UNet(config, operations=fp8, device="meta"), fp8.stored(weights)
    else:
        unet = UNet(config, device="meta")
    unet.load_state_dict(weights, assign=True)
    unet.requires_grad_(False)
    unet.output_blocks.requires_grad_(options.unlock_decoder)
    unet.out.requires_grad_(options.unlock_decoder)
    return unet
