"""The configuration of a model: what it rejects, and the parameter counts of the paper's five models."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.network.network import AllAttentionLM

SMALL: dict[str, object] = {
    "vocab_size": 11,
    "num_layers": 2,
    "width": 12,
    "num_heads": 3,
    "num_persistent": 5,
    "max_span": 7,
}
WORDS: dict[str, object] = {"vocab_size": 100, "embedding": "adaptive", "adaptive_cutoffs": (20, 50), "adaptive_div": 2}

# The paper's models (arXiv 1907.01470) and their millions of parameters. Vocabularies: the distinct byte values of
# enwik8, the letters and the space of text8, the words of WikiText-103 with its end of line.
ENWIK8, TEXT8, WIKITEXT103 = 205, 27, 267735
PAPER: dict[str, tuple[dict[str, object], int]] = {
    "enwik8_18l": ({"vocab_size": ENWIK8, "num_layers": 18, "num_persistent": 1024, "max_span": 8192}, 39),
    "enwik8_36l": ({"vocab_size": ENWIK8, "num_layers": 36, "num_persistent": 2048, "max_span": 8192}, 114),
    "text8_18l": ({"vocab_size": TEXT8, "num_layers": 18, "num_persistent": 1024, "max_span": 8192}, 38),
    "text8_36l": ({"vocab_size": TEXT8, "num_layers": 36, "num_persistent": 2048, "max_span": 8192}, 114),
    "wikitext103_36l": (
        {
            "vocab_size": WIKITEXT103,
            "num_layers": 36,
            "num_persistent": 2048,
            "max_span": 2048,
            "embedding": "adaptive",
            "adaptive_cutoffs": (20000, 40000, 200000),
            "adaptive_div": 4,
        },
        133,
    ),
}


def build(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | changes)


def paper(name: str) -> ModelConfig:
    return ModelConfig.model_validate({"width": 512, "num_heads": 8} | PAPER[name][0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 1),
        ("num_layers", 0),
        ("width", -12),
        ("num_heads", 0),
        ("num_persistent", 0),
        ("max_span", 0),
        ("span_ramp", 0),
        ("span_init", 1.5),
        ("span_init", -0.5),
        ("dropout", 1.0),
        ("embedding_dropout", -0.25),
        ("adaptive_div", 0),
        ("num_layers", 2.5),
        ("num_layers", "many"),
        ("embedding", "sparse"),
        ("empty_slots", "some"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**{field: value})
    assert [error["loc"][0] for error in caught.value.errors()] == [field]
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 13}, ("width 13", "num_heads 3")),
        ({"adaptive_cutoffs": (3, 6)}, ("adaptive_cutoffs [3, 6]", "embedding = 'adaptive'")),
        ({"embedding": "adaptive"}, ("adaptive_cutoffs []", "vocab_size 11")),
        (WORDS | {"adaptive_cutoffs": (50, 20)}, ("adaptive_cutoffs [50, 20]", "vocab_size 100")),
        (WORDS | {"adaptive_cutoffs": (20, 20)}, ("adaptive_cutoffs [20, 20]", "rise strictly")),
        (WORDS | {"adaptive_cutoffs": (20, 100)}, ("adaptive_cutoffs [20, 100]", "vocab_size 100")),
        (WORDS | {"adaptive_cutoffs": (0, 20)}, ("adaptive_cutoffs [0, 20]", "between 0")),
        (WORDS | {"adaptive_div": 4}, ("adaptive_div 4", "width 12")),
    ],
)
def test_fields_that_contradict_each_other_are_refused_with_their_values(
    changes: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**changes)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"num_layer\n.*not permitted"):
        build(num_layer=3)


def test_a_missing_field_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"max_span\n.*required"):
        ModelConfig.model_validate({name: value for name, value in SMALL.items() if name != "max_span"})


def test_a_config_cannot_change_after_birth() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().width = 24


def test_a_config_survives_json() -> None:
    config = build(**WORDS)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("name", "millions"), [(name, millions) for name, (_, millions) in PAPER.items()])
def test_the_papers_models_have_as_many_parameters_as_the_paper_says(name: str, millions: int) -> None:
    assert round(paper(name).num_parameters / 1e6) == millions


@pytest.mark.parametrize("name", PAPER)
def test_the_closed_form_counts_what_the_network_holds(name: str) -> None:
    config = paper(name)
    with torch.device("meta"):
        network = AllAttentionLM(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == config.num_parameters


def test_the_word_model_counts_its_tables_once_and_its_projections_twice() -> None:
    """How the 133 M arise: input and output share their tables, and each side has its own projections.

    With shared projections, which is how the authors released their code, the sum is 132.49 M and does not round to the
    133 M of the paper; with tables of its own on each side it would be 151 M.
    """
    width, heads, pairs, span, layers = 512, 8, 2048, 2048, 36
    attention = 4 * width * width + 2 * heads * pairs * (width // heads) + heads + 2 * width
    body = layers * attention + (width // heads) * span
    clusters = [high - low for low, high in pairwise((0, 20000, 40000, 200000, WIKITEXT103))]
    narrow = [512, 128, 32, 8]
    tables = sum(rows * columns for rows, columns in zip(clusters, narrow, strict=True))
    projections = sum(width * columns for columns in narrow)
    output = sum(clusters) + 3 * (width + 1)  # a bias for each word; a weight row and a bias for each further cluster
    assert (body, tables, projections, output) == (113_414_432, 18_461_880, 348_160, 269_274)
    assert paper("wikitext103_36l").num_parameters == body + tables + 2 * projections + output == 132_841_906
    assert round((body + tables + projections + output) / 1e6) == 132
    assert round((body + 2 * tables + 2 * projections + output) / 1e6) == 151


@pytest.mark.parametrize("changes", [{}, WORDS])
def test_the_number_of_parameters_is_the_sum_over_the_named_tensors(changes: dict[str, object]) -> None:
    config = build(**changes)
    assert config.num_parameters == sum(math.prod(shape) for shape in config.tensor_shapes().values())
