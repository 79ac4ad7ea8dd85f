"""The chat page in a browser, with a server that is scripted."""

import re
import shutil

import pytest

pytest.importorskip("uvicorn", reason='needs a server: pip install "jfa[serve]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dependency group dev")
from scripted_chat import PATIENCE, scripted_chat  # noqa: E402
from servers import new_engine, serving  # noqa: E402

expect = sync_api.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with scripted_chat() as chat:
        yield chat


@pytest.fixture
def chat(served):
    served.reset()
    yield served
    assert served.quiet()


@pytest.fixture
def visit(browser, chat):
    """Opens the page in a fresh browser profile; fails at an error of the page or a request to another host."""
    contexts, troubles = [], []

    def heard(message):
        # A response with an error status is reported as such, and is no trouble of the page.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            troubles.append(message.text)

    def requested(request):
        if not request.url.startswith((chat.url, "data:")):
            troubles.append(request.url)

    def visit(**options):
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}} | options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        context.on("console", heard)
        context.on("weberror", lambda error: troubles.append(str(error.error)))
        context.on("request", requested)
        page = context.new_page()
        page.goto(chat.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(visit):
    return visit()


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page, chat, question, answer, **finish):
    """Asks a question and lets it be answered; returns the request's body."""
    say(page, question)
    reply = chat.asked()
    reply.finish(answer, **finish)
    expect(last(page)).to_have_attribute("aria-busy", "false")
    return reply.body


def last(page):
    return page.locator(".answer").last


def text(page):
    return last(page).locator(".text")


def contents(body):
    return [(message["role"], message["content"]) for message in body["messages"]]


# The conversation


def test_an_answer_appears_as_it_is_written(page, chat):
    say(page, "Hello?")
    reply = chat.asked()
    assert reply.body == {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(page.locator(".question .text")).to_have_text("Hello?")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(last(page)).to_have_attribute("aria-busy", "true")
    reply.write("Good ")
    expect(text(page)).to_have_text("Good")
    reply.write("day.")
    expect(text(page)).to_have_text("Good day.")
    reply.finish(tokens=4)
    expect(last(page)).to_have_attribute("aria-busy", "false")
    expect(last(page).locator(".figures")).to_contain_text("4 tokens")
    assert contents(answered(page, chat, "And?", "Nothing.")) == [
        ("user", "Hello?"),
        ("assistant", "Good day."),
        ("user", "And?"),
    ]


def test_tokens_per_second(page, chat):
    page.clock.install()
    page.reload()
    page.clock.pause_at(page.evaluate("Date.now()") / 1000 + 3600)  # from here on, time passes only as told
    say(page, "Count")
    reply = chat.asked()
    reply.write("one ")
    while text(page).inner_text() != "one":
        page.clock.run_for(16)  # a frame
    page.clock.run_for(10_000)
    reply.finish("two", tokens=1501)
    expect(last(page).locator(".figures")).to_have_text("1,501 tokens, 150 a second")


def test_a_stopped_answer_keeps_its_text(page, chat):
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        say(page, "Tell me all")
        reply = chat.asked()
        reply.write("First")
        expect(text(page)).to_have_text("First")
        stop()
        assert reply.gone.wait(PATIENCE)
        expect(text(page)).to_have_text("First")
        expect(last(page).locator(".note")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert contents(answered(page, chat, "Go on", "Second"))[1] == ("assistant", "First")


def test_regenerate_asks_again_for_the_last_answer(page, chat):
    answered(page, chat, "A?", "a")
    before = answered(page, chat, "B?", "b")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    page.get_by_role("button", name="Regenerate").click()
    reply = chat.asked()
    assert reply.body == before
    reply.finish("c")
    expect(page.locator(".answer .text")).to_have_text(["a", "c"])


def test_an_edited_question_is_answered_anew_without_what_followed(page, chat):
    answered(page, chat, "A?", "a")
    answered(page, chat, "B?", "b")
    answered(page, chat, "C?", "c")
    page.locator(".question").nth(1).get_by_role("button", name="Edit").click()
    field = page.get_by_role("textbox", name="Edit the message")
    expect(field).to_be_focused()
    expect(field).to_have_value("B?")
    field.fill("other")
    page.keyboard.press("Escape")
    expect(page.locator(".question .text")).to_have_text(["A?", "B?", "C?"])
    page.locator(".question").nth(1).get_by_role("button", name="Edit").click()
    expect(field).to_have_value("B?")
    field.fill("D?")
    page.keyboard.press("Enter")
    reply = chat.asked()
    assert contents(reply.body) == [("user", "A?"), ("assistant", "a"), ("user", "D?")]
    reply.finish("d")
    expect(page.locator(".question .text")).to_have_text(["A?", "D?"])
    expect(page.locator(".answer .text")).to_have_text(["a", "d"])


def test_a_question_changed_during_its_answer_hangs_up(page, chat):
    say(page, "A?")
    reply = chat.asked()
    reply.write("a")
    expect(text(page)).to_have_text("a")
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the message").fill("B?")
    page.keyboard.press("Enter")
    assert reply.gone.wait(PATIENCE)
    reply = chat.asked()
    reply.write("b")
    expect(page.locator(".answer .text")).to_have_text(["b"])
    expect(page.get_by_role("status")).to_be_empty()
    reply.finish()
    expect(last(page)).to_have_attribute("aria-busy", "false")
    expect(page.locator(".note:visible")).to_have_count(0)


def test_a_conversation_survives_a_reload_until_a_new_one_begins(page, chat):
    answered(page, chat, "A?", "**a**", tokens=5)
    page.reload()
    expect(text(page).locator("strong")).to_have_text("a")
    expect(last(page).locator(".figures")).to_contain_text("5 tokens")
    assert contents(answered(page, chat, "B?", "b"))[:2] == [("user", "A?"), ("assistant", "**a**")]
    say(page, "C?")
    reply = chat.asked()
    reply.write("part")
    expect(text(page)).to_have_text("part")
    page.reload()
    assert reply.gone.wait(PATIENCE)
    expect(text(page)).to_have_text("part")
    expect(last(page).locator(".note")).to_have_text("The connection ended before the answer did.")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("heading", name="smollm2")).to_be_visible()
    page.reload()
    assert contents(answered(page, chat, "D?", "d")) == [("user", "D?")]


def test_reasoning_is_folded_above_the_answer(page, chat):
    say(page, "2 + 2?")
    reply = chat.asked()
    reply.write("Two and ", name="reasoning_content")
    reply.write("<b>two</b>.", name="reasoning_content")
    expect(page.get_by_text("Reasoning", exact=True)).to_be_visible()
    expect(last(page).locator(".reasoning div")).to_be_hidden()
    reply.write("\n" * 50 + "So it is.", name="reasoning_content")
    reply.finish("4")
    page.get_by_text("Reasoning", exact=True).click()
    expect(last(page).locator(".reasoning div")).to_contain_text("Two and <b>two</b>.")
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    expect(page.get_by_text("Reasoning", exact=True)).to_be_in_viewport()  # it does not jump to the end
    expect(text(page)).to_have_text("4")


@pytest.mark.parametrize("secure", [True, False], ids=["clipboard", "without"])
def test_an_answer_is_copied_as_it_was_written(visit, chat, secure):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    answered(page, chat, "A?", "**a**\n\n* b")
    if not secure:  # as it is without HTTPS
        page.evaluate("navigator.clipboard.writeText = undefined")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**a**\n\n* b"


# Settings


def test_settings_are_sent_if_set_and_survive_a_reload(page, chat):
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_be_focused()
    values = {"Temperature": "0.5", "Top p": "0.9", "Top k": "40", "Max tokens": "64", "Seed": "0"}
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.keyboard.press("Escape")
    page.reload()
    body = answered(page, chat, "A?", "a")
    assert contents(body) == [("system", "Be brief."), ("user", "A?")]
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_completion_tokens": 64, "seed": 0}
    assert {name: body[name] for name in body.keys() - {"model", "messages", "stream", "stream_options"}} == sent
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Close").click()
    for again in (lambda: None, page.reload):
        again()
        page.get_by_role("button", name="Regenerate").click()
        reply = chat.asked()
        reply.finish("b")
        expect(text(page)).to_have_text("b")
        assert reply.body.keys() == {"model", "messages", "stream", "stream_options"}
        assert contents(reply.body) == [("user", "A?")]


def test_a_choice_of_models_if_there_is_one(visit, chat):
    page = visit()
    expect(page.get_by_role("heading", name="smollm2")).to_be_visible()
    expect(page.get_by_label("Model")).to_be_hidden()
    chat.models.append({"id": "sql", "parent": "smollm2", "max_model_len": 8192})
    page.reload()
    expect(page.get_by_label("Model").locator("option")).to_have_text(["smollm2", "sql, adapter of smollm2"])
    page.get_by_label("Model").select_option("sql")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("sql")
    assert answered(page, chat, "A?", "a")["model"] == "sql"
    expect(last(page).get_by_role("heading")).to_have_text("sql")


# What goes wrong


def test_a_refused_request_can_be_tried_again(page, chat):
    chat.refusals = [
        (400, "No, because of <b>that</b>.", {}),
        (404, "No such model.", {}),
        (429, "Too many requests.", {"Retry-After": "5"}),
        (503, "No room.", {}),
    ]
    say(page, "A?")
    for note in ("No, because of <b>that</b>.", "No such model.", "Too many requests. Try again in 5 s.", "No room."):
        expect(last(page).locator(".note")).to_have_text(note)
        expect(page.get_by_role("status")).to_have_text(note)
        expect(page.get_by_role("button", name="Copy")).to_be_hidden()
        page.get_by_role("button", name="Try again").click()
    reply = chat.asked()
    assert contents(reply.body) == [("user", "A?")]
    reply.finish("a")
    expect(text(page)).to_have_text("a")
    expect(page.locator(".note:visible")).to_have_count(0)


def test_a_question_without_an_answer_is_part_of_the_next(page, chat):
    chat.refusals.append((503, "Later.", {}))
    say(page, "A?")
    expect(last(page).locator(".note")).to_have_text("Later.")
    assert contents(answered(page, chat, "B?", "b")) == [("user", "A?\n\nB?")]


def test_a_server_that_does_not_answer(page, chat):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "A?")
    expect(last(page).locator(".note")).to_have_text("The server does not answer. Is it running?")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    chat.asked().finish("a")
    expect(text(page)).to_have_text("a")


def test_models_are_asked_for_again_if_they_were_not_known(visit, chat):
    page = visit()
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_text("The server does not answer. Is it running?")).to_be_visible()
    page.unroute("**/v1/models")
    assert answered(page, chat, "A?", "a")["model"] == "smollm2"
    expect(last(page).get_by_role("heading")).to_have_text("smollm2")


def test_an_error_within_an_answer_keeps_its_text(page, chat):
    say(page, "A?")
    reply = chat.asked()
    reply.write("part")
    reply.event({"error": {"message": "Out of pages.", "type": "server_error", "code": None}})
    reply.close()
    expect(last(page).locator(".note")).to_have_text("Out of pages.")
    expect(text(page)).to_have_text("part")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_an_answer_that_is_cut_off_says_so(page, chat):
    for end in ("data: [DONE]\n\n", 'data: {"choices', "data: no JSON\n\n", ""):
        say(page, "A?")
        reply = chat.asked()
        reply.write("part")
        reply.raw(end.encode())
        reply.close()
        expect(last(page)).to_have_attribute("aria-busy", "false")
        expect(last(page).locator(".note")).to_have_text("The connection ended before the answer did.")
        expect(text(page)).to_have_text("part")


def test_an_answer_at_its_limit_says_so(page, chat):
    answered(page, chat, "A?", "part", reason="length")
    expect(last(page).locator(".note")).to_have_text("The answer reached its limit of tokens.")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_a_key_is_asked_for_and_kept_in_the_tab(visit, chat):
    chat.key = "secret"
    page = visit()
    field = page.get_by_role("textbox", name="API key")
    expect(field).to_be_focused()
    expect(page.get_by_role("dialog")).to_contain_text("The API key is missing or wrong.")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(field).to_have_value("")
    field.fill("secret")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    answered(page, chat, "A?", "a")
    page.reload()
    answered(page, chat, "B?", "b")
    assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
    chat.key = "changed"
    say(page, "C?")
    page.get_by_role("button", name="Cancel").click()
    expect(last(page).locator(".note")).to_have_text("The API key is missing or wrong.")
    page.get_by_role("button", name="Try again").click()
    field.fill("changed")
    page.keyboard.press("Enter")
    chat.asked().finish("c")
    expect(text(page)).to_have_text("c")


# The stream


STREAM = (
    ": a comment\r\n\r\nevent: message\r\nid: 1\r\n"
    'data: {"choices":[{"delta":{"content":"é漢"}}]}\r\n\r\n'
    'data: {"choices":[{"delta":{"content":"🙂"}}]}\n\n'
    'data: {"choices":[{"delta":{"reasoning_content":"end"}}]}\r\r'
    'data:{"choices":[{"delta":{},\r\ndata:"finish_reason":"stop"}]}\r\n\r\n'
    'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\ndata: more\n\n'
)


def test_events_are_read_whatever_the_chunks_are(page):
    for size in (1, 2, 1000):
        assert received(page, STREAM, size) == [
            ["é漢", "", None, None],
            ["🙂", "", None, None],
            ["", "end", None, None],
            ["", "", "stop", None],
            ["", "", None, 3],
        ]


def received(page, stream, size):
    """What the page reads from a stream that arrives in chunks of so many bytes."""
    return page.evaluate(
        """async ([bytes, size]) => {
            const { pieces } = await import("/page/api.js");
            const chunks = new ReadableStream({
                start(stream) {
                    for (let at = 0; at < bytes.length; at += size)
                        stream.enqueue(Uint8Array.from(bytes.slice(at, at + size)));
                    stream.close();
                },
            });
            const found = [];
            for await (const { content, reasoning, finish, usage } of pieces(new Response(chunks)))
                found.push([content, reasoning, finish ?? null, usage?.completion_tokens ?? null]);
            return found;
        }""",
        [list(stream.encode()), size],
    )


# What a model writes


def render(page, source, step=None):
    """The elements that a source becomes, if it arrives in steps of so many characters."""
    return page.evaluate(
        """async ([source, step]) => {
            const { Markup } = await import("/page/markup.js");
            const node = document.createElement("div");
            const markup = new Markup(node);
            for (let at = step; at < source.length; at += step) markup.update(source.slice(0, at));
            markup.update(source, true);
            node.normalize();
            return node.innerHTML;
        }""",
        [source, step or len(source)],
    )


OUTWARD = 'target="_blank" rel="noopener noreferrer nofollow"'
FORMS = {
    "Two\nlines.\n\nAnother.": "<p>Two\nlines.</p><p>Another.</p>",
    "# One\n### Three\ntext": "<h3>One</h3><h5>Three</h5><p>text</p>",
    "a *b* **c** ***d*** _e_ __f__": (
        "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <em>e</em> <strong>f</strong></p>"
    ),
    "**a *b* c**, *a **b***": "<p><strong>a <em>b</em> c</strong>, <em>a <strong>b</strong></em></p>",
    "2 * 3 * 4, 2*3*4, snake_case_name, **open": "<p>2 * 3 * 4, 2*3*4, snake_case_name, **open</p>",
    "这是**重点**内容": "<p>这是<strong>重点</strong>内容</p>",
    r"\*no\* `a*b*c` ``a`b`` `open": "<p>*no* <code>a*b*c</code> <code>a`b</code> `open</p>",
    "* a\n* b\n  * c\n\n    d\n* e": (
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>"
    ),
    "Do:\n3. a\nin\n1984. b\n1. a\n   more\n2. b\n\nend": (
        '<p>Do:\n3. a\nin\n1984. b</p><ol start="1"><li><p>a\nmore</p></li><li><p>b</p></li></ol><p>end</p>'
    ),
    "3. c\n\n   ```py\n   if a:\n       *b*\n   ```\n\n4. d": (
        '<ol start="3"><li><p>c</p><pre data-language="py"><code>if a:\n    *b*</code></pre></li><li><p>d</p></li></ol>'
    ),
    "```\n\tmake\n\n# no\n``\n````\nafter": "<pre><code>\tmake\n\n# no\n``</code></pre><p>after</p>",
    "~~~c++ x\n```\n": '<pre data-language="c++"><code>```\n</code></pre>',
    '[a `b`](https://x.org/a_(b)_c?d=*e* "t") http://y.org/z.': (
        f'<p><a href="https://x.org/a_(b)_c?d=*e*" {OUTWARD}>a <code>b</code></a>'
        f' <a href="http://y.org/z" {OUTWARD}>http://y.org/z</a>.</p>'
    ),
}

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<style>*{display:none}</style><svg/onload=alert(1)>",
    "[a](javascript:alert(1)) [b]( javascript:alert(1)) [c](JaVaScRiPt:alert(1)) [d](data:text/html,x) [e](//x.org)",
    '[a](http://[) [b](https://x.org" onclick="alert(1)) &lt;b&gt; &#60;b>',
    "![a](https://x.org/a.png)",
    "`<img src=x onerror=alert(1)>`",
    "```<script>\n<script>alert(1)</script>\n**no** [a](https://x.org)\n```",
    '```" onclick=alert(1)\n</code></pre><img src=x onerror=alert(1)>',
    "- <img src=x onerror=alert(1)>\n1. # <b>x</b>",
]
NODES = {"P", "PRE", "CODE", "A", "UL", "OL", "LI", "STRONG", "EM", "H3", "H4", "H5", "H6"}
LONG = {
    "lists": "- " * 20_000 + "x",
    "emphasis": "*a _b " * 10_000 + "c* d_ " * 10_000,
    "stars": "*" * 50_000 + "x",
    "backticks": "".join("`" * length + " " for length in range(1, 400)),
    "brackets": "[" * 30_000 + "](" * 30_000,
    "links": "[a](https://x" * 10_000,
    "fences": "```" + " " * 50_000 + "`",
    "heading": "# " + " " * 50_000 + "x",
    "blank lines": "- a" + "\n" * 50_000 + "b",
    "quote": "` " + "a" * 50_000 + "`",
    "address": "https://" + "." * 50_000,
}


def test_the_forms_of_markup(page):
    for source, html in FORMS.items():
        assert render(page, source) == html, source


def test_pieces_of_any_size_become_the_same(page):
    everything = "\n\n".join([*FORMS, *HOSTILE, *(source.replace("\n\n", "\n") for source in FORMS)])
    whole = render(page, everything)
    for step in (1, 2, 7):
        assert render(page, everything, step) == whole


def test_nothing_hostile_is_interpreted(page, chat):
    answered(page, chat, "A?", "\n\n".join(HOSTILE))
    answered(page, chat, "<img src=x onerror=alert(1)>", "b")
    shown = page.evaluate(
        """[...document.querySelectorAll("#turns .text *")].map((node) =>
            [node.tagName, node.getAttributeNames().join(), node.href ?? ""])"""
    )
    assert {name for name, _, _ in shown} <= NODES
    assert {names for _, names, _ in shown} <= {"", "start", "data-language", "href,target,rel"}
    assert {href for _, _, href in shown} == {"", "https://x.org/", "https://x.org/a.png"}
    answer = page.locator(".answer .text").first.inner_text()
    for source in HOSTILE[:5]:
        assert source in answer
    for inside in ("<script>alert(1)</script>\n**no** [a](https://x.org)", "</code></pre><img src=x onerror=alert(1)>"):
        assert inside in answer
    expect(page.locator(".question .text").last).to_have_text("<img src=x onerror=alert(1)>")


def test_long_hostile_text_takes_linear_time_and_bounded_depth(page):
    """Time is not measured: what is cubic, or worse, never ends."""
    for name, source in LONG.items():
        depth = deepest = 0
        for closes in re.findall(r"<(/?)\w", render(page, source)):
            depth += -1 if closes else 1
            deepest = max(deepest, depth)
        assert 0 < deepest < 50, name


def test_only_the_block_that_grows_is_made_anew(page, chat):
    say(page, "A?")
    reply = chat.asked()
    reply.write("One.\n\nTwo.\n\n```\ncode\n")
    expect(text(page).locator("pre")).to_have_text("code")
    page.evaluate("document.querySelectorAll('.answer .text > *').forEach((node) => (node.kept = true))")
    reply.write("more\n")
    expect(text(page).locator("pre")).to_have_text("code\nmore")
    assert page.evaluate("[...document.querySelectorAll('.answer .text > *')].every((node) => node.kept)")
    reply.finish("```\n\nend")
    expect(text(page).locator("p").last).to_have_text("end")


# How it is used and seen


def test_keyboard_alone(page, chat):
    page.keyboard.type("A?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("B?")
    page.keyboard.press("Enter")
    reply = chat.asked()
    assert contents(reply.body) == [("user", "A?\nB?")]
    reply.finish("a")
    expect(last(page)).to_have_attribute("aria-busy", "false")
    before = ["Regenerate", "Copy", "Edit", "Conversation", "Settings", "New conversation"]
    after = [*reversed(before), "Message", "Send"]
    for key, names in (("Shift+Tab", before), ("Tab", after[1:])):
        for name in names:
            page.keyboard.press(key)
            assert page.evaluate(FOCUSED) == [name, True]
    for _ in ("Message", "Regenerate"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    chat.asked().finish("b")
    expect(text(page)).to_have_text("b")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


FOCUSED = """(() => {
    const node = document.activeElement;
    const seen = node.matches(".box textarea")
        ? getComputedStyle(node.closest(".box")).boxShadow !== "none"
        : getComputedStyle(node).outlineStyle !== "none";
    return [(node.ariaLabel ?? node.labels?.[0]?.textContent ?? node.textContent).trim(), seen];
})()"""


def test_every_control_has_a_name(page, chat):
    answered(page, chat, "A?", "a")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select")].filter((node) =>
            !(node.ariaLabel || node.labels?.[0]?.textContent.trim() || node.textContent.trim())).length"""
    )
    assert unnamed == 0


def test_complete_blocks_are_said_politely(page, chat):
    status = page.get_by_role("status")
    say(page, "A?")
    reply = chat.asked()
    reply.write("First block.\n\nSecond")
    expect(text(page).locator("p").last).to_have_text("Second")
    reply.write(" block.\n\nThird")
    expect(status).to_contain_text("block.")
    reply.finish(" block.", tokens=9)
    expect(status).to_contain_text("Third block.")
    expect(status).to_contain_text("9 tokens")


def test_the_end_is_followed_while_the_reader_is_there(page, chat):
    say(page, "A?")
    reply = chat.asked()
    reply.write("line\n\n" * 60 + "X")
    expect(text(page).locator("p").last).to_have_text("X")
    expect(text(page).locator("p").last).to_be_in_viewport()
    page.mouse.move(500, 300)
    page.mouse.wheel(0, -600)
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    top = page.evaluate("document.querySelector('main').scrollTop")
    reply.write("\n\nY")
    expect(text(page).locator("p").last).to_have_text("Y")
    expect(text(page).locator("p").last).not_to_be_in_viewport()
    assert page.evaluate("document.querySelector('main').scrollTop") == top
    page.get_by_role("button", name="Latest").click()
    expect(text(page).locator("p").last).to_be_in_viewport()
    expect(page.get_by_role("button", name="Latest")).to_be_hidden()
    reply.finish("\n\nZ")
    expect(text(page).locator("p").last).to_have_text("Z")
    expect(text(page).locator("p").last).to_be_in_viewport()


def test_light_and_dark(page):
    lightness = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness[scheme] = sum(map(int, re.findall(r"\d+", color)))
    assert lightness["dark"] < 150 < 700 < lightness["light"]


def test_nothing_moves_if_that_is_not_wanted(page, chat):
    say(page, "A?")
    reply = chat.asked()
    expect(last(page)).to_have_attribute("aria-busy", "true")
    beats = {}
    for motion in ("reduce", "no-preference"):
        page.emulate_media(reduced_motion=motion)
        beats[motion] = page.evaluate(
            "getComputedStyle(document.querySelector('.answer .text'), '::before').animationName"
        )
    reply.finish("a")
    expect(text(page)).to_have_text("a")
    assert beats == {"reduce": "none", "no-preference": "beat"}


def test_a_phone(visit, chat):
    chat.models.append({"id": "an-organization/an-adapter-with-a-long-name", "parent": "smollm2"})
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.get_by_label("Message", exact=True).fill("A?")
    page.keyboard.press("Enter")  # no Shift+Enter on a screen: a new line
    expect(page.get_by_label("Message", exact=True)).to_have_value("A?\n")
    page.get_by_role("button", name="Send").tap()
    code = "```\n" + "x = 1; " * 40 + "\n```"
    chat.asked().finish(f"{'w' * 300}\n\n{code}\n\n- `{'a' * 200}`\n\nhttps://x.org/{'b' * 200}\n\n" + "z\n\n" * 30)
    expect(last(page)).to_have_attribute("aria-busy", "false")
    for node in ("document.documentElement", "document.querySelector('main')"):
        assert page.evaluate(f"{node}.scrollWidth <= {node}.clientWidth")
    pre = text(page).locator("pre")
    assert pre.evaluate("(node) => node.scrollWidth > node.clientWidth")
    expect(page.get_by_label("Message", exact=True)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="Settings").tap()
    expect(page.get_by_label("System prompt")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="Close")).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= innerWidth")


def test_the_server_itself(browser, model):
    """No script between: the page as `jfa serve` sends it, and what a model writes."""
    with serving(new_engine(model), keys=["a-key"]) as served, browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(served.url)
        page.locator("input[name=key]").fill("a-key")
        page.keyboard.press("Enter")
        page.get_by_label("Message", exact=True).fill("A?")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("12")
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Send").click()
        expect(last(page)).to_have_attribute("aria-busy", "false")
        expect(page.locator(".turns, main")).to_contain_text("12 tokens")
        served.runner.is_draining = True
        page.get_by_label("Message", exact=True).fill("B?")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("main")).to_contain_text("shutting down")
