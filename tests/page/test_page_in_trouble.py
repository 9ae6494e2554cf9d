"""Tests of the page in a real browser when something is wrong: keys, odd input, refusals, a server that is gone."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import CHROMIUM, MISSING
from tests.support.live_server import ROOT, live_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]

KEY = "key-for-the-playground"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(ROOT / "bundles/default", "--num-rows", "4", keys=KEY) as url:
        yield url


@pytest.fixture
def page(browser, url) -> Iterator[Page]:
    """Open the page, which asks for a key. Whatever the server answers, the page must not raise an error."""
    bugs: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: bugs.append(str(error)))
        page.goto(url)
        yield page
    assert bugs == []


def unlock(page: Page) -> None:
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#spans-table td").first).to_be_visible()


def generate(page: Page, **fields: str) -> str:
    """Fill in the form, generate until the end, and return prompt and output."""
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#generate-run").click()
    return generated(page)


def generated(page: Page) -> str:
    expect(page.locator("#generate-status")).to_have_text("Done: the requested number of tokens", timeout=20_000)
    return page.locator("#output").text_content() or ""


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def test_a_key_that_cannot_be_sent_or_is_wrong_is_asked_for_again_and_what_was_begun_goes_on_after_it(page):
    field, note = page.get_by_label("API key"), page.locator("#key-note")
    expect(field).to_be_focused()
    for wrong, answer in (("ключ-ключ-ключ-ключ", "visible ASCII"), ("wrong-key-wrong-key", "not known")):
        field.fill(wrong)
        field.press("Enter")
        expect(note).to_contain_text(answer)
        expect(field).to_be_visible()
    page.locator("#max_new_tokens").fill("5")
    page.locator("#generate-run").click()
    unlock(page)
    expect(field).to_be_hidden()
    expect(page.locator("#facts")).to_contain_text("M parameters")
    assert len(generated(page)) > len(page.locator("#prompt").input_value())


def test_a_key_is_known_to_its_own_tab_only(page, url):
    unlock(page)
    page.reload()
    expect(page.locator("#spans-table td").first).to_be_visible()
    assert page.evaluate("Object.values({...localStorage})") == page.context.cookies() == []
    assert KEY not in page.content() + page.url
    other = page.context.new_page()
    other.goto(url)
    expect(other.get_by_label("API key")).to_be_visible()


def test_waiting_for_a_key_can_be_stopped(page):
    expect(page.get_by_label("API key")).to_be_visible()
    page.locator("#generate-run").click()
    expect(page.locator("#generate-run")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_have_text("Stopped")
    unlock(page)
    assert page.locator("#output").is_hidden()


def test_numbers_are_sent_as_json_however_they_are_typed(page, url):
    unlock(page)
    with page.expect_request("**/generate") as sent:
        shown = generate(page, prompt="It was", temperature=".9", top_k="007", seed="00012", max_new_tokens="010")
    parameters = json.loads(sent.value.post_data)["parameters"]
    wanted = {"temperature": 0.9, "top_k": 7, "seed": 12, "max_new_tokens": 10, "do_sample": True}
    assert parameters == wanted
    assert shown == "It was" + post(url, "/generate", inputs="It was", parameters=wanted).json()["generated_text"]


def test_what_is_refused_leaves_the_text_before_it_and_the_next_one_clears_the_error(page, url):
    unlock(page)
    error = page.locator("#generate-error")
    shown = generate(page, max_new_tokens="5")
    page.locator("#top_p").fill("1.5")
    page.locator("#prompt").press("Control+Enter")
    refused = post(url, "/generate", inputs="x", parameters={"top_p": 1.5})
    assert refused.status_code == 422
    expect(error).to_have_text(refused.json()["error"]["message"])
    assert page.locator("#output").text_content() == shown
    page.route("**/generate", lambda route: route.abort())
    page.locator("#generate-run").click()
    expect(error).to_have_text("The server cannot be reached.")
    page.unroute("**/generate")
    generate(page, top_p="1")
    expect(error).to_be_hidden()


def test_what_was_held_back_is_shown_where_the_server_ends_a_text_between_two_tokens(page):
    unlock(page)
    first = {"index": 1, "token": {"id": 1, "text": " a", "logprob": -1, "special": False}, "details": None}
    last = {"index": 2, "token": None, "generated_text": " a\ufffd", "details": {"finish_reason": "timeout"}}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (first, last))
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.locator("#prompt").fill("It was")
    page.locator("#generate-run").click()
    expect(page.locator("#generate-status")).to_have_text("Ended: the time limit of the server has passed")
    assert page.locator("#output").text_content() == "It was a\ufffd"


def test_a_stream_that_fails_shows_what_came_and_the_servers_words(page):
    unlock(page)
    first = {"index": 1, "token": {"id": 1, "text": " a", "logprob": -1, "special": False}, "details": None}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (first, {"error": {"message": "the engine died"}}))
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.locator("#prompt").fill("It was")
    page.locator("#generate-run").click()
    expect(page.locator("#generate-error")).to_have_text("the engine died")
    assert page.locator("#output").text_content() == "It was a"
    expect(page.locator("#keep-seed")).to_be_visible()


def test_generated_text_is_measured_even_while_another_text_is(page):
    unlock(page)
    shown = generate(page, max_new_tokens="20")
    page.locator("#passage").fill("Once upon a time. " * 1500)
    page.locator("#surprisal-run").click()
    expect(page.locator("#surprisal-run")).to_have_text("Stop")
    page.locator("#measure-output").click()
    expect(page.locator("#surprisal-status")).to_have_text("Done", timeout=20_000)
    assert page.locator("#heat").text_content() == shown


def test_words_without_an_end_do_not_widen_a_phone(page):
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # the key's field is visible too
    unlock(page)
    word = "unbroken" * 40
    generate(page, prompt=word, max_new_tokens="5", temperature="1")
    page.locator("#measure-output").click()
    expect(page.locator("#surprisal-status")).to_have_text("Done", timeout=20_000)
    page.locator("#heat > span").nth(5).click()
    page.locator("#temperature").fill("9" * 100)
    page.locator("#generate-run").click()
    expect(page.locator("#generate-error")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
