from dataclasses import replace

import httpx
import pytest

from model.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe, train_words
from server.app import create_app
from server.config import Settings
from server.dialects.special_tokens import SpecialTokens
from server.requests.token_list import token_name
from tests.support.http_harness import make_bundle, make_client, make_link, post

pytestmark = pytest.mark.anyio
TEXT = "the cat sat on the mat\nthe dog ate the rug\n" * 20
TOKENIZERS = {
    "bytes": BytesTokenizer(),
    "bpe": train_bpe([TEXT], vocab_size=270),
    "bpe with an end": train_bpe([TEXT], vocab_size=270, eos=True),
    "words": train_words([TEXT]),
    "words with a line end of id 0": train_words(["\n" * 9 + "a b b a a\n"]),
    "two words": train_words(["\n"]),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> Tokenizer:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("text", ["", "naïve → 🙂", "\x00", "a" * 20000])
async def test_a_text_becomes_ids_and_ids_become_the_text(text):
    reply = (await post("/tokenize", {"prompt": text, "add_special_tokens": False})).json()
    ids = list(text.encode())
    assert reply == {"count": len(ids), "max_model_len": 8 << 20, "tokens": ids, "token_strs": None}
    assert (await post("/detokenize", {"tokens": ids})).json() == {"prompt": text}


async def test_the_tokens_are_shown_if_asked_for():
    reply = await post("/tokenize", {"prompt": "aé", "return_token_strs": True, "model": "tiny"})
    assert reply.json()["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


async def test_ids_that_are_no_text_are_shown_as_well_as_can_be():
    assert (await post("/detokenize", {"tokens": [97, 0xC3]})).json() == {"prompt": "a\ufffd"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 422, "prompt"),
        ("/tokenize", {"prompt": 1}, 422, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 422, "messages"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/detokenize", {"tokens": [1, 256]}, 422, "tokens.1"),
        ("/detokenize", {"tokens": [1, -1]}, 422, "tokens.1"),
        ("/detokenize", {"tokens": "a"}, 422, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "gpt"}, 404, "model"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(path, body, status, param):
    reply = await post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


async def test_half_a_surrogate_pair_is_no_text():
    async with make_client(make_link()) as client:
        assert (await client.post("/tokenize", content=b'{"prompt": "\\ud800"}')).status_code == 400


async def test_it_works_while_there_is_no_engine():
    link = make_link()
    link.state = "restarting"
    assert (await post("/tokenize", {"prompt": "a"}, link=link)).json()["tokens"] == [97]


async def test_a_body_over_the_limit_is_refused():
    async with make_client(make_link(), max_body_bytes=1000) as client:
        assert (await client.post("/tokenize", json={"prompt": "a" * 1000})).status_code == 413
        assert (await client.post("/detokenize", json={"tokens": [1] * 1000})).status_code == 413


async def test_the_tokenizer_tells_its_special_tokens():
    async with make_client(make_link()) as client:
        info = (await client.get("/tokenizer_info")).json()
    assert info == {
        "kind": "bytes",
        "vocab_size": 256,
        "bos_token": "\n",
        "bos_token_id": 10,
        "eos_token": "\x03",
        "eos_token_id": 3,
        "pad_token": "\x03",
        "pad_token_id": 3,
        "special_tokens_are_stand_ins": True,
    }


def test_no_special_token_has_the_id_0_and_its_text_has_its_id(tokenizer):
    special = SpecialTokens.of(tokenizer)
    for one in (special.bos, special.eos):
        assert one.id != 0
        assert (special.encode(one.text) or tokenizer.encode(one.text)) == [one.id]
    assert special.are_stand_ins == (not tokenizer.eos_id)


@pytest.mark.parametrize(("name", "text"), [("bpe with an end", "<|endoftext|>"), ("words", "\n")])
def test_a_tokenizer_with_an_end_begins_and_ends_texts_with_it(name, text):
    tokenizer = TOKENIZERS[name]
    special = SpecialTokens.of(tokenizer)
    assert special.bos == special.eos
    assert (special.eos.text, special.eos.id) == (text, tokenizer.eos_id)
    assert special.encode("a" + text) is None  # the special token cannot be written inside a text


async def test_the_id_of_an_end_is_found_by_its_text_and_it_is_typed_in_no_other():
    tokenizer = TOKENIZERS["bpe with an end"]
    bundle = replace(make_bundle(), tokenizer=tokenizer)
    app = create_app(settings=Settings(), bundle=bundle, link=make_link())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        info = (await client.get("/tokenizer_info")).json()
        assert (info["eos_token"], info["special_tokens_are_stand_ins"]) == ("<|endoftext|>", False)
        ids = (await client.post("/tokenize", json={"prompt": info["eos_token"]})).json()["tokens"]
        assert ids == [info["eos_token_id"]] == [tokenizer.eos_id]
        ids = (await client.post("/tokenize", json={"prompt": "a" + info["eos_token"]})).json()["tokens"]
        assert tokenizer.eos_id not in ids
        assert (await client.post("/detokenize", json={"tokens": ids})).json()["prompt"] == "a" + info["eos_token"]


def test_a_stand_in_is_a_text_of_one_token():
    class Odd(BytesTokenizer):
        def encode(self, text: str) -> list[int]:
            return [1, *text.encode()] if text < "\x20" else super().encode(text)

    special = SpecialTokens.of(Odd())
    assert (special.bos.id, special.eos.id) == (0x20, 0x20)


def test_no_two_tokens_have_the_same_name(tokenizer):
    names = [token_name(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == tokenizer.vocab_size


def test_no_two_tokens_of_the_model_that_ships_have_the_same_name():
    tokenizer = load_tokenizer("bundles/default/tokenizer.json")
    assert len({token_name(tokenizer, token) for token in range(tokenizer.vocab_size)}) == tokenizer.vocab_size
