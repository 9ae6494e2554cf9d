"""GET /tokenizer_info, POST /tokenize and POST /detokenize, in the shapes that vLLM and lm_eval know."""

from fastapi import Request, Response
from msgspec import Struct
from pydantic import Field

from model.tokenizer import Tokenizer, encode_corpus
from server.dialects.inputs import TokenId
from server.dialects.special_tokens import SpecialTokens
from server.errors import BodyTooLarge, InternalError, InvalidField, MalformedRequest, ModelNotFound
from server.protocol.json import encode
from server.requests.offload import beside_the_loop
from server.requests.prompts import read_ids
from server.requests.service import Service
from server.requests.token_list import token_name
from server.web.body import RequestBody, parse, read_body
from server.web.endpoint import Endpoint, Handler


class TokenizeRequest(RequestBody):
    """Body of POST /tokenize."""

    model: str | None = Field(default=None, description="the name in /v1/models (404 for another), or none")
    prompt: str
    add_special_tokens: bool = Field(default=True, description="either is the same: this model's texts get none")
    return_token_strs: bool | None = Field(default=None, description="add `token_strs`")


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    model: str | None = Field(default=None, description="the name in /v1/models (404 for another), or none")
    tokens: list[TokenId] = Field(fail_fast=True)


class TokenizeReply(Struct, frozen=True):
    """The ids of a text. One that is no more than `bos_token` or `eos_token` of /tokenizer_info has that token's."""

    count: int
    max_model_len: int  # tokens a request may have; the model itself has no limit
    tokens: list[int]
    token_strs: list[str] | None  # if asked for; what is part of a character reads "bytes:\\xNN"


class DetokenizeReply(Struct, frozen=True):
    """The text of ids; bytes that are not UTF-8 are U+FFFD."""

    prompt: str


class TokenizerInfo(Struct, frozen=True):
    """The tokenizer, with the special tokens that other programs expect. No id of theirs is 0."""

    kind: str
    vocab_size: int
    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    pad_token: str
    pad_token_id: int
    special_tokens_are_stand_ins: bool  # the model ends no text with eos_token, it only has an id


def _tokenizer_info(service: Service) -> Handler:
    answer = encode(_info(service.tokenizer, SpecialTokens.of(service.tokenizer)))

    async def info() -> Response:
        return Response(answer, media_type="application/json")

    return info


def _tokenize_handler(service: Service) -> Handler:
    special = SpecialTokens.of(service.tokenizer)

    async def tokenize(request: Request) -> Response:
        raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
        return await beside_the_loop(lambda: _tokenize(raw, service=service, special=special), size=len(raw))

    return tokenize


def _detokenize_handler(service: Service) -> Handler:
    async def detokenize(request: Request) -> Response:
        raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
        return await beside_the_loop(lambda: _detokenize(raw, service=service), size=len(raw))

    return detokenize


def _info(tokenizer: Tokenizer, special: SpecialTokens) -> TokenizerInfo:
    bos, eos = special.bos, special.eos
    return TokenizerInfo(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        bos_token=bos.text,
        bos_token_id=bos.id,
        eos_token=eos.text,
        eos_token_id=eos.id,
        pad_token=eos.text,
        pad_token_id=eos.id,
        special_tokens_are_stand_ins=special.are_stand_ins,
    )


def _tokenize(raw: bytes, *, service: Service, special: SpecialTokens) -> Response:
    body = parse(raw, model=TokenizeRequest)
    service.check_model(body.model)
    ids = special.encode(body.prompt) or encode_corpus(service.tokenizer, body.prompt).tolist()
    names = [token_name(service.tokenizer, token) for token in ids] if body.return_token_strs else None
    reply = TokenizeReply(len(ids), service.admission.max_tokens, ids, names)
    return Response(encode(reply), media_type="application/json")


def _detokenize(raw: bytes, *, service: Service) -> Response:
    body = parse(raw, model=DetokenizeRequest)
    service.check_model(body.model)
    tokens = read_ids(body.tokens, field="tokens", tokenizer=service.tokenizer)
    return Response(encode(DetokenizeReply(service.tokenizer.decode(tokens.tolist()))), media_type="application/json")


_INFO = TokenizerInfo("bpe", 4096, "\n", 198, "\x03", 191, "\x03", 191, special_tokens_are_stand_ins=True)
_ERRORS = (
    MalformedRequest("the body is not JSON: expected value at line 1 column 1"),
    ModelNotFound.of("gpt", name="default"),
    BodyTooLarge("the body is larger than 33554432 bytes"),
    InvalidField.of("tokens.1", value=4096, allowed="token ids are 0 to 4095"),
    InternalError("an unexpected error; the server's log has it under the request id"),
)

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/tokenizer_info",
        tag="tokenizer",
        summary="Kind and special tokens",
        make=_tokenizer_info,
        reply=_INFO,
    ),
    Endpoint(
        method="POST",
        path="/tokenize",
        tag="tokenizer",
        summary="The token ids of a text",
        make=_tokenize_handler,
        body=TokenizeRequest,
        examples={"a text": {"prompt": "It was", "return_token_strs": True}},
        reply=TokenizeReply(2, 8388608, [40, 373], ["It", " was"]),
        errors=_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/detokenize",
        tag="tokenizer",
        summary="The text of token ids",
        make=_detokenize_handler,
        body=DetokenizeRequest,
        examples={"ids": {"tokens": [40, 373]}},
        reply=DetokenizeReply("It was"),
        errors=_ERRORS,
    ),
)
