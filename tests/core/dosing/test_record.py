"""A record of what residuals met, in written-out numbers."""

import math

import pytest
import torch
from torch import Tensor

from zeroconv.controlnet_core.dosing.clock import Clock, Moment
from zeroconv.controlnet_core.dosing.record import TOGETHER, Panel, Record, RecordError, Row, power, table
from zeroconv.controlnet_core.networks.residuals import Residuals

CLOCK = Clock(lambda percent: 10 * (1 - percent), (8.0, 4.0, 2.0, 0.0))


def at(sigma: float) -> Moment:
    return CLOCK.at(sigma)


def flat(*rows: float) -> Tensor:
    """(B,3,2,2): one constant for each sample."""
    return torch.tensor(rows)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def powers(*rows: tuple[float, ...], encoder: tuple = ()) -> Residuals:
    """What a UNet says: the powers of its skip connections and its middle block, given as RMS for each sample."""
    return Residuals.of(
        (torch.tensor(row).square() for row in rows), [torch.tensor(row).square() for row in encoder] if encoder else ()
    )


def begun() -> Record:
    record = Record()
    record.start()
    return record


def ratios(record: Record, panel: int = 0) -> list[tuple[float | None, ...]]:
    return [row.ratios for row in record.panels[panel].rows]


def test_power_is_the_mean_square_of_each_sample():
    tensor = torch.tensor([1.0, -3.0, 0.0, 2.0]).reshape(2, 2, 1, 1)
    assert power(tensor).tolist() == [5.0, 2.0]
    assert power(tensor.half()).dtype == torch.float32


def test_a_ratio_is_the_residuals_rms_against_what_it_joins():
    record = begun()
    given = Residuals((flat(0.5, 0.5), None), flat(3.0, 3.0))
    record.add("depth", at(4.0), given)
    record.met(at(4.0), powers((2.0, 2.0), (1.0, 1.0), (4.0, 4.0)))
    assert record.panels == (Panel("depth", (Row(1, 4.0, (0.25, None, 0.75)),)),)
    assert given.middle is not None and given.middle.eq(3.0).all()


def test_rms_is_not_the_mean():
    """Samples of 3 and 4 against 5 and 5: the root of the mean square is sqrt(12.5) / 5."""
    record = begun()
    record.add("depth", at(4.0), Residuals((flat(3.0, 4.0),), None))
    record.met(at(4.0), powers((5.0, 5.0), (1.0, 1.0)))
    assert ratios(record) == [(pytest.approx(math.sqrt(12.5) / 5), None)]


def test_samples_without_control_are_not_counted():
    """The second sample is the half of guidance that gets no control; its skip connection is another."""
    record = begun()
    record.add("depth", at(4.0), Residuals((flat(1.0, 0.0),), flat(2.0, 0.0)))
    record.met(at(4.0), powers((2.0, 100.0), (8.0, 100.0)))
    assert ratios(record) == [(0.5, 0.25)]


def test_a_residual_of_zeros_is_zero_and_not_nothing():
    record = begun()
    record.add("fresh", at(4.0), Residuals((flat(0.0, 0.0),), None))
    record.met(at(4.0), powers((2.0, 2.0), (8.0, 8.0)))
    assert ratios(record) == [(0.0, None)]


def test_calls_of_one_sigma_are_averaged_and_others_kept_apart():
    record = begun()
    for sigma, residual in ((8.0, 0.2), (4.0, 0.4), (4.0, 0.8), (3.0, 0.1)):
        record.add("depth", at(sigma), Residuals((flat(residual),), None))
        record.met(at(sigma), powers((1.0,), (1.0,)))
    rows = record.panels[0].rows
    assert [(row.step, row.sigma) for row in rows] == [(0, 8.0), (1, 4.0), (1, 3.0)]
    assert [row.ratios[0] for row in rows] == pytest.approx([0.2, 0.6, 0.1])


def test_a_sigma_without_control_is_a_row_of_nothing():
    record = begun()
    record.met(at(8.0), powers((1.0,), (1.0,)))
    record.add("depth", at(4.0), Residuals((flat(0.5),), None))
    record.met(at(4.0), powers((1.0,), (1.0,)))
    assert ratios(record) == [(None, None), (0.5, None)]


def test_no_control_at_all_is_one_panel_of_nothing():
    record = begun()
    record.add("attention only", at(8.0), Residuals((None, None), None))
    record.met(at(8.0), powers((1.0,), (1.0,), (1.0,)))
    assert record.panels == (Panel(TOGETHER, (Row(0, 8.0, (None, None, None)),)),)
    assert "acted nowhere" in table(record)


def test_the_sum_is_shown_only_where_it_says_more():
    depth, pose = Residuals((flat(0.5),), None), Residuals((flat(-0.3),), flat(0.1))
    record = begun()
    record.add("depth", at(8.0), depth)
    record.add(TOGETHER, at(8.0), depth)
    record.met(at(8.0), powers((1.0,), (1.0,)))
    assert [panel.title for panel in record.panels] == ["depth"]
    record.add("depth", at(4.0), depth)
    record.add("pose", at(4.0), pose)
    record.add(TOGETHER, at(4.0), depth + pose)
    record.met(at(4.0), powers((1.0,), (1.0,)))
    assert [panel.title for panel in record.panels] == ["depth", "pose", TOGETHER]
    assert ratios(record, 2) == [(0.5, None), (pytest.approx(0.2), pytest.approx(0.1))]


def test_the_sum_of_one_control_and_another_loaders_is_kept():
    record = begun()
    record.add("depth", at(8.0), Residuals((flat(0.5),), None))
    record.add(TOGETHER, at(8.0), Residuals((flat(0.7),), None))
    record.met(at(8.0), powers((1.0,), (1.0,)))
    assert [panel.title for panel in record.panels] == ["depth", TOGETHER]


def test_two_controls_of_one_name_are_told_apart():
    record = begun()
    for residual in (0.1, 0.2, 0.3):
        record.add("depth", at(8.0), Residuals((flat(residual),), None))
    record.met(at(8.0), powers((1.0,), (1.0,)))
    found = {panel.title: panel.rows[0].ratios[0] for panel in record.panels}
    assert found == {
        "depth": pytest.approx(0.1),
        "depth (2)": pytest.approx(0.2),
        "depth (3)": pytest.approx(0.3),
    }


def test_what_joins_the_encoder_is_measured_against_the_blocks_output():
    record = begun()
    record.add("sketch", at(8.0), Residuals((None, None), flat(1.0), (None, flat(0.6))))
    record.met(at(8.0), powers((1.0,), (9.0,), (4.0,), encoder=((1.0,), (2.0,))))
    assert {panel.title: panel.rows[0].ratios for panel in record.panels} == {
        "sketch": (None, None, 0.25),
        "sketch, added in the encoder": (None, pytest.approx(0.3), None),
    }


def test_a_control_in_the_encoder_alone_has_one_panel():
    record = begun()
    record.add("sketch", at(8.0), Residuals((None,), None, (flat(0.5),)))
    record.add(TOGETHER, at(8.0), Residuals((None,), None, (flat(0.5),)))
    record.met(at(8.0), powers((9.0,), (4.0,), encoder=((1.0,),)))
    assert [panel.title for panel in record.panels] == ["sketch, added in the encoder"]


def test_what_no_unet_call_met_is_forgotten():
    """A control was asked and the UNet was not called: the next sigma starts anew."""
    record = begun()
    record.add("depth", at(8.0), Residuals((flat(9.0),), None))
    record.met(at(4.0), powers((1.0,), (1.0,)))
    record.met(at(8.0), powers((1.0,), (1.0,)))
    assert ratios(record) == [(None, None), (None, None)]


def test_each_sampling_starts_over():
    record = begun()
    record.add("depth", at(8.0), Residuals((flat(0.5),), None))
    record.met(at(8.0), powers((1.0,), (1.0,)))
    record.add("depth", at(4.0), Residuals((flat(0.5),), None))  # cancelled before the UNet ran
    record.start()
    record.met(Clock(lambda percent: 10 * (1 - percent), (3.0, 1.0, 0.0)).at(1.0), powers((1.0,), (1.0,)))
    assert record.panels == (Panel(TOGETHER, (Row(1, 1.0, (None, None)),)),)


def test_one_sample_may_stand_for_all():
    """The host's T2I-Adapter hands out one sample for a whole batch."""
    record = begun()
    record.add("sketch", at(8.0), Residuals((flat(0.5), flat(1.0, 1.0)), None))
    record.add("zero", at(8.0), Residuals((flat(0.0), None), None))
    record.met(at(8.0), powers((1.0, 7.0), (1.0, 3.0), (1.0, 1.0)))
    assert ratios(record, 0) == [(pytest.approx(0.1), pytest.approx(5**-0.5), None)]
    assert ratios(record, 1) == [(0.0, None, None)]


def test_a_split_batch_is_refused():
    record = begun()
    record.add("depth", at(8.0), Residuals((flat(0.5, 0.5),), None))
    with pytest.raises(RecordError, match="depth made residuals for 2 samples and the model was called with 1"):
        record.met(at(8.0), powers((1.0,), (1.0,)))


def test_a_record_without_a_sampling_says_what_to_connect():
    with pytest.raises(RecordError, match="connect the model of Record Control to the sampler"):
        table(Record())


def test_the_table():
    record = begun()
    record.add("depth", at(8.0), Residuals((flat(0.5), flat(0.031)), None))
    record.met(at(8.0), powers((1.0,), (1.0,), (1.0,)))
    record.met(at(4.0), powers((1.0,), (1.0,), (1.0,)))
    assert table(record).splitlines() == [
        "depth",
        "acted at 1 of 2 sigmas; RMS in percent of what each residual joins: mean 26.6, most 50.0 at 0 in step 0",
        "step   sigma      0      1    mid",
        "   0   8.000   50.0    3.1      -",
        "   1   4.000      -      -      -",
    ]
