"""Captions: those that cannot be used, and those of tags in several forms, so that no order of them is learned."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from ..errors import ZeroConvError


class PromptError(ZeroConvError):
    """A prompt that a text encoder does not take; the message is the reason alone."""


def forms(prompt: str, name: str, count: int, dropout: float, keep: int) -> tuple[str, ...]:
    """`count` forms of a caption: itself, and its tags, which commas part, in other orders.

    In these each tag is left out with probability `dropout`; the first `keep` tags stay where they are. `name` of the
    picture decides the draws. (As shuffle_caption, caption_tag_dropout_rate and keep_tokens of kohya-ss/sd-scripts.)
    """
    tags = [tag.strip() for tag in prompt.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    found = [prompt]
    for number in range(1, count):
        draw = generator(f"{name}\n{number}")
        order = [rest[i] for i in draw.permutation(len(rest))]
        found.append(", ".join([*first, *(tag for tag in order if draw.random() >= dropout)]))
    return tuple(found)


def generator(text: str) -> np.random.Generator:
    """Chance that depends on a text alone, the same everywhere."""
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
