"""The pictures that the shipped workflows begin with, where the host's Load Image and Load Video find them."""

from __future__ import annotations

import logging
import shutil
from os.path import lexists
from pathlib import Path

import folder_paths

from ...controlnet_core.files.writing import replacing

PLACE = Path(__file__).resolve().parents[2] / "workflows" / "input"
EXAMPLES = ("zeroconv_portrait.jpg", "zeroconv_hole.webp", "zeroconv_clip.mp4")


def lend_examples() -> None:
    """Copy those that the input folder lacks; one that cannot be written is left out, and the log says so.

    Load Image knows files of that folder alone, and no host copies them for a pack.
    """
    folder = Path(folder_paths.get_input_directory())
    for name in EXAMPLES:
        try:
            if not lexists(folder / name):  # a link of the user's that leads nowhere just now is the user's
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / name) as file:
                    shutil.copyfile(PLACE / name, file)
        except OSError as error:
            logging.getLogger(__name__).warning("%s is not in the input folder: %s", name, error)
