import pytest

from tests.support.http_harness import make_client, make_link

pytestmark = pytest.mark.anyio


async def test_the_one_model_is_listed_and_found_by_its_name():
    async with make_client(make_link()) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/tiny")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["owned_by"]) == ("tiny", "model", "allattn")
    assert one["created"] > 1_700_000_000


@pytest.mark.parametrize("name", ["gpt-4", "other/tiny", "tin"])
async def test_another_model_is_not_found(name):
    async with make_client(make_link()) as client:
        reply = await client.get(f"/v1/models/{name}")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert f'"{name}" is not served here; there is "tiny"' in error["message"]
