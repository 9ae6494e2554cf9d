"""Tests that the pictures in docs/ show the bundle that ships, and are legible on a light and on a dark page."""

import json
import re

import pytest

from docs import pictures
from model.bundle import open_bundle
from tests.docs.commands import ROOT
from tests.support.artefacts import SHIPPED

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-24-training-cpu.jsonl"
COMMITTED = sorted(DOCS.glob("*.svg"))


@pytest.mark.parametrize("name", ["state.svg", "spans.svg"])
def test_a_committed_picture_is_what_the_script_draws(name):
    """If it fails after a change of the bundle, run: python -m docs.pictures."""
    assert (DOCS / name).read_text() == pictures.pictures(SHIPPED)[name]


def test_the_script_writes_its_pictures_into_a_folder(tmp_path):
    assert pictures.main(["--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"state.svg", "spans.svg"}


def test_spans_and_bytes_are_those_of_the_card():
    bundle = open_bundle(SHIPPED)
    reaches = pictures.reaches_of(bundle)
    card = json.loads((SHIPPED / "config.json").read_text())["training"]
    assert reaches.by_layer == card["spans"]
    assert reaches.state_bytes == card["state_bytes"]
    for spans, slots in zip(reaches.by_layer, reaches.slots, strict=True):
        assert all(span <= size <= reaches.max_span for span, size in zip(spans, slots, strict=True))


def test_the_gpt_is_that_of_the_benchmark():
    measured = json.loads(RESULTS.read_text().splitlines()[0])["gpt"]
    assert pictures.gpt_like(open_bundle(SHIPPED)).num_parameters == measured["num_parameters"]


@pytest.mark.parametrize("picture", COMMITTED, ids=lambda picture: picture.name)
def test_a_picture_has_colours_for_light_and_dark_and_loads_nothing(picture):
    text = picture.read_text()
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "aria-label" in text
    assert len(text) < 20_000
