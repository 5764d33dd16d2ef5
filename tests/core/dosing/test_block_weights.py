"""One weight for each residual, in written-out numbers."""

import pytest

from zeroconv.controlnet_core.dosing.block_weights import BlockWeights, BlockWeightsError

# 0.825^(12 - i): what the authors' guess mode gives the 12 residuals of SD1.x
SOFT_12 = [
    0.09941, 0.12050, 0.14606, 0.17705, 0.21460, 0.26012, 0.31530, 0.38218, 0.46325, 0.56152, 0.68063, 0.825,
]  # fmt: skip


def test_even_is_one_everywhere():
    assert BlockWeights().weights(12) == (1.0,) * 13
    assert BlockWeights().weights(9) == (1.0,) * 10


def test_soft_is_the_authors_guess_mode():
    assert BlockWeights("soft").weights(12) == pytest.approx([*SOFT_12, 1.0], abs=1e-5)
    # SDXL: 0.825^(9 - i), the middle 1
    assert BlockWeights("soft").weights(9) == pytest.approx([*SOFT_12[3:], 1.0], abs=1e-5)


def test_another_falloff():
    assert BlockWeights("soft", falloff=0.5).weights(3) == (0.125, 0.25, 0.5, 1.0)
    assert BlockWeights("soft", falloff=1.0).weights(3) == BlockWeights("even").weights(3)
    assert BlockWeights("soft", falloff=0.0).weights(3) == BlockWeights("middle only").weights(3)


def test_middle_only():
    assert BlockWeights("middle only").weights(12) == (0.0,) * 12 + (1.0,)


@pytest.mark.parametrize(
    ("n", "shallow", "deep"),
    [
        (12, [1.0] * 6 + [0.0] * 7, [0.0] * 6 + [1.0] * 7),
        (9, [1.0] * 5 + [0.0] * 5, [0.0] * 5 + [1.0] * 5),
    ],
)
def test_the_halves_add_up_to_even(n: int, shallow: list[float], deep: list[float]):
    assert list(BlockWeights("shallow half").weights(n)) == shallow
    assert list(BlockWeights("deep half").weights(n)) == deep
    assert [a + b for a, b in zip(shallow, deep, strict=True)] == [1.0] * (n + 1)


def test_middle_multiplies_the_weight_of_the_middle_block():
    presets = ("even", "soft", "middle only", "deep half", "shallow half")
    assert [BlockWeights(p, middle=0.3).weights(9)[-1] for p in presets] == [0.3, 0.3, 0.3, 0.3, 0.0]


def test_custom_weights_are_taken_as_they_are():
    nine = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 10.0)
    assert BlockWeights("custom", skips=nine, middle=0.5).weights(9) == (*nine, 0.5)


@pytest.mark.parametrize(("given", "asked"), [(9, 12), (12, 9)])
def test_custom_weights_of_another_family_are_refused(given: int, asked: int):
    made = BlockWeights("custom", skips=(1.0,) * given)
    with pytest.raises(BlockWeightsError, match=f"has {asked} skip.*found {given}.*12 for SD1.x and SD2.x, 9 for SDXL"):
        made.weights(asked)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "hard"}, "even, soft, middle only, deep half, shallow half, custom, found 'hard'"),
        ({"preset": "soft", "falloff": 1.5}, "between 0 and 1, found 1.5"),
        ({"preset": "soft", "falloff": float("nan")}, "between 0 and 1, found nan"),
        ({"preset": "custom"}, "custom block weights are empty"),
        ({"preset": "custom", "skips": (1.0, -0.5)}, "between 0 and 10, found -0.5"),
        ({"preset": "custom", "skips": (1.0, 11.0)}, "between 0 and 10, found 11"),
        ({"middle": float("nan")}, "between 0 and 10, found nan"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(options: dict, says: str):
    with pytest.raises(BlockWeightsError, match=says):
        BlockWeights(**options)
