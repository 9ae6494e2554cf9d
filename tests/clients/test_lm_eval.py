"""Tests of EleutherAI's lm_eval against a whole server: it finds the same figures as /score and training.evaluate."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.bundle import open_bundle
from model.frozen.baked import load_baked
from tests.support.live_server import ROOT, live_server
from training.corpus import SHAKESPEARE
from training.evaluate import score_tokens

pytestmark = pytest.mark.slow
BUNDLE = ROOT / "bundles" / "default"
KEY = "key-for-lm-eval-0"
TOLERANCE = 1e-4
TEXT = SHAKESPEARE.read_text()
DOCUMENTS = [TEXT[10_000:13_000], TEXT[60_000:60_800], "naïve → 🙂: a café\n"]
QUESTIONS = [
    {"question": "It was a dark and stormy", "choices": ["night", "potato", "nightingale"], "answer": 0},
    {"question": "My lord, the king of", "choices": ["England", "of of"], "answer": 0},
    {"question": "→", "choices": ["é", "\n", "the"], "answer": 1},
]
TASKS = {
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
        """,
    "until": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["e"], max_gen_toks: 24}
        metric_list: [{metric: exact_match}]
        """,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(BUNDLE, "--num-rows", "8", keys=KEY) as url:
        yield url


def write_tasks(folder: Path) -> None:
    """Write three tasks over local files."""
    documents = [{"text": text} for text in DOCUMENTS]
    for name, lines in {"rolling": documents, "choice": QUESTIONS, "until": QUESTIONS}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        body = "\n".join(line.strip() for line in TASKS[name].strip().splitlines())
        (folder / f"{name}.yaml").write_text(head + body + "\nmetadata: {version: 1}\n")


@pytest.fixture(scope="module", params=[(1, 1), (3, 4)], ids=["one by one", "in batches"])
def outcome(request, url, tmp_path_factory) -> dict[str, Any]:
    """Return the file that lm_eval writes: `results` of each task, and its `samples`."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder)
    batch_size, num_concurrent = request.param
    model = f"base_url={url}/v1/completions,model=default,max_length=4096,num_concurrent={num_concurrent}"
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", f"{model},auth_token={KEY}", "--batch_size", str(batch_size)),
        *("--tasks", ",".join(TASKS), "--include_path", str(folder)),
        *("--output_path", str(folder / "out"), "--log_samples"),
    ]
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **offline, "OPENAI_API_KEY": KEY}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (written,) = (folder / "out").rglob("results_*.json")
    samples = {name: next((folder / "out").rglob(f"samples_{name}_*.jsonl")) for name in TASKS}
    return {
        "results": json.loads(written.read_text())["results"],
        "samples": {name: read_samples(path) for name, path in samples.items()},
    }


def read_samples(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"])


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    reply = httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture(scope="module")
def bos(url) -> int:
    info = httpx.get(f"{url}/tokenizer_info", headers={"Authorization": f"Bearer {KEY}"}).json()
    return info["bos_token_id"]


def test_rolling_perplexity_is_that_of_score(outcome, url, bos):
    scored = post(url, "/score", {"inputs": DOCUMENTS, "prefix": bos})
    for sample, own in zip(outcome["samples"]["rolling"], scored, strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(own["logprob"], rel=TOLERANCE)
    nats, num_bytes = (sum(one[name] for one in scored) for name in ("logprob", "num_bytes"))
    results = outcome["results"]["rolling"]
    assert results["bits_per_byte,none"] == pytest.approx(-nats / num_bytes / math.log(2), abs=TOLERANCE)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(-nats / num_bytes), abs=TOLERANCE)


def test_rolling_perplexity_is_that_of_training(outcome, bos):
    bundle = open_bundle(BUNDLE)
    model = load_baked(bundle)
    documents = [np.array([bos, *bundle.tokenizer.encode(text)]) for text in DOCUMENTS]
    scores = [score_tokens(model, bundle.tokenizer, tokens) for tokens in documents]
    for sample, own in zip(outcome["samples"]["rolling"], scores, strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(own.logprob, rel=TOLERANCE)
    nats, num_bytes = sum(one.logprob for one in scores), sum(one.num_bytes for one in scores)
    bits = outcome["results"]["rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-nats / num_bytes / math.log(2), abs=TOLERANCE)


def test_the_choices_have_the_scores_of_continuations(outcome, url):
    best = []
    for sample, asked in zip(outcome["samples"]["choice"], QUESTIONS, strict=True):
        body = {"inputs": asked["question"], "continuations": [f" {choice}" for choice in asked["choices"]]}
        scored = post(url, "/score", body)
        for (logprob, is_greedy), own in zip((one[0] for one in sample["resps"]), scored, strict=True):
            assert float(logprob) == pytest.approx(own["logprob"], rel=TOLERANCE)
            assert str(is_greedy) == str(own["is_greedy"])
        best.append(max(range(len(scored)), key=lambda i, scored=scored: scored[i]["logprob"]))
    right = [choice == asked["answer"] for choice, asked in zip(best, QUESTIONS, strict=True)]
    assert outcome["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_what_it_lets_the_model_write_is_what_generate_writes(outcome, url):
    for sample, asked in zip(outcome["samples"]["until"], QUESTIONS, strict=True):
        parameters = {"max_new_tokens": 24, "stop": ["e"]}
        own = post(url, "/generate", {"inputs": asked["question"], "parameters": parameters})
        assert sample["resps"][0][0] == own["generated_text"]
