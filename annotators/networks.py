"""The networks of learned annotators: which files they are made of, where those come from, and under which licence.

Nothing here is loaded before an annotator that needs it runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of weights or settings in a repository of the Hugging Face hub; `sha256` where it is known."""

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


NETWORKS: tuple[Network, ...] = ()
"""Every network that an annotator may ask for."""
