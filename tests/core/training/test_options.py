"""Training options: their names are the same everywhere, and a wrong value is answered by what is expected."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from zeroconv.controlnet_core.training.options import (
    MEANINGS,
    STRUCTURE,
    OptionsError,
    TrainingOptions,
    from_dict,
)


def test_every_option_is_explained():
    names = [field.name for field in fields(TrainingOptions)]
    assert list(MEANINGS) == names
    assert set(STRUCTURE) < set(names)


def test_defaults_are_valid_and_frozen():
    options = TrainingOptions()
    assert (options.steps, options.batch_size, options.learning_rate) == (10_000, 4, 1e-5)
    assert options.empty_prompts == 0.5
    assert options.dtype == torch.bfloat16
    assert from_dict(options.as_dict()) == options
    with pytest.raises(FrozenInstanceError):
        options.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps is 0: expected 1 or more"),
        ({"batch_size": 10**9}, "batch_size is 1e\\+09: expected 1 to 4096"),
        ({"steps": 1.5}, "steps is 1.5: expected a whole number"),
        ({"steps": True}, "steps is True: expected a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': expected a number"),
        ({"learning_rate": -1}, "learning_rate is -1: expected 0 to 1"),
        ({"empty_prompts": 1.01}, "empty_prompts is 1.01: expected 0 to 1"),
        ({"empty_prompts": float("nan")}, "empty_prompts is nan: expected 0 to 1"),
        ({"middle_only": 1}, "middle_only is 1: expected true or false"),
        ({"kind": "lora"}, "kind is 'lora': choose one of controlnet, control_lora, lite"),
        ({"precision": "fp8"}, "precision is 'fp8': choose one of fp32, bf16, fp16"),
        ({"kind": "lite", "unlock_decoder": True}, "unlock_decoder goes with kind controlnet or control_lora"),
        ({"middle_only": True, "unlock_decoder": True}, "choose one of the two"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep is 500 and max_timestep 500: expected a smaller"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], said: str):
    with pytest.raises(OptionsError, match=said):
        TrainingOptions(**values)


def test_whole_numbers_do_for_numbers():
    assert TrainingOptions(clip=2).clip == 2.0
    assert type(TrainingOptions(clip=2).clip) is float


def test_unknown_names_are_answered_by_the_nearest():
    with pytest.raises(OptionsError, match="there is no option 'learnin_rate': did you mean learning_rate?"):
        from_dict({"learnin_rate": 1e-4})
    with pytest.raises(OptionsError, match="there is no option 'xyz': the options are steps, batch_size"):
        from_dict({"xyz": 1})
