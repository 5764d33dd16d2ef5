"""The lab's words and their token ids in the SD1 CLIP vocabulary, and the tokenizer for them.

The embedded text encoder ships only the rows of these tokens; the host's own tokenizer gives the same ids, because
each word here is a single token of the published byte-pair vocabulary (openai/clip-vit-large-patch14, vocab.json).
"""

from __future__ import annotations

import re

from ..controlnet_core.data.captions import PromptError

START, END, LENGTH = 49406, 49407, 77

COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SOLIDS = ("sphere", "cube", "cone", "cylinder")
GROUNDS = ("sand", "grass", "stone", "wood", "snow")

TOKEN_IDS: dict[str, int] = {
    "a": 320, "an": 550, "and": 537, "on": 525, "ground": 2461, "empty": 7893, ",": 267,
    "person": 2533, "sphere": 6987, "cube": 11353, "cone": 10266, "cylinder": 22092,
    "red": 736, "orange": 4287, "yellow": 4481, "green": 1901, "teal": 22821, "blue": 1746,
    "purple": 5496, "pink": 3360,
    "sand": 5094, "grass": 5922, "stone": 2441, "wood": 1704, "snow": 2583,
    # The paper's "insufficient" prompt: a high-quality, detailed, and professional image.
    "high": 1400, "-": 268, "quality": 3027, "detailed": 12609, "professional": 4774, "image": 2867,
}  # fmt: skip
"""Each word (or punctuation mark) of the lab and its CLIP token id."""

INSUFFICIENT_PROMPT = "a high-quality, detailed, and professional image"
"""The paper's prompt that says nothing about the picture (section 4.2)."""


class UnknownWord(PromptError):
    """A prompt holds a word that the embedded text encoder has no token for."""


def tokenize(prompt: str) -> list[int]:
    """The 77 token ids of a prompt: start, one per word, end, then end as padding, as the SD1 tokenizer gives them.

    Raises UnknownWord for a word outside the lab's vocabulary and for a prompt of more than 75 words.
    """
    words = re.findall(r"[a-z]+|[^\sa-z]", prompt.lower())
    for word in words:
        if word not in TOKEN_IDS:
            raise UnknownWord(f"the lab has no word {word!r}; it knows: {' '.join(sorted(TOKEN_IDS))}")
    if len(words) > LENGTH - 2:
        raise UnknownWord(f"prompt has {len(words)} words, the text encoder reads {LENGTH - 2}: shorten it")
    ids = [START, *(TOKEN_IDS[word] for word in words)]
    return ids + [END] * (LENGTH - len(ids))
