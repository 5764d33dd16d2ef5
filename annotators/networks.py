"""The networks of learned annotators: which files they are made of, where those come from, and under which licence.

Nothing here is loaded before an annotator that needs it runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of weights or settings in a repository of the Hugging Face hub.

    With a `sha256`, `size` is exact, in bytes, and both are checked; without, the hub's own checksum is, and `size`
    only tells a whole file from a stump: anything from half of it on may be the file.
    """

    repository: str
    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Network:
    """A network: `build` as 'module:function' in this package makes it of the paths of its `files`, in their order.

    `build` gives a torch module in eval mode, in fp32 on the CPU. `commercial` says whether the licence of the weights
    allows commercial use.
    """

    name: str
    build: str
    files: tuple[File, ...]
    licence: str
    commercial: bool = True


def _annotators(name: str, size: int, sha256: str) -> tuple[File]:
    return (File("lllyasviel/Annotators", name, size, sha256),)


NETWORKS: tuple[Network, ...] = (
    # -- edges, lines and drawings -----------------------------------------------------------------------------------
    # lllyasviel/Annotators names no licence for all its files: each has that of the project that it comes from.
    Network(
        "hed",
        "hed:build",
        # In half precision.
        _annotators("ControlNetHED.pth", 29_444_406, "5ca93762ffd68a29fee1af9d495bf6aab80ae86f08905fb35472a083a4c7a8fa"),
        "Apache-2.0 (lllyasviel/ControlNet-v1-1-nightly, annotator/hed)",
    ),
    Network(
        "mlsd",
        "mlsd:build",
        _annotators("mlsd_large_512_fp32.pth", 6_341_481, "5696f168eb2c30d4374bbfd45436f7415bb4d88da29bea97eea0101520fba082"),
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
)
"""Every network that an annotator may ask for."""
