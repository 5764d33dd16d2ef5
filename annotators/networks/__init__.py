"""The networks of learned annotators: which files they are made of, where those come from, and under which licence.

Nothing here is loaded before an annotator that needs it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..images import AnnotatorError


@dataclass(frozen=True)
class File:
    """One file of weights or settings in a repository of the Hugging Face hub.

    With a `sha256`, `size` is exact, in bytes, and both are checked; without, the hub's own checksum is, and `size`
    only tells weights from a stump of them: anything from half of it on may be the file. A `program` is TorchScript,
    which may read and write files as well as multiply matrices: it needs a checksum, and is loaded with no other.
    """

    repository: str
    name: str
    size: int
    sha256: str | None = None
    program: bool = False


@dataclass(frozen=True)
class Network:
    """A network: `build` as 'module:function' in this folder makes it of the paths of its `files`, in their order.

    `build` gives a torch module in eval mode, in fp32 on the CPU. `commercial` says whether the licence of the weights
    allows commercial use.
    """

    name: str
    build: str
    files: tuple[File, ...]
    licence: str
    commercial: bool = True

    def load(self, paths: Sequence[Path]) -> Any:
        """The network of its files, which lie at these paths.

        Raises AnnotatorError for a program that is not the known one, wherever it came from.
        """
        for file, path in zip(self.files, paths, strict=True):
            if file.program and (found := checksum(path)) != file.sha256:
                raise AnnotatorError(
                    f"{path} is a program with checksum {found}, and {file.name} of {file.repository} has "
                    f"{file.sha256}: it is not run; delete it, so that the published file is fetched"
                )
        module, function = self.build.split(":")
        return getattr(import_module(f".{module}", __package__), function)(*paths)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _annotators(name: str, size: int, sha256: str) -> tuple[File]:
    return (File("lllyasviel/Annotators", name, size, sha256),)


def _marigold(name: str, size: int) -> File:
    return File("prs-eth/marigold-normals-v1-1", name, size)


NETWORKS: tuple[Network, ...] = (
    # -- edges, lines and drawings -----------------------------------------------------------------------------------
    # lllyasviel/Annotators names no licence for all its files: each has that of the project that it comes from.
    Network(
        "hed",
        "hed:build",
        # In half precision.
        _annotators(
            "ControlNetHED.pth", 29_444_406, "5ca93762ffd68a29fee1af9d495bf6aab80ae86f08905fb35472a083a4c7a8fa"
        ),
        "Apache-2.0 (lllyasviel/ControlNet-v1-1-nightly, annotator/hed)",
    ),
    Network(
        "mlsd",
        "mlsd:build",
        _annotators(
            "mlsd_large_512_fp32.pth", 6_341_481, "5696f168eb2c30d4374bbfd45436f7415bb4d88da29bea97eea0101520fba082"
        ),
        "Apache-2.0 (navervision/mlsd)",
    ),
    Network(
        "lineart_realistic",
        "lineart:build",
        _annotators("sk_model.pth", 17_173_511, "c686ced2a666b4850b4bb6ccf0748031c3eda9f822de73a34b8979970d90f0c6"),
        "MIT (carolineec/informative-drawings)",
    ),
    Network(
        "lineart_coarse",
        "lineart:build",
        _annotators("sk_model2.pth", 17_173_511, "30a534781061f34e83bb9406b4335da4ff2616c95d22a585c1245aa8363e74e0"),
        "MIT (carolineec/informative-drawings)",
    ),
    Network(
        "lineart_anime",
        "lineart:build_anime",
        _annotators("netG.pth", 217_631_959, "ccabdcc3f5cf3c07cf65d58776acb21df7dfda825cdc70c9766a93fd62bfc488"),
        "MIT (Mukosame/Anime2Sketch)",
    ),
    # Published as MIT; BIPED, on which it was trained, is offered for research.
    Network(
        "teed",
        "teed:build",
        (File("fal/teed", "5_model.pth", 248_000),),
        "MIT (xavysp/TEED)",
    ),
    # Published as MIT with the code, and beside MistoLine (OpenRAIL++); what it was trained on is not said.
    Network(
        "mteed",
        "teed:build",
        (File("TheMistoAI/MistoLine", "Anyline/MTEED.pth", 248_298),),
        "MIT (TheMistoAI/ComfyUI-Anyline)",
    ),
    Network(
        "lineart_manga",
        "manga:build",
        _annotators("erika.pth", 172_789_563, "badbd6baf013cefbd98993307b02cc14a26c770d067416e4fdecc8720b88feeb"),
        "MIT (ljsabc/MangaLineExtraction_PyTorch)",
    ),
    # -- depth, normals and segments ---------------------------------------------------------------------------------
    Network(
        "dpt_large",
        "depth:build_dpt",
        (File("Intel/dpt-large", "config.json", 942), File("Intel/dpt-large", "model.safetensors", 1_367_456_044)),
        "Apache-2.0",
    ),
    Network(
        "dpt_hybrid",
        "depth:build_dpt",
        (
            File("Intel/dpt-hybrid-midas", "config.json", 1_000),
            File(
                "Intel/dpt-hybrid-midas",
                "pytorch_model.bin",
                489_648_389,
                "b6c4d44f9d96ca3fa76dd3bbb153989a60b4ad5526559f3c598562a368d687ec",
            ),
        ),
        "Apache-2.0",
    ),
    # Of Depth Anything V2 the small network alone: the larger ones are CC-BY-NC-4.0.
    Network(
        "depth_anything_v2_small",
        "depth:build_depth_anything",
        (
            File("depth-anything/Depth-Anything-V2-Small-hf", "config.json", 950),
            File(
                "depth-anything/Depth-Anything-V2-Small-hf",
                "model.safetensors",
                99_173_660,
                "3152477ce0d8d6978d76b995120de97cb5b928701fd0f817769f59e249a16b70",
            ),
        ),
        "Apache-2.0",
    ),
    # Of Depth Anything 3 the base network has this licence, too; the larger ones of any views are CC-BY-NC-4.0.
    Network(
        "depth_anything_3_small",
        "depth_anything_3:build",
        (File("depth-anything/DA3-SMALL", "model.safetensors", 137_000_000),),
        "Apache-2.0",
    ),
    Network(
        "zoedepth",
        "depth:build_zoe",
        (
            File("Intel/zoedepth-nyu-kitti", "config.json", 2_225),
            File(
                "Intel/zoedepth-nyu-kitti",
                "model.safetensors",
                1_380_374_404,
                "c5494fa0938f18d71e215e245472470c3aefebd7b434abd89750e5ae4008e2dc",
            ),
        ),
        "MIT",
    ),
    Network(
        "moge2_small",
        "moge:build",
        (
            File(
                "Ruicheng/moge-2-vits-normal",
                "model.pt",
                140_550_416,
                "79a16621928c2bf0ed04659218c55c01075e950507f40bb3332fb4c873d3e1dc",
            ),
        ),
        "MIT (microsoft/MoGe)",
    ),
    Network(
        "moge2_large",
        "moge:build",
        (File("Ruicheng/moge-2-vitl-normal", "model.pt", 1_324_000_000),),
        "MIT (microsoft/MoGe)",
    ),
    # As of Stable Diffusion 2, which it began as: free for any use that the licence does not name as harmful.
    Network(
        "marigold_normals",
        "marigold:build",
        (
            _marigold("model_index.json", 1_000),
            _marigold("scheduler/scheduler_config.json", 700),
            _marigold("text_encoder/config.json", 700),
            _marigold("text_encoder/model.fp16.safetensors", 681_000_000),
            _marigold("vae/config.json", 900),
            _marigold("vae/diffusion_pytorch_model.fp16.safetensors", 167_000_000),
            _marigold("unet/config.json", 2_000),
            _marigold("unet/diffusion_pytorch_model.fp16.safetensors", 1_730_000_000),
        ),
        "OpenRAIL++-M (prs-eth/Marigold)",
    ),
    Network(
        "oneformer_ade20k",
        "oneformer:build_ade20k",
        (
            File("shi-labs/oneformer_ade20k_swin_large", "config.json", 84_289),
            File(
                "shi-labs/oneformer_ade20k_swin_large",
                "pytorch_model.bin",
                879_517_517,
                "c0b2fe11dfecee6f2f1f315f466946e96f4e94813f3f6d660ff3747b83c28cc9",
            ),
        ),
        "MIT",
    ),
    Network(
        "oneformer_coco",
        "oneformer:build_coco",
        (
            File("shi-labs/oneformer_coco_swin_large", "config.json", 82_600),
            File("shi-labs/oneformer_coco_swin_large", "pytorch_model.bin", 879_000_000),
        ),
        "MIT",
    ),
    # SA-1B, a part of what it was trained on, is offered for research.
    Network(
        "sam2_tiny",
        "sam2:build",
        (
            File("facebook/sam2.1-hiera-tiny", "config.json", 2_000),
            File("facebook/sam2.1-hiera-tiny", "model.safetensors", 156_000_000),
        ),
        "Apache-2.0",
    ),
    # Published as Apache-2.0; Places2, on which it was trained, is offered for research.
    Network(
        "lama",
        "lama:build",
        (
            File(
                "signature-ai/big-lama",
                "big-lama.pt",
                205_669_692,
                "344c77bbcb158f17dd143070d1e789f38a66c04202311ae3a258ef66667a9ea9",
                program=True,
            ),
        ),
        "Apache-2.0 (advimman/lama)",
    ),
    # -- pose --------------------------------------------------------------------------------------------------------
    Network(
        "person_detector",
        "people:build_detector",
        (
            File("PekingU/rtdetr_r50vd_coco_o365", "config.json", 5_110),
            File("PekingU/rtdetr_r50vd_coco_o365", "model.safetensors", 172_000_000),
        ),
        "Apache-2.0",
    ),
    # Published as Apache-2.0; its training began at weights of MAE (facebookresearch/mae, CC BY-NC 4.0).
    Network(
        "pose_estimator",
        "people:build_estimator",
        (
            File("usyd-community/vitpose-base-simple", "config.json", 1_800),
            File("usyd-community/vitpose-base-simple", "model.safetensors", 344_000_000),
        ),
        "Apache-2.0",
    ),
    # Published as Apache-2.0; COCO-WholeBody and UBody, on which it was trained, are offered for research.
    Network(
        "whole_pose_estimator",
        "people:build_whole_estimator",
        (
            File(
                "hr16/DWPose-TorchScript-BatchSize5",
                "dw-ll_ucoco_384_bs5.torchscript.pt",
                135_059_124,
                "d86a0b2b59fddc0901a7076e9f59c9f8602602133ed72511c693fd11eea23d91",
                program=True,
            ),
        ),
        "Apache-2.0 (IDEA-Research/DWPose)",
    ),
)
"""Every network that an annotator may ask for."""
