"""The card of a bundle: its tables, and its pictures with a caption each."""

import re
from functools import cache

import pytest

from model.frozen.baked import bake
from tests.support.agreement_bundle import build_network, text_tokens
from training.card import bundle_card
from training.plots import pictures

SPLIT = {"bits_per_byte": 1.5, "nats_per_char": 1.0, "perplexity": 20.0, "cold_bits_per_byte": {"64": 2.0}}


@cache
def baked():
    return bake(build_network())


def card(*names: str, notes=None) -> str:
    facts = {
        "data": "shakespeare",
        "steps": 7,
        "tokens_seen": 700,
        "epochs": 0.5,
        "seconds": 3.0,
        "splits": {"valid": SPLIT},
        "spans": baked().spans,
        "state_bytes": 1000,
    }
    return bundle_card(facts, baked(), name="tiny", notes=notes, pictures=names)


def test_pictures_are_linked_beside_the_card_and_explained_in_a_line_each():
    text = card("loss", "spans", "memory_share")
    shown = re.findall(r"!\[([^]]+)\]\((plots/\w+\.png)\)\n\n([A-Z][^\n]+\.)\n", text)
    assert [place for _, place, _ in shown] == ["plots/loss.png", "plots/spans.png", "plots/memory_share.png"]
    assert len({explanation for _, _, explanation in shown}) == 3


def test_every_picture_that_is_drawn_has_its_explanation(tmp_path):
    train = {"kind": "train", "step": 1, "tokens": 9, "seconds": 1.0, "num_steps": 1, "bits_per_byte": 3.0}
    drawn = pictures([train], baked(), text_tokens(50))
    text = card(*drawn)
    for name in drawn:
        assert re.search(rf"\(plots/{name}\.png\)\n\n[A-Z][^\n]+\.\n", text), name


def test_pictures_leave_the_tables_as_they_are():
    without = [line for line in card().splitlines() if line.startswith("|")]
    assert [line for line in card("loss", "spans").splitlines() if line.startswith("|")] == without
    assert len(without) == 3 + 2 + len(baked().spans)


def test_the_curve_comes_before_the_notes_and_the_spans_after_their_table(tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("My own words.")
    text = card("loss", "spans", notes=notes)
    order = [
        text.index(mark) for mark in ("| valid |", "plots/loss.png", "My own words", "| layer |", "plots/spans.png")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("names", [(), ("something_new",)])
def test_a_card_can_do_without_the_usual_pictures(names):
    assert card(*names).count("![") == len(names)
