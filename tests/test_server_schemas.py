import json
from typing import Any

import pytest

from server.config import ConfigError, Settings, load_settings
from server.errors import InvalidField, MalformedRequest, RequestError
from server.schemas import MAX_STOP_CHARS, GenerateRequest, Parameters, ScoreRequest, parse


def generate(**body: Any) -> GenerateRequest:
    return parse(json.dumps(body).encode(), model=GenerateRequest)


def complaint(model: Any = GenerateRequest, **body: Any) -> RequestError:
    with pytest.raises(InvalidField) as caught:
        parse(json.dumps(body).encode(), model=model)
    return caught.value


@pytest.mark.parametrize("inputs", ["a", ["a", "b"], [1, 2], [[1], [2, 3]], ""])
def test_all_four_forms_of_inputs_are_read_as_they_are(inputs):
    assert generate(inputs=inputs).inputs == inputs


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ([], "inputs"),
        (5, "inputs"),
        (None, "inputs"),
        ([None], "inputs"),
        ([True], "inputs"),
        ({"a": 1}, "inputs"),
        (["a", 1], "inputs.1"),
        ([1, "a"], "inputs.1"),
        ([1, -1], "inputs.1"),
        ([1, 2.0], "inputs.1"),
        ([1, 2**31], "inputs.1"),
        ([[1], "a"], "inputs.1"),
        ([[1], [1, -1]], "inputs.1.1"),
    ],
)
def test_other_inputs_are_refused_by_the_place_of_the_first_fault(inputs, param):
    assert complaint(inputs=inputs).param == param


def test_a_million_wrong_ids_give_one_complaint():
    assert complaint(inputs=[1] + ["a"] * 1_000_000).param == "inputs.1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", "3"),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", "a"),
        ("stop_token_ids", 3),
        ("truncate", 0),
        ("details", 1),
        ("ignore_eos", None),
        ("best_of", 2),
        ("watermark", False),
    ],
)
def test_a_parameter_outside_its_range_or_unknown_is_named(field, value):
    error = complaint(inputs="a", parameters={field: value})
    assert error.param == f"parameters.{field}"
    assert error.message.startswith(f"parameters.{field}: ")


def test_the_message_tells_the_value_and_the_whole_range():
    message = complaint(inputs="a", parameters={"temperature": 3}).message
    assert message == "parameters.temperature: 3 is not allowed; it should be at least 0 and at most 2"


def test_an_unknown_field_is_answered_with_those_there_are():
    assert complaint(inputs="a", stop="b").message == "stop: unknown field; there are inputs, parameters, stream"


def test_missing_inputs_are_named():
    assert complaint().message == "inputs: missing"


def test_the_edges_of_the_ranges_are_legal():
    edges = {"temperature": 2, "top_p": 1, "min_p": 1, "top_k": 0, "seed": 2**64 - 1, "max_new_tokens": 1}
    assert generate(inputs="a", parameters=edges).parameters.seed == 2**64 - 1


def test_a_long_value_is_cut_in_the_message():
    assert len(complaint(inputs={"a": "b" * 10_000}).message) < 200


@pytest.mark.parametrize("given", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_do_sample_false_contradicts_a_sampling_field(given):
    assert complaint(inputs="a", parameters={"do_sample": False, **given}).param == "parameters.do_sample"


def test_do_sample_true_contradicts_temperature_0():
    assert complaint(inputs="a", parameters={"do_sample": True, "temperature": 0}).param == "parameters.do_sample"


@pytest.mark.parametrize(
    ("given", "greedy"),
    [
        ({}, True),
        ({"do_sample": False}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0, "top_k": 3}, True),
        ({"do_sample": True}, False),
        ({"temperature": 1}, False),
        ({"top_k": 3}, False),
        ({"top_p": 1}, False),
        ({"min_p": 0}, False),
    ],
)
def test_generation_is_greedy_unless_sampling_is_asked_for(given, greedy):
    assert generate(inputs="a", parameters=given).parameters.is_greedy is greedy


def test_a_drawn_seed_survives_a_reader_that_holds_doubles():
    seeds = [Parameters().draw_seed() for _ in range(100)]
    assert all(int(float(seed)) == seed for seed in seeds)
    assert len(set(seeds)) == 100


def test_stop_strings_are_limited_in_all():
    assert complaint(inputs="a", parameters={"stop": ["a" * MAX_STOP_CHARS, "b"]}).param == "parameters.stop"
    assert complaint(inputs="a", parameters={"stop": ["a", ""]}).param == "parameters.stop.1"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"inputs": "\\ud800"}'])
def test_what_is_not_json_is_malformed(body):
    with pytest.raises(MalformedRequest):
        parse(body, model=GenerateRequest)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(InvalidField, match="body"):
        parse(body, model=GenerateRequest)


@pytest.mark.parametrize("prefix", [None, "a", 0])
def test_a_prefix_is_a_text_or_an_id_or_nothing(prefix):
    assert parse(json.dumps({"inputs": "a", "prefix": prefix}).encode(), model=ScoreRequest).prefix == prefix


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prefix": ""}, "prefix"),
        ({"prefix": -1}, "prefix"),
        ({"prefix": [1]}, "prefix"),
        ({"return": ["tops"]}, "return.0"),
        ({"return": "tokens"}, "return"),
        ({"return_": ["tokens"]}, "return_"),
    ],
)
def test_a_wrong_field_of_a_scoring_is_named(body, param):
    assert complaint(ScoreRequest, inputs="a", **body).param == param


# settings


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nnum_rows = 1\ndtype = "bfloat16"\n')
    environ = {"ALLATTN_CONFIG": str(file), "ALLATTN_PORT": "2", "ALLATTN_NUM_ROWS": "2", "HOME": "x"}
    settings = load_settings(["--port", "3"], environ=environ)
    assert (settings.port, settings.num_rows, settings.dtype) == (3, 2, "bfloat16")


def test_every_setting_has_a_default():
    assert load_settings([], environ={}) == Settings()


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--prot", "1"], {}, "--prot"),
        (["stray"], {}, "stray"),
        (["--port"], {}, "--port"),
        (["--port", "abc"], {}, "--port = 'abc'"),
        (["--port", "70000"], {}, "65535"),
        (["--dtype", "int8"], {}, "'float32' or 'bfloat16'"),
        ([], {"ALLATTN_PROT": "1"}, "ALLATTN_PROT is not a setting"),
        ([], {"ALLATTN_NUM_ROWS": "0"}, "ALLATTN_NUM_ROWS = '0'"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(argv, environ, words):
    with pytest.raises(ConfigError) as caught:
        load_settings(argv, environ=environ)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["prot = 1", 'port = "abc"', "port = "])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(["--config", str(file)], environ={})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], environ={})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in Settings.model_fields)
