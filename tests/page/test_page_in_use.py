"""Tests of the page in a real browser with the bundle that ships, when all goes well: what a person sees and does."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.browser import CHROMIUM, MISSING, opened
from tests.support.live_server import ROOT, live_server

expect.set_options(timeout=20_000)  # milliseconds; the cores may be busy
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]

KEY = "correct-horse-battery"
BUNDLE = ROOT / "bundles/default"
ODD_TEXT = "The café\tis <b>open</b> & free.\n\n\nIt was 🙂 a dark night; don't <script>go</script>"
SIZES = {"wide": {"width": 1440, "height": 900}, "narrow": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(BUNDLE) as address:
        wait_until_ready(address)
        yield f"{address}/"


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as one:
        yield one


def wait_until_ready(url: str, **headers: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/health/ready", headers=headers).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{url}{path}", json=body, timeout=60).json()


def generate(page: Page, **fields: object) -> str:
    """Fill in the form, generate until the end, and return the text."""
    for name, value in fields.items():
        field = page.locator(f"#{name}")
        field.wait_for(state="attached")
        if not field.is_visible():
            page.click("summary")
        field.fill(str(value))
    page.click("#generate-run")
    expect(page.locator("#generate-status")).to_have_text("Done: the requested number of tokens")
    return output(page)


def measure(page: Page, text: str) -> Locator:
    """Score a text and return its tokens."""
    page.fill("#passage", text)
    page.click("#surprisal-run")
    expect(page.locator("#surprisal-status")).to_have_text("Done")
    return page.locator("#heat [role=option]")


def output(page: Page) -> str:
    return page.locator("#output").text_content() or ""


def exact(text: str | None) -> str:
    assert text is not None
    return text


# generate


def test_text_streams_into_the_page_and_is_what_the_api_says(page, url):
    page.evaluate(
        """() => {
            window.lengths = new Set();
            const output = document.querySelector("#output");
            const note = () => window.lengths.add(output.textContent.length);
            new MutationObserver(note).observe(output, {childList: true, subtree: true, characterData: true});
        }"""
    )
    shown = generate(page, prompt="It was", seed=11, temperature=0.9, top_k=40, max_new_tokens=60)
    assert page.evaluate("window.lengths.size") > 5
    parameters = {"seed": 11, "temperature": 0.9, "top_k": 40, "max_new_tokens": 60}
    assert shown == "It was" + post(url, "generate", {"inputs": "It was", "parameters": parameters})["generated_text"]
    expect(page.locator("#figure-tokens")).to_have_text("60")
    expect(page.locator("#figure-seed")).to_have_text("11")
    assert int(exact(page.locator("#figure-rate").text_content()).replace(",", "")) > 0


def test_a_drawn_seed_is_shown_and_gives_the_text_again(page):
    first = generate(page, max_new_tokens=30)
    seed = page.locator("#figure-seed").text_content()
    assert generate(page) != first
    page.fill("#seed", exact(seed))
    assert generate(page) == first
    page.fill("#seed", "")
    other = generate(page)
    page.click("#keep-seed")
    expect(page.locator("#generate-run")).to_have_text("Generate")
    expect(page.locator("#generate-status")).to_have_text("Done: the requested number of tokens")
    assert output(page) == other != first


def test_a_seed_of_64_bits_keeps_its_digits(page, url):
    seed = 2**64 - 1
    shown = generate(page, prompt="It was", seed=seed, max_new_tokens=20)
    parameters = {"seed": seed, "temperature": 0.8, "max_new_tokens": 20}
    assert shown == "It was" + post(url, "generate", {"inputs": "It was", "parameters": parameters})["generated_text"]
    expect(page.locator("#figure-seed")).to_have_text(str(seed))


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_frees_the_row_and_keeps_the_text_and_its_seed(page, url, how):
    page.fill("#max_new_tokens", "")
    page.click("#generate-run")
    expect(page.locator("#generate-run")).to_have_text("Stop")
    page.locator("#figure-tokens", has_text="9").wait_for()  # nine tokens, or more
    assert httpx.get(f"{url}health").json()["rows"]["used"] == 1
    page.click("#generate-run") if how == "button" else page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_have_text("Stopped")
    expect(page.locator("#generate-run")).to_have_text("Generate")
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}health").json()["rows"]["used"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown = output(page)
    count = exact(page.locator("#figure-tokens").text_content()).replace(",", "")
    page.fill("#max_new_tokens", count)
    page.click("#keep-seed")
    expect(page.locator("#generate-status")).to_have_text("Done: the requested number of tokens")
    assert output(page).startswith(shown)  # text that the decoder held back may follow


def test_greedy_asks_for_no_sampling(page, url):
    page.get_by_label("Greedy").check()
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        expect(page.locator(f"#{name}")).to_be_disabled()
    with page.expect_request("**/generate") as request:
        shown = generate(page, prompt="It was", max_new_tokens=20, repetition_penalty=1.2)
    parameters = {"max_new_tokens": 20, "repetition_penalty": 1.2}
    assert json.loads(request.value.post_data)["parameters"] == parameters
    assert shown == "It was" + post(url, "generate", {"inputs": "It was", "parameters": parameters})["generated_text"]
    expect(page.locator("#keep-seed")).to_be_hidden()


def test_temperature_0_is_greedy_and_empty_fields_sample(page):
    generate(page, temperature=0, max_new_tokens=2)
    with page.expect_request("**/generate") as request:
        generate(page, temperature="", max_new_tokens=2)
    parameters = json.loads(request.value.post_data)["parameters"]
    assert parameters.pop("seed") < 2**53
    assert parameters == {"do_sample": True, "max_new_tokens": 2}


def test_an_error_is_shown_as_the_server_words_it(browser, url):
    with opened(browser, url, refusals=True) as page:
        page.fill("#temperature", "3")
        page.click("#generate-run")
        body = {"inputs": "x", "parameters": {"temperature": 3}}
        expect(page.locator("#generate-error")).to_have_text(post(url, "generate", body)["error"]["message"])
        expect(page.locator("#generate-run")).to_have_text("Generate")
        generate(page, temperature=1, max_new_tokens=3)
        expect(page.locator("#generate-error")).to_be_hidden()


def test_generated_text_is_never_html_and_can_be_measured(page):
    shown = generate(page, prompt="<img src=x onerror=alert(1)> It was", max_new_tokens=20)
    assert page.locator("#output img").count() == 0
    page.click("#measure-output")
    expect(page.locator("#surprisal-status")).to_have_text("Done")
    assert page.locator("#passage").input_value() == shown
    assert page.locator("#heat").text_content() == shown


# surprisal


def test_the_heat_map_and_its_figures_are_those_of_score(page, url):
    tokens = measure(page, ODD_TEXT)
    reply = post(url, "score", {"inputs": ODD_TEXT, "return": ["tokens"]})
    assert float(exact(page.locator("#figure-bits").get_attribute("data-exact"))) == reply["bits_per_byte"]
    expect(page.locator("#figure-bits")).to_have_text(f"{reply['bits_per_byte']:.3f}")
    assert tokens.count() == len(reply["tokens"])
    assert page.locator("#heat").text_content() == ODD_TEXT
    heats = [float(one or 0) for one in tokens.evaluate_all("all => all.map(one => one.style.getPropertyValue('--h'))")]
    bits = [-(token["logprob"] or 0) / 0.6931471805599453 for token in reply["tokens"]]
    assert heats == pytest.approx([min(one / 12, 1) for one in bits], abs=6e-4)


def test_the_keyboard_measures_and_walks_over_tokens_and_the_panel_tells_what_score_says(page, url):
    text = "It was a dark night.\nThe rain fell in torrents.\nHe was late."
    everything = {"inputs": text, "return": ["tokens", "top", "entropy", "memory_share"], "top": 8}
    tokens = post(url, "score", everything)["tokens"]
    page.fill("#passage", text)
    page.locator("#passage").press("Control+Enter")
    expect(page.locator("#surprisal-status")).to_have_text("Done")
    page.keyboard.press("Tab")  # from the text to the button, and on to the map
    expect(page.locator("#surprisal-run")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#token-first")).to_be_visible()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    token = tokens[3]
    expect(page.locator("#token-text")).to_have_text(json.dumps(token["text"]))
    expect(page.locator("#token-bits")).to_have_text(f"{-token['logprob'] / 0.6931471805599453:.2f} bits")
    expect(page.locator("#token-entropy")).to_have_text(f"{token['entropy'] / 0.6931471805599453:.2f} bits")
    assert exact(page.locator("#token-rank").text_content()).split()[0] == f"{token['rank'] + 1:,}"
    alternatives = page.locator("#token-top code").all_text_contents()
    assert alternatives == [json.dumps(one["text"], ensure_ascii=False) for one in token["top"]]
    shares = page.locator("#token-memory li").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert shares == [f"layer {i}: {share * 100:.0f} %" for i, share in enumerate(token["memory_share"])]
    page.keyboard.press("ArrowDown")
    down = page.locator(":focus").evaluate("one => one.getBoundingClientRect().top")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#token-text")).to_have_text(json.dumps(token["text"]))
    assert page.locator(":focus").evaluate("one => one.getBoundingClientRect().top") < down
    page.keyboard.press("End")
    assert page.locator(":focus").get_attribute("data-index") == str(len(tokens) - 1)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.locator(":focus").get_attribute("data-index") == "0"
    assert page.locator("#heat [tabindex='0']").count() == 1


def test_pointing_at_a_token_shows_it_and_leaving_shows_the_chosen_one_again(page):
    tokens = measure(page, "It was a dark night.")
    tokens.nth(1).click()
    chosen = page.locator("#token-text").text_content()
    tokens.nth(4).hover()
    expect(page.locator("#token-text")).not_to_have_text(exact(chosen))
    page.locator("#surprisal-title").hover()
    expect(page.locator("#token-text")).to_have_text(exact(chosen))


def test_a_long_text_is_shown_whole_and_a_longer_one_is_refused_with_the_limit(page, url):
    text = "The night was dark, and the rain fell in torrents on London. " * 330
    assert len(text) > 20_000
    tokens = measure(page, text)
    assert tokens.count() == post(url, "score", {"inputs": text})["num_tokens"] + 1
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.fill("#passage", text * 2)
    page.click("#surprisal-run")
    expect(page.locator("#surprisal-error")).to_contain_text("at most 32,768")
    assert asked == []


def test_measuring_can_be_stopped_and_begun_again(page):
    page.fill("#passage", "It was a dark night, and the rain fell. " * 700)
    page.click("#surprisal-run")
    page.locator("#surprisal-status", has_text="%").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#surprisal-status")).to_contain_text("Stopped after")
    assert measure(page, "It was").count() > 0
    assert page.locator("#heat").text_content() == "It was"


# spans


def test_the_map_has_every_span_and_what_a_stream_costs(page, url):
    answer = httpx.get(f"{url}model/spans").json()
    expect(page.locator("#spans-table tbody tr")).to_have_count(answer["num_layers"])
    rows = page.locator("#spans-table tbody tr").evaluate_all(
        "all => all.map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [[int(cell.replace(",", "")) for cell in row[1:-1]] for row in rows] == answer["spans"]
    expect(page.locator("#spans-figures")).to_contain_text(f"{answer['state_bytes_per_row'] / 2**20:.3g} MiB")


# the page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_systems_theme_is_followed_until_one_is_chosen_which_is_remembered(browser, url, scheme):
    def is_dark() -> bool:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")) < 200

    with opened(browser, url, color_scheme=scheme) as page:
        assert is_dark() == (scheme == "dark")
        for theme in ("light", "dark"):
            page.click("#theme")
            expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
            assert is_dark() == (theme == "dark")
            page.reload()
            assert is_dark() == (theme == "dark")
        page.click("#theme")
        expect(page.locator("#theme")).to_have_text("Theme: auto")
        page.reload()
        assert is_dark() == (scheme == "dark")


def test_a_key_is_asked_for_only_where_the_server_wants_one_and_goes_with_the_tab(browser, page):
    expect(page.locator("#facts")).to_contain_text("parameters")
    expect(page.locator("#key-form")).to_be_hidden()
    with live_server(BUNDLE, keys=KEY) as address:
        wait_until_ready(address, Authorization=f"Bearer {KEY}")
        with opened(browser, f"{address}/", refusals=True) as guarded:
            expect(guarded.locator("#key")).to_be_focused()
            expect(guarded.locator("#key-note")).to_have_text("send an API key, as Authorization: Bearer KEY")
            guarded.keyboard.type("wrong-key-wrong-key")
            guarded.keyboard.press("Enter")
            expect(guarded.locator("#key-note")).to_contain_text("This key is not known.")
            guarded.fill("#key", KEY)
            guarded.keyboard.press("Enter")
            expect(guarded.locator("#facts")).to_contain_text("parameters")
            expect(guarded.locator("#key-form")).to_be_hidden()
            assert generate(guarded, max_new_tokens=3)
            stored = guarded.evaluate("[JSON.stringify(localStorage), document.cookie, JSON.stringify(sessionStorage)]")
            assert [KEY in one for one in stored] == [False, False, True]
            guarded.reload()
            expect(guarded.locator("#facts")).to_contain_text("parameters")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(browser, url, size, scheme):
    with opened(browser, url, color_scheme=scheme, viewport=SIZES[size], reduced_motion="reduce") as page:
        generate(page, max_new_tokens=20)
        measure(page, ODD_TEXT).nth(3).focus()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size]["width"]


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']} {node['failureSummary']}" for one in found for node in one["nodes"]]
