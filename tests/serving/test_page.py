"""The page at `/`: what it brings and what its policy lets run; and, where Chromium and playwright are installed, what a person sees."""

import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from serve_support import SLOTS, Served, load_thinking, load_tiny, slow_down, wait_for, write_script

from sbtiny.serving.guard import Guard
from sbtiny.serving.page import PAGE, POLICY, hash_inline
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# ---- the file --------------------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_without_outside_resources() -> None:
    elements = Elements(PAGE).found
    assert len(PAGE.splitlines()) < 350
    assert not {"img", "iframe", "object", "embed", "base", "video", "audio"} & {tag for tag, _ in elements}
    assert [(tag, at["href"]) for tag, at in elements if "href" in at] == [("link", "data:,")]
    assert not [at for _, at in elements if "src" in at or "action" in at]
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|\bimport\b", PAGE)


def test_nothing_in_it_needs_what_the_policy_forbids() -> None:
    attributes = {name for _, at in Elements(PAGE).found for name in at}
    assert "style" not in attributes
    assert not {name for name in attributes if name.startswith("on")}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", PAGE)


def test_the_policy_holds_the_hashes_of_the_script_and_the_style(plain: Served) -> None:
    answer = plain.client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for tag in ("script", "style"):
        assert policy[f"{tag}-src"] == hash_inline(answer.text, tag)
        assert hash_inline(answer.text.replace(f"</{tag}>", f" </{tag}>"), tag) not in POLICY
    assert "unsafe" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_ids_and_classes_that_the_script_uses_are_there() -> None:
    elements = Elements(PAGE).found
    ids, classes = [at["id"] for _, at in elements if "id" in at], {c for _, at in elements for c in (at.get("class") or "").split()}
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', PAGE)) <= set(ids)
    assert set(re.findall(r'(?:show|add|part)\("\.([a-z]+)"', PAGE)) <= classes
    labelled = {at["for"] for tag, at in elements if tag == "label" and "for" in at}
    assert {"question", "key"} <= labelled


# ---- a browser -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a server. What the console or the policy complains of fails the test, but for `expected`."""
    contexts, complaints = [], []

    def open_page(served: Served, expected: str = "$^", key: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on(
            "console", lambda said: complaints.append(said.text) if said.type == "error" and not re.search(expected, said.text) else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if key:  # as if the page had been opened by another way than Basic, which the browser would send for all that follows
            page.route(f"{served.url}/", lambda route: route.continue_(headers=route.request.headers | {"authorization": f"Bearer {key}"}))
        page.goto(served.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def wait_end(page: Any, turns: int = 1) -> None:
    page.locator("article .figures:visible").nth(turns - 1).wait_for()


@pytest.mark.slow
def test_a_question_is_answered_and_the_next_turn_knows_it(served: Served, visit: Callable[..., Any]) -> None:
    page, bodies = visit(served), []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, SHORT)
    wait_end(page)
    assert "stated budget" in page.locator(".state").inner_text()
    assert "stated" in page.locator(".figures").inner_text()
    assert page.locator("#live").inner_text().startswith("The answer has ended")
    ask(page, "And twice that?")
    wait_end(page, 2)
    answer = page.locator(".answer").first.inner_text()
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][1]["content"].strip() == answer.strip()


@pytest.mark.slow
def test_shift_enter_is_a_new_line_and_nothing_is_asked(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served)
    page.get_by_label("Your question").fill("a")
    page.keyboard.press("Shift+Enter")
    assert page.get_by_label("Your question").input_value() == "a\n"
    assert page.locator("article").count() == 0


@pytest.mark.slow
def test_the_budget_is_seen_at_once_and_counts_down(served: Served, visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, served, 0.1)
    write_script(monkeypatch, served, "<budget>40</budget><solution>" + "1 + 1 = 2\\n" * 8)
    page = visit(served)
    ask(page, SHORT)
    page.locator(".bar:visible").wait_for()
    first = int(page.locator(".bar").get_attribute("aria-valuenow"))
    spoken = page.locator("#live").inner_text()
    assert spoken.startswith("stated budget")
    page.wait_for_timeout(1200)
    assert int(page.locator(".bar").get_attribute("aria-valuenow")) < first
    assert page.locator("#live").inner_text() == spoken  # not each token
    wait_end(page)
    assert not page.locator(".bar").is_visible()


@pytest.mark.slow
def test_escape_is_answer_now_and_thoughts_are_folded(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(load_thinking()).wait_ready()
    slow_down(monkeypatch, served, 0.05)
    page = visit(served)
    page.get_by_text("tokens", exact=True).click()
    page.get_by_label("Budget in tokens").fill("300")
    ask(page, SHORT)
    page.locator("details:visible").wait_for()
    assert not page.locator(".thoughts").is_visible()
    page.keyboard.press("Escape")
    wait_end(page)
    assert "ended by you" in page.locator(".figures").inner_text()
    assert page.locator(".answer").inner_text().strip()
    assert "300 tokens" in page.locator(".state").inner_text()
    served.close()


@pytest.mark.slow
def test_stop_ends_an_answer_and_frees_its_slot(served: Served, visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, served, 0.15)
    page = visit(served)
    ask(page, SHORT)
    page.locator(".bar:visible").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Ask").wait_for()
    assert not page.locator(".bar").is_visible()
    wait_for(lambda: not served.app.state.server.jobs)
    assert "ended by you" in page.locator(".figures").inner_text()


@pytest.mark.slow
def test_one_that_waits_sees_its_place(thinking: Served, visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, thinking, 0.03)
    ahead = [thinking.stream(SHORT, budget=100) for _ in range(SLOTS + 2)]
    page = visit(thinking)
    page.get_by_text("tokens", exact=True).click()
    ask(page, SHORT)
    page.get_by_text(re.compile(r"queued at position [1-9]")).wait_for()
    page.get_by_text(re.compile(r"queued at position [1-9]\d*, begins in about [0-9.]+ m?s")).wait_for()
    page.wait_for_timeout(600)
    assert "begins in" in page.locator(".state").inner_text()  # the clock leaves it
    for stream in ahead:
        stream.close()
    page.locator(".bar:visible").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Ask").wait_for()


@pytest.mark.slow
def test_a_key_is_asked_for_only_where_the_server_wants_one(served: Served, visit: Callable[..., Any]) -> None:
    assert not visit(served).locator("#keyform").is_visible()
    locked = Served(load_tiny(), api_key="open sesame").wait_ready()
    page = visit(locked, expected="401", key="open sesame")
    page.get_by_label("This server wants its key").wait_for()
    ask(page, SHORT)
    page.locator(".error", has_text="this server wants its key").wait_for()
    assert page.get_by_label("Your question").input_value() == SHORT
    page.get_by_label("This server wants its key").fill("open sesame")
    page.keyboard.press("Enter")
    page.locator("#keyform").wait_for(state="hidden")
    page.keyboard.press("Enter")  # the question has the focus again
    wait_end(page)
    locked.close()


@pytest.mark.slow
def test_a_browser_asks_for_the_key_and_another_sites_form_does_not_get_by_with_it(
    visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    posts, refuse = [], Guard.refuse

    def recorded(guard: Guard, path: str, method: str, headers: Any) -> Any:
        refusal = refuse(guard, path, method, headers)
        if method == "POST":
            posts.append((headers.get("authorization", "")[:6], headers.get("origin"), refusal and refusal[0]))
        return refusal

    monkeypatch.setattr(Guard, "refuse", recorded)
    locked = Served(load_tiny(), api_key="open sesame").wait_ready()
    page = visit(locked, expected="401|403", http_credentials={"username": "me", "password": "open sesame"})
    assert not page.locator("#keyform").is_visible()
    ask(page, SHORT)
    wait_end(page)
    assert page.locator(".answer").inner_text().strip()
    assert posts == [("Basic ", locked.url, None)]

    form = f"""<form method="post" enctype="text/plain" action="{locked.url}/v1/chat/completions">
        <input name='{{"messages": [{{"role": "user", "content": "2 + 2?"}}], "max_tokens": 2, "user": "' value='"}}'></form>
        <script>document.forms[0].submit()</script>"""
    page.route("http://elsewhere.test/", lambda route: route.fulfill(content_type="text/html", body=form))
    page.goto("http://elsewhere.test/")
    page.wait_for_url(f"{locked.url}/**")
    assert posts[1:] == [("Basic ", "http://elsewhere.test", 403)]  # the browser sends the key by itself
    locked.close()


@pytest.mark.slow
def test_a_wrong_key_opens_no_page(browser: Any) -> None:
    locked = Served(load_tiny(), api_key="open sesame").wait_ready()
    context = browser.new_context(http_credentials={"username": "me", "password": "open"})
    answer = context.new_page().goto(locked.url)
    assert answer.status == 401
    assert "<title>" not in answer.text()
    context.close()
    locked.close()


@pytest.mark.slow
def test_the_policy_lets_no_other_code_run(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, expected="Content Security Policy|Failed to fetch")
    ask(page, "<img src=x onerror='window.ran = 1'>")
    wait_end(page)
    assert page.locator(".asked").inner_text().startswith("<img")
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = 2";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='x' onerror='window.ran = 3'><b style='color: red'>b</b>");
    }""")
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)")
    assert refused == "Failed to fetch"
    assert page.evaluate("window.ran ?? null") is None
    assert page.evaluate("document.querySelector('b').style.color") == ""


@pytest.mark.slow
def test_a_refusal_is_shown_and_the_question_is_kept(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, expected="503")
    body = '{"error": {"message": "too many are waiting"}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, headers={"Retry-After": "7"}, body=body))
    ask(page, SHORT)
    page.locator(".error", has_text="too many are waiting (try again in 7 s)").wait_for()
    assert page.get_by_label("Your question").input_value() == SHORT


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_a_phone(served: Served, visit: Callable[..., Any], width: int) -> None:
    page = visit(served, viewport={"width": width, "height": 740}, color_scheme="dark", reduced_motion="reduce")
    ask(page, SHORT)
    wait_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.querySelector('.left')).transitionDuration") == "0s"
