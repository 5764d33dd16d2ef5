"""A model's VAE and text encoder without a host: from its own files, through transformers and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ZeroConvError
from ..files.lora import TEXTS, merged, text_names
from ..files.reading import read_weights
from ..files.scales import unscaled
from ..keys import State, Weights, numbered, some
from .writer import EncodePictures, EncodePrompt

SCALE, SCALE_XL = 0.18215, 0.13025
"""Latents times this are what the UNet sees: of SD1.x and SD2.x, and of SDXL (CompVis/stable-diffusion, Stability-AI/
generative-models, their configurations' scale_factor)."""

VAE = "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
"""Where a checkpoint keeps a text encoder with transformers' names: SD1.x and SDXL's first."""
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
"""And one with OpenCLIP's: SD2.x and SDXL's second."""

HEAD = 64
"""Channels of an attention head, in all text encoders that were published."""


class EncoderError(ZeroConvError):
    """Encoders that cannot be had; the message says what is missing."""


@dataclass(frozen=True)
class Encoders:
    """What a dataset is encoded with."""

    pictures: EncodePictures
    prompt: EncodePrompt


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A CLIP text model behind its tokenizer; `padding` is the token that fills a prompt up.

    With `penultimate` it gives what goes into the last layer, without the final norm, as SDXL has it.
    """

    model: Any
    tokenizer: Any
    padding: int
    penultimate: bool

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Context (T,C), one piece of the model's length after another, and the first piece's pooled output (D,)."""
        start, *words, end = self.tokenizer(prompt, verbose=False)["input_ids"]
        room = self.model.config.max_position_embeddings - 2
        pieces = [words[i : i + room] for i in range(0, max(1, len(words)), room)]
        tokens = [[start, *piece, end, *[self.padding] * (room - len(piece))] for piece in pieces]
        found = self.model(torch.tensor(tokens, device=self.model.device), output_hidden_states=True)
        states = found.hidden_states[-2] if self.penultimate else found.last_hidden_state
        pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        return rearrange(states, "pieces t c -> (pieces t) c"), pooled[0]


def read(base: Path, tokenizer: Path | None = None, vae: Path | None = None, loras: Sequence[Path] = ()) -> Encoders:
    """The encoders of a checkpoint, or of a folder in diffusers' layout, on CUDA where there is one.

    What they give is what ComfyUI's VAE Encode and CLIP Text Encode give, but that parentheses are no weights.
    `tokenizer` is the folder of CLIP's vocabulary, which no checkpoint holds; None is that of the ComfyUI that this
    pack lies in. `vae` is one to take in place of the base's own (`read_vae`); `loras` are merged into the text
    encoder. Raises EncoderError, and LoadError for a file that cannot be read.
    """
    texts = _texts(base, tokenizer)
    network, scale = read_vae(vae or base, xl=len(texts) > 1)
    place = _place()
    network.to(place)

    @torch.no_grad()
    def encode_pictures(pictures: Tensor) -> Tensor:
        return network.encode(pictures.to(place) * 2 - 1).latent_dist.mode() * scale

    return Encoders(encode_pictures, _prompts(texts, loras))


def read_prompts(base: Path, tokenizer: Path | None = None, loras: Sequence[Path] = ()) -> EncodePrompt:
    """The encoder of prompts alone; as `read` otherwise."""
    return _prompts(_texts(base, tokenizer), loras)


def _texts(base: Path, tokenizer: Path | None) -> list[TextEncoder]:
    return _of_folder(base) if base.is_dir() else _of_checkpoint(base, tokenizer or _found_tokenizer())


def _prompts(texts: Sequence[TextEncoder], loras: Sequence[Path]) -> EncodePrompt:
    """What encodes a prompt with a model's text encoders, once `loras` are merged into them."""
    for text, prefix in zip(texts, TEXTS[len(texts)]):
        weights = text.model.state_dict()
        text.model.load_state_dict(merged(weights, text_names(weights), prefix, loras))
        text.model.eval().to(_place())

    def encode_prompt(prompt: str) -> tuple[Tensor, Tensor | None]:
        contexts, pooled = zip(*(text(prompt) for text in texts))
        return torch.cat(contexts, dim=-1), pooled[-1] if len(texts) > 1 else None

    return encode_prompt


def _place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoder(vae: Path, xl: bool, place: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes pictures (B,3,8h,8w) in [0,1], on the CPU, of latents (B,4,h,w) as the UNet sees them (`read_vae`).

    The VAE is on the device `place` only while it works, on one picture after the other.
    """
    network, scale = read_vae(vae, xl)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        try:
            network.to(place)
            pictures = [network.decode(one.to(place, torch.float32) / scale).sample.cpu() for one in latents.split(1)]
        finally:
            network.to("cpu")
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    return decode


def read_vae(path: Path, xl: bool) -> tuple[Any, float]:
    """diffusers' AutoencoderKL, and what its latents are multiplied by for the UNet; `xl` for SDXL.

    Of a checkpoint, of a VAE's own file in ldm's layout, or of a folder of a model or a VAE in diffusers' layout.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae = _loaded(_library("diffusers").AutoencoderKL, folder, low_cpu_mem_usage=False)  # which asks for accelerate
        return vae.eval(), vae.config.scaling_factor
    if not path.is_file():
        raise EncoderError(f"{path}: there is no such file: give a checkpoint, or a folder in diffusers' layout")
    state = unscaled(read_weights(path)[0])
    own = _part(state, VAE) or dict(state)
    if not numbered(own, "encoder.down."):
        raise EncoderError(f"{path.name} holds no VAE: {_GIVE}")
    scale = SCALE_XL if xl else SCALE
    try:
        return _vae(own, scale).eval(), scale
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise _unbuilt(path, error) from error


_GIVE = (
    "give a whole checkpoint, or a folder in diffusers' layout, or make the dataset with the node Make Control Dataset"
)


def _unbuilt(path: Path, error: Exception) -> EncoderError:
    return EncoderError(f"{path.name}: its encoders cannot be built: {' '.join(str(error).split())[:200]}")


# -- a folder in diffusers' layout -------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> list[TextEncoder]:
    count = sum((folder / name).is_dir() for name in ("text_encoder", "text_encoder_2"))
    if not count:
        raise EncoderError(
            f"{folder} holds no model: expected a folder in diffusers' layout, with vae/, text_encoder/ and "
            "tokenizer/. With lab/weights take cached = true, and make the dataset again where a prompt is not in it"
        )
    transformers = _library("transformers")

    def text(ending: str, kind: Any) -> TextEncoder:
        model = _loaded(kind, folder / f"text_encoder{ending}")
        tokenizer = _loaded(transformers.CLIPTokenizer, folder / f"tokenizer{ending}")
        return TextEncoder(model, tokenizer, tokenizer.pad_token_id, penultimate=count > 1)

    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    return [text(ending, kind) for ending, kind in list(zip(("", "_2"), kinds))[:count]]


def _loaded(kind: Any, folder: Path, **how: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **how)
    except (OSError, ValueError) as error:
        raise EncoderError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from error


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def _of_checkpoint(path: Path, tokenizer: Path | None) -> list[TextEncoder]:
    if not path.is_file():
        raise EncoderError(f"{path}: there is no such file: give a checkpoint, or a folder in diffusers' layout")
    state = unscaled(read_weights(path)[0])
    clips, open_clips = ([prefix for prefix in kinds if some(starts=prefix)(state)] for kinds in (CLIP, OPEN_CLIP))
    if not (clips or open_clips):
        raise EncoderError(f"{path.name} holds no text encoder: {_GIVE}")
    if tokenizer is None:
        raise EncoderError(
            "no tokenizer was found: give the folder of CLIP's vocab.json and merges.txt as tokenizer in [model]; "
            "ComfyUI has one in comfy/sd1_tokenizer, models in diffusers' layout in tokenizer/"
        )
    xl = bool(clips and open_clips)
    words = _loaded(_library("transformers").CLIPTokenizer, tokenizer)
    try:
        texts = [TextEncoder(_clip(_part(state, prefix)), words, words.eos_token_id, xl) for prefix in clips]
        return texts + [TextEncoder(_open_clip(_part(state, prefix), xl), words, 0, xl) for prefix in open_clips]
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise _unbuilt(path, error) from error


def _part(state: State, prefix: str) -> Weights:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _vae(state: Weights, scale: float) -> Any:
    """ldm's autoencoder, its sizes read from shapes."""
    levels = numbered(state, "encoder.down.")
    model = _library("diffusers").AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[len(state[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)],
        layers_per_block=numbered(state, "encoder.down.0.block."),
        latent_channels=len(state["quant_conv.weight"]) // 2,
        scaling_factor=scale,
    )
    convert = _library("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    model.load_state_dict(convert(state, model.config))
    return model


def _clip(state: Weights) -> Any:
    """A text model with transformers' names, which some files give without the first of them."""
    named = state if some(starts="text_model.")(state) else {f"text_model.{key}": x for key, x in state.items()}
    transformers = _library("transformers")
    return _filled(transformers.CLIPTextModel, named, "quick_gelu")


def _open_clip(state: Weights, whole: bool) -> Any:
    """A text model with OpenCLIP's names; unless it is asked for as a `whole`, without its last layer, as SD2.x is."""
    transformers = _library("transformers")
    convert = _library("diffusers.loaders.single_file_utils").convert_open_clip_checkpoint
    width = SimpleNamespace(hidden_size=len(state["ln_final.weight"]))  # for weights without a projection to tell it
    named = convert(SimpleNamespace(config=width), state, prefix="")
    if whole:
        return _filled(transformers.CLIPTextModelWithProjection, named, "gelu")
    last = f"text_model.encoder.layers.{numbered(named, 'text_model.encoder.layers.') - 1}."
    kept = {key: x for key, x in named.items() if not key.startswith((last, "text_projection."))}
    return _filled(transformers.CLIPTextModel, kept, "gelu")


def _filled(kind: Callable[[Any], Any], named: State, activation: str) -> Any:
    """A text model of the sizes that these weights have, with these weights."""
    embedding = named["text_model.embeddings.token_embedding.weight"]
    projection = named.get("text_projection.weight", embedding.T)
    config = _library("transformers").CLIPTextConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=len(named["text_model.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=numbered(named, "text_model.encoder.layers."),
        num_attention_heads=max(1, embedding.shape[1] // HEAD),
        max_position_embeddings=len(named["text_model.embeddings.position_embedding.weight"]),
        hidden_act=activation,
        projection_dim=len(projection),
        eos_token_id=len(embedding) - 1,
    )
    model = kind(config)
    own = model.state_dict()
    model.load_state_dict({key: tensor for key, tensor in named.items() if key in own or "position_ids" not in key})
    return model


# -- what is installed -------------------------------------------------------------------------------------------------


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise EncoderError(
            f"{package} is needed to encode without ComfyUI ({error}): run `pip install {package}`, or make the "
            "dataset with the node Make Control Dataset"
        ) from error


def _found_tokenizer() -> Path | None:
    """The tokenizer of the ComfyUI in whose custom_nodes this pack lies."""
    folder = Path(__file__).absolute().parents[2].parent.parent / "comfy" / "sd1_tokenizer"
    return folder if folder.is_dir() else None
