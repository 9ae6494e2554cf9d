"""The pictures of a bundle: their content, and that unusual records do not break them."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from model.frozen.baked import bake
from tests.support.agreement_bundle import build_network, text_tokens
from training.plots import (
    BLUE,
    DPI,
    VERMILLION,
    WIDTH,
    canvas,
    draw_loss,
    draw_memory_share,
    draw_spans,
    fit_loss,
    label_ends,
    memory_share,
    pictures,
    short_number,
    smoothed,
    train_curve,
    valid_curve,
)


@pytest.fixture(scope="module")
def baked():
    return bake(build_network())


def train_line(step: int, bits: float, *, num_steps: int = 1) -> dict:
    place = {"kind": "train", "step": step, "tokens": step * 100, "seconds": step / 2}
    return {**place, "num_steps": num_steps, "bits_per_byte": bits}


def valid_line(step: int, bits: float) -> dict:
    return {"kind": "valid", "step": step, "tokens": step * 100, "seconds": step / 2, "bits_per_byte": bits}


def falling(num_steps: int = 200) -> list[dict]:
    metrics = [train_line(step, 2 + 6 / step) for step in range(1, num_steps + 1)]
    return metrics + [valid_line(step, 2.1 + 6 / step) for step in range(50, num_steps + 1, 50)]


def pixels(png: bytes) -> np.ndarray:
    """The pixels of a PNG, [height, width, 3], 0 .. 1."""
    return imread(io.BytesIO(png), format="png")[..., :3]


def where(png: bytes, colour: str) -> np.ndarray:
    """Whether each pixel has a colour, [height, width]."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.abs(pixels(png) - wanted).max(-1) < 0.02


def test_a_bundle_has_three_pictures_as_wide_as_a_page_shows_sharply(baked):
    drawn = pictures(falling(), baked, text_tokens(300))
    assert list(drawn) == ["loss", "spans", "memory_share"]
    for name, png in drawn.items():
        assert png.startswith(b"\x89PNG"), name
        assert pixels(png).shape[1] == WIDTH * DPI, name
        assert len(png) < 200_000, name


def test_without_a_record_there_is_no_curve(baked):
    assert list(pictures([], baked, text_tokens(300))) == ["spans", "memory_share"]


def test_equal_runs_give_equal_pictures():
    assert draw_loss(falling()) == draw_loss(falling())


def test_the_curves_of_training_and_of_the_valid_split_are_told_apart_by_colour():
    both, alone = draw_loss(falling()), draw_loss([line for line in falling() if line["kind"] == "train"])
    assert where(both, BLUE).sum() > 1000
    assert where(both, VERMILLION).sum() > 1000
    assert where(alone, BLUE).sum() > 1000
    assert where(alone, VERMILLION).sum() == 0


def dots_in(png: bytes) -> np.ndarray:
    """Whether each pixel belongs to the dot of a head, [height, width]."""
    picture = pixels(png)
    return (picture[..., 2] > 0.6) & (picture[..., 0] < 0.3)


@pytest.mark.parametrize(
    "metrics",
    [
        [train_line(1, 8.0)],
        [train_line(1, 8.0), valid_line(1, 8.0)],
        [*falling(), valid_line(200, float("nan"))],
        [train_line(step, 2.0) for step in range(1, 50)],
        [train_line(step, 2.0) for step in range(1, 50)] + [valid_line(step, 3.0) for step in range(1, 101)],
    ],
)
def test_a_short_a_flat_and_a_broken_run_are_drawn_too(metrics):
    assert where(draw_loss(metrics), BLUE).any()


def test_a_bar_is_as_high_as_its_share():
    blue = where(draw_memory_share([0.2, 0.8], num_tokens=100), BLUE).sum(0)
    left, right = blue[: len(blue) // 2].max(), blue[len(blue) // 2 :].max()
    assert right / left == pytest.approx(4, rel=0.05)


def test_heads_that_look_farther_have_higher_dots_on_a_log_scale():
    def height(reach: int) -> float:
        """The height of the dot of a head in layer 1, in pixels from the top; bars of medians hide other dots."""
        png = draw_spans([[32, 32, 32], [reach, 32, 32]], max_span=8192, ramp=32)
        right = dots_in(png)[:, int(WIDTH * DPI) // 2 :]
        return float(np.nonzero(right.any(1))[0].min())

    low, middle, high = height(64), height(512), height(4096)
    assert low > middle > high
    assert low - middle == pytest.approx(middle - high, rel=0.03)


@pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (6, 4), (36, 8)])
def test_networks_of_any_depth_have_pictures(num_layers, num_heads):
    spans = [[32 + 7 * head for head in range(num_heads)] for _ in range(num_layers)]
    assert draw_spans(spans, max_span=8192, ramp=32)
    assert draw_memory_share([1.0] * num_layers, num_tokens=1)


def test_a_span_shorter_than_the_ramp_is_inside_the_picture():
    assert dots_in(draw_spans([[3, 3, 5]], max_span=5, ramp=32)).sum() > 500


def test_the_share_on_persistent_vectors_is_that_of_one_pass_over_the_stretch(baked):
    tokens = np.tile(text_tokens(330), 2)[:600]
    _, _, shares = baked.extend_with_memory_share(torch.from_numpy(tokens)[None], baked.allocate(1), [0])
    found = memory_share(baked, tokens)
    assert found == pytest.approx(shares[0].mean(0).tolist(), abs=1e-5)
    assert len(found) == 3
    assert 0 < min(found) <= max(found) < 1


@pytest.mark.slow
def test_only_the_start_of_a_long_valid_split_is_read(baked):
    short = pictures([], baked, np.resize(text_tokens(330), 4096))
    assert pictures([], baked, np.resize(text_tokens(330), 9000)) == short


def test_curves_are_read_from_their_own_lines():
    metrics = [train_line(1, 8.0), valid_line(1, 9.0), {"kind": "spans", "step": 1}, train_line(2, 8.0)]
    for x, expected in (("tokens", [100, 200]), ("seconds", [0.5, 1.0]), ("step", [1, 2])):
        places, values = train_curve(metrics, x=x)
        assert places.tolist() == expected
        assert values.tolist() == [8.0, 8.0]
    places, values = valid_curve(metrics, x="tokens")
    assert (places.tolist(), values.tolist()) == ([100], [9.0])


def test_smoothing_begins_at_the_first_value_and_does_not_lag_at_zero():
    assert smoothed(np.full(50, 3.0), np.ones(50), steps=10) == pytest.approx(np.full(50, 3.0))


def test_smoothing_takes_noise_away_and_keeps_the_mean():
    values = 3 + np.random.default_rng(0).normal(size=2000)
    late = smoothed(values, np.ones(2000), steps=50)[200:]
    assert late.std() < 0.2
    assert late.mean() == pytest.approx(3, abs=0.05)


def test_a_line_that_is_the_mean_of_many_steps_weighs_as_much_as_they():
    one_by_one = smoothed(np.r_[np.full(20, 8.0), np.full(30, 2.0)], np.ones(50), steps=25)[-1]
    at_once = smoothed(np.array([8.0, 2.0]), np.array([20.0, 30.0]), steps=25)[-1]
    assert at_once == pytest.approx(one_by_one)


def test_the_fall_at_the_start_does_not_flatten_the_rest():
    _, axes = canvas("", height=3)
    x = np.arange(1, 1001)
    fit_loss(axes, [(x, 2 + 6 / x), (np.array([]), np.array([]))])
    low, high = axes.get_ylim()
    assert low < 2.006
    assert 2.07 < high < 2.1


def test_a_short_run_beside_a_long_one_stays_in_the_picture():
    _, axes = canvas("", height=3)
    fit_loss(axes, [(np.arange(1000), np.full(1000, 2.0)), (np.arange(10), np.linspace(9, 5, 10))])
    assert axes.get_ylim()[1] > 7


def test_names_of_curves_that_end_together_do_not_collide():
    _, axes = canvas("", height=3)
    axes.set_ylim(0, 1)
    label_ends(axes, [(0.5, "train", BLUE), (0.5, "valid", VERMILLION), (0.505, "other", BLUE)])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert min(np.diff(heights)) >= 0.07


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.5, "0.5"), (950, "950"), (2000, "2 k"), (2.5e6, "2.5 M"), (12e9, "12 B")]
)
def test_large_numbers_are_short(value, text):
    assert short_number(value) == text


@pytest.mark.slow
def test_no_global_state_of_matplotlib_is_touched():
    code = "import sys, training.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
