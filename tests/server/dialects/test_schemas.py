import json
import tracemalloc
from typing import Any

import pytest

from server.dialects.generate.schema import GenerateRequest, Parameters
from server.dialects.sampling import MAX_BEST_OF, MAX_IDS, MAX_STOP_CHARS
from server.dialects.score.schema import ScoreRequest
from server.errors import InvalidField, MalformedRequest, RequestError
from server.web.body import parse


def generate(**body: Any) -> GenerateRequest:
    return parse(json.dumps(body).encode(), model=GenerateRequest)


def complaint(**body: Any) -> RequestError:
    with pytest.raises(InvalidField) as caught:
        generate(**body)
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
        ("min_new_tokens", -1),
        ("typical_p", 0),
        ("typical_p", 1.01),
        ("repetition_penalty", 0),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("logit_bias", [1]),
        ("n", 0),
        ("n", 9),
        ("best_of", 17),
        ("top_n_tokens", 21),
        ("decoder_input_details", 1),
        ("logprobs", None),
        ("stop_token_ids", [1] * (MAX_IDS + 1)),
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
    known = "inputs, parameters, stream, timeout_s, request_id"
    assert complaint(inputs="a", stop="b").message == f"stop: unknown field; there are {known}"


def test_missing_inputs_are_named():
    assert complaint().message == "inputs: missing"


def test_the_edges_of_the_ranges_are_legal():
    edges = {
        "temperature": 2,
        "top_p": 1,
        "min_p": 1,
        "top_k": 0,
        "typical_p": 1,
        "seed": 2**64 - 1,
        "max_new_tokens": 1,
        "min_new_tokens": 1,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "n": 8,
        "best_of": 16,
        "top_n_tokens": 20,
        "details": True,
        "stop_token_ids": [1] * MAX_IDS,
        "logit_bias": {str(id): 100 for id in range(MAX_IDS)},
    }
    assert generate(inputs="a", parameters=edges, timeout_s=86400).parameters.seed == 2**64 - 1


def test_a_long_value_is_cut_in_the_message():
    assert len(complaint(inputs={"a": "b" * 10_000}).message) < 200


@pytest.mark.parametrize(
    "given", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 1}]
)
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
        ({"typical_p": 1}, False),
        ({"repetition_penalty": 1.2, "seed": 3}, True),
    ],
)
def test_generation_is_greedy_unless_sampling_is_asked_for(given, greedy):
    assert generate(inputs="a", parameters=given).parameters.is_greedy is greedy


def test_a_drawn_seed_survives_a_reader_that_holds_doubles():
    seeds = [Parameters().draw_seed() for _ in range(100)]
    assert all(int(float(seed + MAX_BEST_OF)) == seed + MAX_BEST_OF for seed in seeds)
    assert len(set(seeds)) == 100


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"n": 2}, "n", "do_sample: true"),
        ({"best_of": 2}, "best_of", "do_sample: true"),
        ({"n": 2, "temperature": 0, "top_k": 3}, "n", "do_sample: true"),
        ({"n": 3, "best_of": 2, "do_sample": True}, "best_of", "at least n, which is 3"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "min_new_tokens", "max_new_tokens, which is 5"),
    ],
)
def test_fields_that_contradict_each_other_are_both_named(given, param, words):
    error = complaint(inputs="a", parameters=given)
    assert error.param == f"parameters.{param}"
    assert words in error.message


@pytest.mark.parametrize("given", [{"top_n_tokens": 2}, {"decoder_input_details": True}, {"logprobs": True}])
def test_what_only_details_can_hold_needs_details_in_a_plain_reply_but_not_in_a_stream(given):
    generate(inputs="a", parameters=given, stream=True)
    error = complaint(inputs="a", parameters=given)
    assert "details: true" in error.message
    assert error.param == f"parameters.{next(iter(given))}"
    generate(inputs="a", parameters={**given, "details": True})


@pytest.mark.parametrize(
    ("given", "stream", "param"),
    [({"best_of": 2, "do_sample": True}, True, "best_of"), ({"max_new_tokens": None}, False, "max_new_tokens")],
)
def test_what_one_kind_of_reply_cannot_do_is_legal_in_the_other(given, stream, param):
    generate(inputs="a", parameters=given, stream=not stream)
    assert complaint(inputs="a", parameters=given, stream=stream).param == f"parameters.{param}"


def test_tokens_are_biased_by_their_ids_as_json_keys_or_as_numbers():
    assert generate(inputs="a", parameters={"logit_bias": {"17": -100, "0": 0.5}}).parameters.logit_bias == {
        17: -100.0,
        0: 0.5,
    }
    assert Parameters(logit_bias={17: 1}).logit_bias == {17: 1.0}
    assert generate(inputs="a", parameters={"logit_bias": None}).parameters.logit_bias is None


@pytest.mark.parametrize(
    ("key", "bias"),
    [
        ("x", 1),
        ("-1", 1),
        ("017", 1),
        (" 17", 1),
        ("1_7", 1),
        ("\u0661", 1),
        ("17", 101),
        ("17", -100.5),
        ("17", float("nan")),
        ("17", "1"),
        ("17", True),
        ("17", None),
    ],
)
def test_a_wrong_bias_is_named_by_its_key(key, bias):
    assert complaint(inputs="a", parameters={"logit_bias": {"3": 1, key: bias}}).param == f"parameters.logit_bias.{key}"


def test_biases_are_limited_in_number():
    biases = {str(id): 1 for id in range(MAX_IDS + 1)}
    assert complaint(inputs="a", parameters={"logit_bias": biases}).param == "parameters.logit_bias"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 86401}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"request_id": "\u00e9"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
def test_a_deadline_and_a_request_id_have_their_ranges(body, param):
    error = complaint(inputs="a", **body)
    assert error.param == param
    assert "it should be " in error.message


def test_stop_strings_are_limited_in_all():
    assert complaint(inputs="a", parameters={"stop": ["a" * MAX_STOP_CHARS, "b"]}).param == "parameters.stop"
    assert complaint(inputs="a", parameters={"stop": ["a", ""]}).param == "parameters.stop.1"
    assert complaint(inputs="a", parameters={"stop": [1] * 1_000_000}).param == "parameters.stop.0"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"inputs": "\\ud800"}'])
def test_what_is_not_json_is_malformed(body):
    with pytest.raises(MalformedRequest):
        parse(body, model=GenerateRequest)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(InvalidField, match="body"):
        parse(body, model=GenerateRequest)


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ScoreRequest, {"inputs": "a", "return": [1] * 300_000}, "return"),
        (ScoreRequest, {"inputs": "a", "return": ["top"] * 300_000}, "return"),
        (GenerateRequest, {"inputs": "a"} | {f"x{i}": 1 for i in range(100_000)}, "x0"),
        (GenerateRequest, {"inputs": "a", "parameters": {f"x{i}": 1 for i in range(100_000)}}, "parameters.x0"),
    ],
)
def test_a_million_faults_give_one_complaint_and_not_a_million_objects(model, body, param):
    raw = json.dumps(body).encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidField) as refused:
            parse(raw, model=model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.param.startswith(param)
    assert peak < 40e6


def test_a_long_name_is_cut_in_the_complaint_about_it():
    for body in ({"inputs": "a", "k" * 10_000: 1}, {"inputs": "a", "parameters": {"logit_bias": {"k" * 10_000: 1}}}):
        with pytest.raises(InvalidField) as refused:
            parse(json.dumps(body).encode(), model=GenerateRequest)
        assert len(refused.value.message) < 400
        assert len(refused.value.param) < 100


@pytest.mark.parametrize("value", ["3", 2.5, 0, True])
def test_a_number_of_another_type_is_told_the_range_too(value):
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": value}}).encode()
    with pytest.raises(InvalidField, match="at least 1 and at most 2147483647"):
        parse(body, model=GenerateRequest)
