"""The pictures that the shipped workflows begin with, where the host's Load Image and Load Video find them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import folder_paths

from ...controlnet_core.files.writing import replacing

EXAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "input"


def lend_examples() -> None:
    """Copy those that the input folder lacks; one that cannot be written is left out, and the log says so.

    Load Image knows files of that folder alone, and no host copies them for a pack.
    """
    folder = Path(folder_paths.get_input_directory())
    for example in EXAMPLES.iterdir():
        try:
            if not (folder / example.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / example.name) as file:
                    shutil.copyfile(example, file)
        except OSError as error:
            logging.getLogger(__name__).warning("%s is not in the input folder: %s", example.name, error)
