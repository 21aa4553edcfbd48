"""The web chat as users see it: real processes, a real browser. ``WEB_CHAT_PICTURE`` names a file for a picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_server_process import free_port, started
from tests.served import until

pytestmark = pytest.mark.slow

SESSION_LEN = 8192
"""Long enough that a reply without an end outlasts what is done beside it."""

PNG = b"\x89PNG"


class Page:
    """One browser window with the chat."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.all("#box textarea"), "there is a box to type in")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
        assert until(lambda: bool(condition()), seconds), f"{what}; the page reads: {self.driver.page_source[-2000:]}"

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        """What elements read, all at one moment: they may be replaced while a reply is written."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        return list(self.driver.execute_script(script, selector))

    def replies(self) -> list[str]:
        return self.texts("#chat .bot-row .message-content")

    def figures(self) -> str:
        return "".join(self.texts("#figures"))

    def fill(self, selector: str, text: str) -> None:
        """Put ``text`` into a field at once, as pasting it does."""
        script = (
            "const [field, text] = arguments;"
            "const set = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value').set;"
            "set.call(field, text);"
            "for (const name of ['input', 'change', 'blur']) field.dispatchEvent(new Event(name, {bubbles: true}))"
        )
        self.driver.execute_script(script, self.all(selector)[0], text)

    def say(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.all("#box textarea")[0].send_keys(text, Keys.ENTER)

    def click(self, selector: str) -> None:
        self.wait(lambda: self.all(selector), f"there is {selector}")
        self.all(selector)[-1].click()

    def ended(self) -> bool:
        return bool(self.all("#box .submit-button")) and not self.all("#box .stop-button")

    def ask(self, text: str) -> str:
        """Say ``text`` and wait for the whole reply."""
        had = len(self.replies())
        self.say(text)
        self.wait(lambda: len(self.replies()) > had and self.ended(), f"{text!r} is answered")
        return self.replies()[-1]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    missing += [name for name in ("selenium", "gradio") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs Chromium and what drives it, {', '.join(missing)} is missing: scripts/test --slow")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", "window-size=1280,903"):
        options.add_argument(f"--{flag}")
    made = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def server(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over the bundled model: the address."""
    log = tmp_path_factory.mktemp("server") / "log"
    with started(log, "--no-warmup", "--session-len", str(SESSION_LEN), "--max-batch-size", "2") as (_, url):
        yield url


@pytest.fixture(scope="module")
def url(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web chat over ``server``, which answers with the likeliest tokens."""
    with shown(tmp_path_factory.mktemp("page") / "log", server, "--temperature", "0") as (_, found):
        yield found


@pytest.fixture(scope="module")
def endless_url(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One whose replies go on until the conversation is too long."""
    flags = ["--ignore-eos", "--max-new-tokens", str(SESSION_LEN)]
    with shown(tmp_path_factory.mktemp("endless") / "log", server, *flags) as (_, found):
        yield found


@pytest.fixture
def page(driver: Any, url: str) -> Page:
    return Page(driver, url)


@pytest.fixture
def endless(driver: Any, endless_url: str, server: str) -> Iterator[Page]:
    yield Page(driver, endless_url)
    assert until(lambda: running(server) == 0), "a test left a reply behind"


@contextmanager
def shown(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A web chat as a process, and its address."""
    port = free_port()
    where = ["--server-name", "127.0.0.1", "--server-port", str(port)]
    command = [sys.executable, "-m", "jaxdeploy", "serve", "gradio", *flags, *where]
    with log.open("wb") as lines, subprocess.Popen(command, stderr=lines) as process:
        found = f"http://127.0.0.1:{port}"
        assert until(lambda: opens(found) or process.poll() is not None, 240), "it did not start"
        assert process.poll() is None, log.read_text()
        yield process, found
        process.terminate()
        process.wait(30)


def opens(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False


def metric(server: str, name: str) -> int:
    found = re.search(rf"^jaxdeploy:{name}{{.*}} (\S+)$", httpx2.get(f"{server}/metrics").text, re.MULTILINE)
    assert found, name
    return int(float(found[1]))


def running(server: str) -> int:
    return metric(server, "num_requests_running") + metric(server, "num_requests_waiting")


def test_a_conversation(page: Page, tmp_path: Path) -> None:
    assert page.driver.title == "jaxdeploy-demo · jaxdeploy"
    assert "42" in page.ask("My name is Anna. What is 6 times 7?")
    assert re.fullmatch(r"\d+ tokens · TTFT \d+\.\d\d s · \d+\.\d tok/s", page.figures())
    assert "Anna" in page.ask("What is my name?")
    assert page.ask("What does --tp do?")
    picture = Path(os.environ.get("WEB_CHAT_PICTURE", tmp_path / "web-chat.png"))
    page.driver.save_screenshot(str(picture))
    assert picture.read_bytes().startswith(PNG)
    page.click("#new-chat")
    page.wait(lambda: not page.replies(), "a new chat is empty")
    assert page.figures() == ""


def test_a_phone_shows_the_chat_first(driver: Any, url: str) -> None:
    size = driver.get_window_size()
    driver.set_window_size(420, 900)
    page = Page(driver, url)
    page.wait(lambda: page.all("#settings") and not page.all("#settings.open"), "the side is closed")
    driver.set_window_size(size["width"], size["height"])


def test_a_phone_shows_every_button_in_full(driver: Any, url: str) -> None:
    size = driver.get_window_size()
    driver.set_window_size(420, 900)
    page = Page(driver, url)
    page.ask("Hi!")
    script = (
        "const chat = document.querySelector('#chat').getBoundingClientRect();"
        "return [...document.querySelectorAll('#chat .message-buttons-left button')].map(button => {"
        "const box = button.getBoundingClientRect(); return [box.left - chat.left, chat.right - box.right]})"
    )
    places = driver.execute_script(script)
    driver.set_window_size(size["width"], size["height"])
    assert len(places) == 3
    assert min(min(place) for place in places) >= 0, "the chat cuts off what is outside"


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    origin = page.driver.execute_script("return location.origin")
    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert len(loaded) > 5
    assert [name for name in loaded if not name.startswith((origin, "data:", "blob:"))] == []


def test_a_reply_grows_and_is_stopped(endless: Page, server: str) -> None:
    endless.say("Hi!")
    lengths: set[int] = set()

    def grown() -> bool:
        lengths.update(len(text) for text in endless.replies())
        return len(lengths) > 4

    endless.wait(grown, "it is seen to grow")
    assert running(server) == 1
    assert "tok/s" in endless.figures()
    endless.click("#box .stop-button")
    endless.wait(lambda: running(server) == 0, "the server stops too")
    endless.wait(endless.ended, "one can type again")
    assert endless.figures().endswith(" · stopped")
    assert len(endless.replies()[-1]) >= max(lengths), "what there was stays"


def test_a_browser_that_leaves_ends_its_reply(endless: Page, server: str) -> None:
    endless.say("Hi!")
    endless.wait(lambda: endless.replies() and running(server) == 1, "it is answered")
    endless.driver.get("about:blank")
    endless.wait(lambda: running(server) == 0, "the server stops")


def test_two_people(endless: Page, server: str) -> None:
    driver, first, address = endless.driver, endless.driver.current_window_handle, endless.driver.current_url
    endless.say("Hi!")
    endless.wait(lambda: running(server) == 1, "the first is answered")
    driver.switch_to.new_window("window")
    second = Page(driver, address)
    assert second.replies() == [], "what others say is not seen"
    second.say("Hello!")
    second.wait(lambda: running(server) == 2, "both are answered")
    second.click("#box .stop-button")
    second.wait(lambda: running(server) == 1, "one is stopped")
    driver.close()
    driver.switch_to.window(first)
    assert not endless.ended(), "the other goes on"
    endless.click("#box .stop-button")
    endless.wait(endless.ended, "and is stopped by its own button")


def test_asking_again_and_taking_back(page: Page, server: str) -> None:
    first = page.ask("What is 6 times 7?")
    before = metric(server, "generation_tokens_total")
    page.click("button[aria-label=Retry]")
    page.wait(lambda: metric(server, "generation_tokens_total") > before and page.ended(), "it is generated anew")
    assert page.replies() == [first]
    page.click("button[aria-label=Undo]")
    page.wait(lambda: not page.replies(), "it is taken back")
    assert page.all("#box textarea")[0].get_property("value") == "What is 6 times 7?"


def test_settings_count(page: Page, server: str) -> None:
    def prompt_tokens() -> int:
        before = metric(server, "prompt_tokens_total")
        page.ask("Hi!")
        page.click("#new-chat")
        page.wait(lambda: not page.replies(), "a new chat is empty")
        return metric(server, "prompt_tokens_total") - before

    plain = prompt_tokens()
    page.fill("#settings textarea", "Answer in one short sentence, and be kind to who asks.")
    assert prompt_tokens() > plain + 10, "the system prompt is sent"
    page.fill("#settings input[aria-label*='Longest reply']", "3")
    page.ask("What does --tp do?")
    assert re.fullmatch(r"3 tokens .* · cut off at max_new_tokens", page.figures())


def test_too_long_a_conversation(page: Page) -> None:
    text = "word " * SESSION_LEN
    page.fill("#box textarea", text)
    page.click("#box .submit-button")
    page.wait(lambda: page.texts("#figures .error"), "there is an error")
    assert page.texts("#figures .error")[0].startswith("This conversation is too long for the model: prompt of ")
    assert page.all("#box textarea")[0].get_property("value") == text, "what was typed is not lost"
    assert page.replies() == []
    page.fill("#box textarea", "")
    assert "42" in page.ask("What is 6 times 7?")
    assert not page.texts("#figures .error")


def test_a_model_in_its_own_process_behind_keys(driver: Any, tmp_path: Path) -> None:
    flags = ["--no-warmup", "--session-len", "256", "--temperature", "0", "--api-keys", "secret"]
    with shown(tmp_path / "log", *flags) as (process, url):
        assert httpx2.get(f"{url}/config").status_code == 401
        assert httpx2.post(f"{url}/login", data={"username": "anna", "password": "wrong"}).status_code == 400
        driver.get(url)
        assert until(lambda: len(driver.find_elements("css selector", "input")) == 2, 30), "it asks for a key"
        name, key = driver.find_elements("css selector", "input")
        name.send_keys("anna")
        key.send_keys("secret")
        driver.find_element("css selector", "button").click()
        page = Page(driver, url)
        assert "42" in page.ask("What is 6 times 7?")
        process.terminate()
        assert process.wait(30) == -15
    assert "ERROR" not in (tmp_path / "log").read_text()


ROUTES = """
import json
from jaxdeploy.config import ServerConfig
from jaxdeploy.web_chat.dialogue import Manner
from jaxdeploy.web_chat.run import create_app

class Model:
    name = "x"

app = create_app(Model(), Manner(), ServerConfig(api_keys=["k"]))
(below,) = [route.app for route in app.routes if hasattr(getattr(route, "app", None), "tokens")]


def flat(routes):
    for route in routes:
        if hasattr(route, "path"):
            yield from ((method, route.path) for method in getattr(route, "methods", None) or ["GET"])
        else:
            yield from flat(route.original_router.routes)


print(json.dumps(list(flat(below.routes))))
"""
"""Prints every route of the page's library."""

OPEN = {"/", "/login", "/login/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}


class Thinker(BaseHTTPRequestHandler):
    """A server of OpenAI's API whose model thinks before it speaks."""

    deltas: tuple[dict[str, str], ...] = (
        *({"reasoning_content": "Six sevens are "}, {"reasoning_content": "42."}),
        {"content": "It is **42**."},
    )

    def do_GET(self) -> None:
        self._answer("application/json", json.dumps({"data": [{"id": "thinker"}]}))

    def do_POST(self) -> None:
        lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in self.deltas]
        self._answer("text/event-stream", "".join(lines))

    def _answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_every_route_is_closed_without_a_login(driver: Any, tmp_path: Path) -> None:
    printed = subprocess.run([sys.executable, "-c", ROUTES], capture_output=True, text=True, check=True).stdout
    routes = json.loads(printed)
    assert ["GET", "/gradio_api/startup-events"] in routes
    with (
        thinking(Thinker) as url,
        shown(tmp_path / "log", url, "--api-keys", "secret") as (_, page),
        httpx2.Client(base_url=page, timeout=20) as http,
    ):
        for method, path in routes:
            answer = http.request(method, re.sub(r"{[^}]*}", "x", path))
            if path not in OPEN and not path.startswith(("/assets", "/static")):
                assert answer.status_code in (401, 404), (method, path, answer.status_code)
        assert "thinker" not in http.get("/").text, "the login page does not name the model"
        wrong = [http.post("/login", data={"username": "a", "password": "\u00e9"}).status_code for _ in range(100)]
        assert set(wrong) == {400, 429}
        assert wrong.count(400) <= 10


class HalfAnEmoji(Thinker):
    """One that says half an emoji."""

    deltas = ({"content": "4\ud83d"}, {"content": "2"})


def test_half_an_emoji_does_not_break_the_stream_of_events(driver: Any, tmp_path: Path) -> None:
    with (
        thinking(HalfAnEmoji) as url,
        shown(tmp_path / "log", url) as (_, page),
        httpx2.Client(base_url=page, timeout=20) as http,
    ):
        (ask,) = [each["id"] for each in http.get("/config").json()["dependencies"] if "submit" in str(each["targets"])]
        data = [None, "Q\ud83d", "\ude00", 0.7, 0.8, 0, 9, 1.0]
        asked = {"data": data, "fn_index": ask, "session_hash": "x", "event_data": None}
        kind = {"Content-Type": "application/json"}
        assert http.post("/gradio_api/queue/join", content=json.dumps(asked), headers=kind).status_code == 200
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "x"}) as events:
            lines = []
            for line in (line for line in events.iter_lines() if line.startswith("data: ")):
                lines.append(json.loads(line[6:]))
                if lines[-1]["msg"] == "process_completed":
                    break
        assert lines[-1]["success"], lines
        said = json.dumps(lines, ensure_ascii=False)
        assert "Q\ufffd" in said
        assert "4\ufffd" in said


@contextmanager
def thinking(handler: type[Thinker]) -> Iterator[str]:
    """A server with such a model: the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_thoughts_are_folded(driver: Any, tmp_path: Path) -> None:
    with thinking(Thinker) as server, shown(tmp_path / "log", server) as (_, url):
        page = Page(driver, url)
        page.say("What is 6 times 7?")
        page.wait(lambda: "It is 42." in page.texts("#chat")[0] and page.ended(), "it is answered")
        assert "Six sevens" not in page.texts("#chat")[0]
        page.click("#chat .bot-row [role=button], #chat .bot-row .title")
        page.wait(lambda: "Six sevens are 42." in page.texts("#chat")[0], "a click shows the thoughts")
        page.click("button[aria-label=Retry]")
        page.wait(lambda: page.ended() and page.texts("#chat")[0].count("It is 42.") == 1, "it is asked again")
