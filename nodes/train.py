"""`TrainControlNet` and `TrainingOptions`: a control of the user's own, trained on a cached dataset."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..controlnet_core.training import options as training
from .dataset import ControlDataset

OptionsSocket = io.Custom("TRAINING_OPTIONS")

USUAL = training.TrainingOptions(warmup=500, gradient_checkpointing=True)
"""What the widgets begin with: SD1.5 at 512 x 512 on a GPU of 12 GB and more."""

OFTEN = (
    *("steps", "batch_size", "accumulation", "learning_rate", "warmup", "schedule", "kind", "precision"),
    *("gradient_checkpointing", "sample_every", "held_out", "save_every", "seed"),
)
"""The options that are widgets of TrainControlNet, in this order: saved workflows keep values by place."""

LATER = (
    *("huber", "offset_noise", "min_timestep", "max_timestep", "zero_terminal_snr"),
    *("fit_memory", "recompute", "optimizer_in_ram", "base_weights", "control_weights"),
    *("keep_controls", "control_dtype", "graphs"),
)
"""Those that graphs of earlier versions do not have: they may be left out."""

SELDOM = (
    *("rank", "connections", "hint_encoder", "middle_only", "unlock_decoder", "decoder_learning_rate"),
    *("empty_prompts", "timesteps", "min_snr", "clip", "optimizer", "weight_decay", "ema", "keep"),
    *("sample_steps", "guidance_scale", *LATER),
)
"""Those of TrainingOptions. `prediction` is none: the model says what it predicts."""

MOST = 1_000_000_000
STEPS = {
    **dict.fromkeys(("learning_rate", "decoder_learning_rate"), 1e-7),
    "weight_decay": 1e-4,
    "ema": 1e-5,
    "empty_prompts": 0.01,
    "min_snr": 0.5,
    "huber": 0.01,
    "offset_noise": 0.01,
    "clip": 0.1,
    "guidance_scale": 0.5,
}


class TrainControlNet(io.ComfyNode):
    """Trains a control for a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainControlNet",
            display_name="Train ControlNet (ZeroConv)",
            category="ZeroConv/training",
            description="Trains a control for a model on a dataset of Make Control Dataset. Cancel keeps everything: "
            "queue it again and it goes on, or with fewer steps and it gives what there is. The control goes straight "
            "into Apply ControlNet, and into a file.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL, with its LoRAs. It stays as it is."),
                io.Clip.Input("clip", tooltip="Checked to be the one that the dataset was made with."),
                io.Vae.Input("vae", tooltip="Shows the samples; checked to be the one of the dataset."),
                ControlDataset.Input("dataset"),
                io.String.Input(
                    "name",
                    default="my_control",
                    tooltip="The run's folder, below zeroconv/training of the output folder, and the control's file, "
                    "below zeroconv of the controlnet folder. A run of this name that was stopped goes on; one that is "
                    "finished is not trained again.",
                ),
                *map(_widget, OFTEN),
                io.Combo.Input(
                    "fidelity",
                    options=["structure", "annotator"],
                    default="structure",
                    tooltip="How samples are scored. structure: do they change where their pictures do? annotator: is "
                    "what the dataset's annotator makes of a sample the hint that the sample was made from?",
                ),
                OptionsSocket.Input("options", optional=True, tooltip="The rarer options; without it, the usual ones."),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="A control to begin with instead of a fresh one: a ControlNet, a Control-LoRA, a "
                    "ControlNet-lite or a checkpoint of another run, of Load ControlNet. A run that goes on has its "
                    "own.",
                ),
                ControlDataset.Input(
                    "validation",
                    optional=True,
                    tooltip="Prompts and hints of your own, as Make Control Dataset makes them of your pictures, hints "
                    "and captions: sampled with the held-out pictures and shown below them. The first 16; nothing is "
                    "learned from them.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="control_net"),
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="samples"),
                io.String.Output(display_name="control_net_name"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        dataset: Any,
        name: str,
        fidelity: str,
        options: dict[str, Any] | None = None,
        control_net: Any = None,
        validation: Any = None,
        **chosen: Any,
    ) -> io.NodeOutput:
        from .host.training import train  # with all that trains, which ComfyUI's start does not wait for

        all_of = training.from_dict({**(options or {}), **chosen})
        node_id = cls.hidden.unique_id
        trained = train(model, clip, vae, dataset, name, all_of, fidelity, node_id, control_net, validation)
        shown = {**ui.PreviewImage(trained.plot, cls=cls).as_dict(), **ui.PreviewText(trained.says).as_dict()}
        return io.NodeOutput(trained.control, trained.plot, trained.samples, trained.name, ui=shown)


class TrainingOptions(io.ComfyNode):
    """The options of a training that most trainings leave as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainingOptions",
            display_name="Training Options (ZeroConv)",
            category="ZeroConv/training",
            description="What most trainings leave as it is: the variants of the paper, the loss, the optimizer, and "
            "how the held-out pictures are sampled.",
            inputs=[*map(_widget, SELDOM)],
            outputs=[OptionsSocket.Output(display_name="options")],
        )

    @classmethod
    def execute(cls, **chosen: Any) -> io.NodeOutput:
        training.from_dict(chosen)  # says here what does not go together
        return io.NodeOutput(chosen)


def _widget(name: str) -> Any:
    """The widget of a training option."""
    default, meaning = getattr(USUAL, name), training.MEANINGS[name]
    said: dict[str, Any] = {
        "default": default,
        "tooltip": f"{meaning[0].upper()}{meaning[1:]}.",
        "optional": name in LATER,
    }
    if name in training.CHOICES:
        return io.Combo.Input(name, options=list(training.CHOICES[name]), **said)
    if isinstance(default, bool):
        return io.Boolean.Input(name, **said)
    low, high = training.RANGES[name]
    if isinstance(default, int):
        if name == "seed":
            said["control_after_generate"] = False  # the page would draw another one after each run
        return io.Int.Input(name, min=int(low), max=MOST if high == float("inf") else int(high), **said)
    return io.Float.Input(name, min=float(low), max=min(float(high), 1000.0), step=STEPS[name], **said)
