"""A server that is given what it should not be: each prompt ends with one sentence, and the next one is right."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from zeroconv.devtools.comfyui import HostError

if TYPE_CHECKING:
    from zeroconv.devtools.comfyui import HostServer

PROMPT = "a red ball"
GRAPH: dict[str, Any] = {
    "model": {"class_type": "LoadLabModel", "inputs": {}},
    "scene": {"class_type": "LabScene", "inputs": {"seed": 3, "size": 128, "figure": True, "solids": 1}},
    "control": {
        "class_type": "LoadControlNet",
        "inputs": {"control_net_name": "lab_depth.safetensors", "weight_dtype": "default", "control_type": "auto"},
    },
    "apply": {
        "class_type": "ApplyControl",
        "inputs": {
            "model": ["model", 0], "control_net": ["control", 0], "image": ["scene", 1], "strength": 1.0, "start": 0.0,
            "end": 1.0, "unit": "percent", "guidance": "both", "resize": "crop",
        },
    },
    "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": PROMPT}},
    "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": ""}},
    "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
    "sampler": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["apply", 0], "positive": ["positive", 0], "negative": ["negative", 0],
            "latent_image": ["latent", 0], "seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler",
            "scheduler": "normal", "denoise": 1.0,
        },
    },
    "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]}},
    "shown": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
}  # fmt: skip


def changed(name: str, **inputs: Any) -> dict[str, Any]:
    """The graph with other inputs of one node."""
    return {**GRAPH, name: {**GRAPH[name], "inputs": {**GRAPH[name]["inputs"], **inputs}}}


def shown(host_server: HostServer) -> str:
    """What the graph shows when nothing of it is kept from before."""
    host_server.post("/free", {"unload_models": True, "free_memory": True})
    ((picture,),) = host_server.images(host_server.run(GRAPH, timeout=120)).values()
    return hashlib.sha256(picture).hexdigest()


@pytest.fixture(scope="module")
def right(host_server: HostServer) -> str:
    """What the graph shows before anything hostile came."""
    return shown(host_server)


def schedule(**inputs: Any) -> dict[str, Any]:
    given = {"curve": "custom", "keyframes": "0: 1", "unit": "window", "per_image": "", **inputs}
    return {"1": {"class_type": "ControlSchedule", "inputs": given}}


def loaded(name: str) -> dict[str, Any]:
    graph = {"1": {"class_type": "LoadControlNet", "inputs": {**GRAPH["control"]["inputs"], "control_net_name": name}}}
    return {**graph, "2": {"class_type": "InspectControl", "inputs": {"control_net": ["1", 0]}}}


MERGED: dict[str, Any] = {
    **changed("sampler", model=["merge", 0]),
    "merge": {
        "class_type": "ModelMergeSimple",
        "inputs": {"model1": ["model", 0], "model2": ["apply", 0], "ratio": 0.5},
    },
}
LATIN = os.fsdecode(b"lat\xe9.safetensors")
FILES = {
    LATIN: b"<html>",
    "high.safetensors": save({"controlnet_cond_embedding.blocks.999999999.x": torch.ones(1)}),
    "line\nbreak.safetensors": b"",
}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a name that is no UTF-8": (loaded(LATIN), r"lat\udce9.safetensors: this is an HTML page"),
    "a name of two lines": (loaded("line\nbreak.safetensors"), r"line\nbreak.safetensors: the file is empty"),
    "a key with a high number": (loaded("high.safetensors"), "high.safetensors: input_blocks.0.0.weight is missing"),
    "half a character": (schedule(keyframes="0: 1 \ud800"), r"found '\ud800'"),
    "half a character as a number": (schedule(per_image="\ud800"), r'found "\ud800"'),
    "a file name": (
        {
            **loaded("lab_depth.safetensors"),
            "3": {
                "class_type": "SaveControlNet",
                "inputs": {
                    "control_net": ["1", 0], "filename": "\ud800", "layout": "ldm", "dtype": "as loaded",
                    "content": "control",
                },
            },
        },
        r"has a part '\ud800'",
    ),
    "strength NaN": (changed("apply", strength=float("nan")), "a strength is a number up to 100, found nan"),
    "model2 of a merge": (MERGED, "goes into model2 of ModelMergeSimple (node merge)"),
    "a strength of 1e308": (schedule(keyframes="0: 1e308"), "write one up to 100"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_queue_lives_on_and_the_next_prompt_is_right(host_server: HostServer, right: str, kind: str):
    folder = host_server.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    graph, says = HOSTILE[kind]
    with pytest.raises(HostError) as refused:
        host_server.run(graph, timeout=60)
    assert says in str(refused.value)
    details = json.dumps(refused.value.details["exception_message"]) + "".join(refused.value.details["traceback"])
    details.encode("utf-8")
    assert shown(host_server) == right
