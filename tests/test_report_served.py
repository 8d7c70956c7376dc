"""The page of a run from a server on this machine, in a notebook, and its questions for embedding-atlas: whole, read when asked for, and for nobody else."""

from __future__ import annotations

import copy
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.commands import within
from helpers.forked import Forked
from helpers.probed import run_of
from sklearn.decomposition import PCA

from AutomaticEval import evaluate_with_activations, open_run, run_report, show
from AutomaticEval.analysis.lens.question_file import NAME, write_lens_questions
from AutomaticEval.errors import PathExists, SelectionError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.pages import atlas
from AutomaticEval.pages.prompt_rows import sampled
from AutomaticEval.pages.served_page import served_page
from AutomaticEval.report.page.local_server import LocalServer
from AutomaticEval.store.run import Run

N = 130
HOSTILE, LONG, SHORT = 3, 7, 8
BEGINNING = f"{'Two examples of how to answer. ' * 5}\n"
WORDS = {
    HOSTILE: "<script>document.title='stolen'</script></script><!--<img src=x onerror=\"document.title='stolen'\">",
    LONG: BEGINNING + "wide " * 20_000 + "end",
    SHORT: BEGINNING + "short",
}


def task_of(number: int) -> str:
    return "few" if number in (LONG, SHORT) else "t"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of N questions with a row of each of their two tokens, of which a file shows some, and what the lens says of each."""
    folder = tmp_path_factory.mktemp("served")
    draw = np.random.default_rng(1)
    last, first = (
        {f"layer_{layer}": draw.normal(size=(N, 8)).astype(np.float32) for layer in range(3)} for _ in range(2)
    )
    columns = [
        {"correct": bool(n % 3), "doc_id": n, "target": 1, "prediction": 0, "logprob": -0.5, "task": task_of(n)}
        for n in range(N)
    ]
    run_of(folder / "run", last, columns, [WORDS.get(n, f"what is the number {n} about") for n in range(N)], first)
    (folder / "results").mkdir()
    lens = {"kind": "lens", "run": {"path": "run", "model": "m"}, "places": []}
    (folder / "results" / "lens.json").write_text(json.dumps(lens))
    lines = [(n, place, float(draw.random())) for n in range(N) for place in ("layer_0", "layer_2")]
    said = {
        "task": [task_of(n) for n, _, _ in lines],
        "doc_id": [n for n, _, _ in lines],
        "repeat": [0] * len(lines),
        "place": [place for _, place, _ in lines],
        "choice_probabilities": [[chance] for _, _, chance in lines],
        "top_token": ["<b>"] * len(lines),
        "gold_rank": [float(n) for n, _, _ in lines],
    }
    write_lens_questions(folder / "results" / NAME, said)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder / "run")


@pytest.fixture(scope="module")
def server(folder: Path, run: Run) -> Iterator[LocalServer]:
    made = served_page(run, results=[folder / "results"])
    running = Thread(target=made.run)
    running.start()
    yield made
    made.shutdown()
    running.join()


def asked(server: LocalServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)  # type: ignore[misc]
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def told(server: LocalServer, path: str) -> dict[str, Any]:
    answer, text = asked(server, f"/{server.secret}/{path}")
    assert answer.status == 200, text
    found: dict[str, Any] = json.loads(text)
    return found


def test_who_does_not_know_the_address_is_refused(server: LocalServer) -> None:
    page, port = f"/{server.secret}/", server.server_port
    for path in ("/", "/rows/0", f"/{server.secret[:-1]}/", f"/x{page}", "/favicon.ico", f"/{server.secret}x/", "//"):
        answer, text = asked(server, path)
        assert (answer.status, "number" in text) == (403, False), path
    for host in (
        f"evil.example:{port}",
        "evil.example",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"127.0.0.1:{port}.evil",
    ):
        assert asked(server, page, Host=host)[0].status == 403, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):  # the second, where ssh hands the port on
        assert asked(server, page, Host=host)[0].status == 200, host
    for method in ("POST", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"):
        answer, text = asked(server, page, method)
        assert (answer.status, "number" in text) == (405, False), method
    for path in ("rows/130", "rows/-1", "rows/1e1", "rows/", "texts/x", "../run", "rows/1/2", "rows/١"):
        assert (
            asked(server, page + "".join(f"%{each:02x}" if each > 127 else chr(each) for each in path.encode()))[
                0
            ].status
            == 404
        )
    for raw in (
        b"GET " + page.encode() + b" HTTP/1.0\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET " + page.encode() + b"\r\n\r\n",
    ):
        with socket.create_connection(server.server_address[:2]) as opened:  # type: ignore[arg-type]
            opened.sendall(raw)
            assert b"number" not in opened.makefile("rb").read()


def test_an_address_without_its_last_slash_leads_to_the_page(server: LocalServer) -> None:
    """What a page asks for would else be beside the secret, and be refused."""
    answer, text = asked(server, f"/{server.secret}")
    assert (answer.status, answer.headers["Location"], text) == (308, f"/{server.secret}/", "")


def test_only_this_machine_is_answered_and_nothing_is_kept(server: LocalServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.server_port))
    for path, kind in (("", "text/html"), ("rows/3", "application/json"), ("nothing", "application/json")):
        headers = asked(server, f"/{server.secret}/{path}")[0].headers
        assert headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Access-Control-Allow-Origin"] is None
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "connect-src 'self'; " in policy
        assert policy.endswith("frame-ancestors 'none'")
        assert "unsafe" not in policy


def test_rows_of_every_question_are_those_of_the_run(server: LocalServer, run: Run, folder: Path) -> None:
    in_file = sampled(run.questions(), run.keys)
    beside = [number for number in range(N) if number not in in_file]
    assert beside
    for number in (0, beside[0], beside[-1], HOSTILE, LONG):
        held = told(server, f"rows/{number}")
        assert list(held["tokens"]["values"]) == ["layer_0", "layer_1", "layer_2"]
        for key, values in held["tokens"]["values"].items():
            expected = np.linalg.norm(run.read(number, key)[:2].double().numpy(), axis=1)
            np.testing.assert_allclose(values, expected, rtol=0.006)  # three digits
        table = pyarrow.parquet.read_table(folder / "results" / NAME).to_pandas()
        own = table[table.doc_id == number]
        assert held["lens"]["places"] == list(own.place)
        np.testing.assert_allclose(held["lens"]["choices"], np.stack(own.choice_probabilities.to_list()), rtol=1e-3)
        assert held["lens"]["rank"] == [number, number]


def test_a_hostile_prompt_is_text_in_what_is_served_and_a_long_one_whole(server: LocalServer) -> None:
    _, text = asked(server, f"/{server.secret}/texts/{HOSTILE}")
    assert not set("<>&") & set(text)
    assert json.loads(text)["prompt"] == WORDS[HOSTILE]
    _, page = asked(server, f"/{server.secret}/")
    assert page.count("</script>") == 2
    assert "left out" in page  # the long one is cut in the page
    assert "are cut to 30,000 characters until they are chosen." in page
    assert '"tokensTold":"The rows are being read."' in page
    assert told(server, f"texts/{LONG}")["prompt"] == WORDS[LONG]
    assert told(server, f"texts/{LONG}")["isCut"] is False


def test_a_failure_of_the_store_is_told_as_text() -> None:
    def fails(asked: str) -> None:
        raise StoreError("\x1b<b>run.h5 is damaged</b>")

    with LocalServer("page", fails) as failing:
        Thread(target=failing.handle_request).start()
        answer, text = asked(failing, f"/{failing.secret}/rows/0")
    assert (answer.status, json.loads(text)) == (500, {"error": "\\x1b<b>run.h5 is damaged</b>"})
    assert "<" not in text


def test_a_served_rank_is_that_of_the_models_own_logits(demo: LoadedModel, tmp_path: Path) -> None:
    done = evaluate_with_activations(demo, "demo_facts", limit=1, positions="all", output=tmp_path / "run")
    made = open_run(done.folder or "")
    with served_page(made, loaded=demo) as ranked:
        held = ranked.answer("rows/0")["tokens"]
    contents = made.contents
    ids = torch.tensor([[*contents.input_ids.item(0).tolist(), *contents.generated_ids.item(0).tolist()]])
    with torch.no_grad():
        logits = demo.model(ids).logits[0]
    n = held["nPrompt"]
    own = logits[torch.arange(n), ids[0, 1 : n + 1]]
    ranks = (logits[:n] > own[:, None]).sum(dim=1) + 1
    assert len(held["tokens"]) == n
    np.testing.assert_allclose(held["values"][made.keys[-1]], ranks, rtol=0.006)


def test_a_run_without_rows_of_prompts_is_shown(demo: LoadedModel, tmp_path: Path) -> None:
    for how in ({"positions": "last"}, {"reduce": "mean"}):
        name = next(iter(how))
        done = evaluate_with_activations(demo, "demo_facts", limit=1, output=tmp_path / name, **how)  # type: ignore[arg-type]
        made = open_run(done.folder or "")
        assert '"tokens":{},' in run_report(made).html
        assert '"tokens":{},' in show(made.questions()[0]).html
        with served_page(made) as server:
            assert server.answer("rows/0") == {"tokens": None, "lens": None}


WAITS = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
from AutomaticEval.cli.app import app
try:
    app(["report", "run", "--serve"])
finally:
    print([each.name for each in threading.enumerate()])
"""


def test_ctrl_c_ends_it_with_no_thread_left(folder: Path) -> None:
    program = Forked(["-c", WAITS], folder)
    end = time.monotonic() + 60
    while not (found := re.search(r"http://\S+/\n", program.said()[0])):
        assert time.monotonic() < end, program.said()
        assert program.poll() is None, program.said()
        time.sleep(0.05)
    address = urlsplit(found[0].strip())
    assert address.hostname == "127.0.0.1"
    with socket.create_connection((address.hostname, address.port or 0)) as idle:  # as browsers keep them
        time.sleep(0.3)
        begun = time.monotonic()
        program.send_signal(signal.SIGINT)
        done = program.wait(30)
        assert idle.recv(1) == b""
    assert time.monotonic() - begun < 5  # not until the idle one had timed out
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Ended.\n['MainThread']\n")


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of a browser. At the end, nothing was said in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    assert said == []
    context.close()


def chosen(page: Any, number: int) -> str:
    """What is shown of a question, once its tokens are."""
    page.fill("#search", "" if number in WORDS else f"number {number} about")
    page.locator("#rows button").nth(number if number in WORDS else 0).click()
    page.locator(f"#chosen h3:has-text('document {number}')").wait_for()
    page.locator(".tokens").wait_for()
    titles = [each.get_attribute("title") for each in page.locator(".tokens span").all()]
    colours = page.locator(".tokens span").evaluate_all("all => all.map(each => each.style.backgroundColor)")
    return f"{page.locator('#chosen').inner_text()} {titles} {colours}"


def test_a_served_page_shows_what_the_file_shows_and_more(
    server: LocalServer, run: Run, folder: Path, page: Any, tmp_path: Path
) -> None:
    file = run_report(run, results=[folder / "results"]).save(tmp_path / "page.html")
    in_file = sampled(run.questions(), run.keys)
    both = [number for number in (*in_file[:2], HOSTILE) if number in in_file]
    assert HOSTILE in both
    page.goto(file.as_uri())
    shown = [chosen(page, number) for number in both]
    whole = page.locator("main").inner_text().split("Questions")[0]
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server.address)
    assert [chosen(page, number) for number in both] == shown
    assert page.locator("main").inner_text().split("Questions")[0] == whole
    assert page.title() == "run"
    beside = next(number for number in range(20, N) if number not in in_file)
    assert "Tokens of the prompt by norm at layer_2" in chosen(page, beside)
    assert "probability by the lens at layer_2" in chosen(page, beside)
    assert "What all prompts of this task begin with" in chosen(page, SHORT)
    assert "What all prompts" not in chosen(page, LONG)
    assert page.locator("#chosen pre").first.inner_text() == WORDS[LONG]
    assert all(url.startswith(server.address) for url in urls)
    assert len(urls) == 1 + len({0, *both, beside, SHORT, LONG}) + 1  # the page, rows, and one long text


def test_a_page_says_that_its_server_has_ended(run: Run, browser: Any) -> None:
    made = served_page(run)
    running = Thread(target=made.run)
    running.start()
    opened = browser.new_page()
    opened.goto(made.address)
    opened.locator(".tokens").wait_for()
    made.shutdown()
    running.join()
    opened.locator("#rows button").nth(1).click()
    opened.locator("#tokens :text('does not answer')").wait_for()
    assert "The rows were not read: " in opened.locator("#tokens").inner_text()
    assert opened.locator("#chosen pre").first.inner_text() == "what is the number 1 about"
    opened.close()


def framed(html: str) -> str:
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts" title="[^"<>]*" style="[^"<>]*" srcdoc="([^"<>]*)"></iframe>', html
    )
    assert found is not None, html[:300]
    return unescape(found[1])


def test_a_notebook_shows_the_page_and_a_question_in_frames(run: Run, folder: Path, page: Any, tmp_path: Path) -> None:
    inline = run_report(run, results=[folder / "results"])
    assert framed(inline._repr_html_()) == inline.html
    assert inline.save(tmp_path / "page.html").read_text() == inline.html
    with pytest.raises(PathExists):
        inline.save(tmp_path / "page.html")
    with pytest.raises(SelectionError, match=r"no \.html file"):
        inline.save(tmp_path / "page.txt")
    questions = run.questions()
    looks = [inline, show(questions[HOSTILE]), show(questions[5])]
    page.set_content("<title>notebook</title>" + "".join(each._repr_html_() for each in looks))
    whole, hostile, plain = (page.frame_locator("iframe").nth(number) for number in range(3))
    assert whole.locator("#count").inner_text() == f"{N} questions"
    whole.locator("nav a[href='#questions']").click()
    whole.locator("#search").fill("number 5 about")
    whole.locator("#search").press("Enter")
    assert whole.locator("#count").inner_text() == f"22 of {N} questions"  # words, not a phrase
    assert hostile.locator("#chosen pre").first.inner_text() == WORDS[HOSTILE]
    assert plain.locator("#chosen h3").inner_text() == "t, document 5 right"
    titles = [each.get_attribute("title") for each in plain.locator(".tokens span").all()]
    rows = run[5]["activations"]["layer_2"].double().norm(dim=1)[:2]
    np.testing.assert_allclose([float(re.search(r"norm (\S+)$", title)[1]) for title in titles], rows, rtol=0.006)  # type: ignore[index]
    plain.locator("#slider").fill("0")
    assert plain.locator("#place").inner_text() == "layer_0"
    assert page.title() == "notebook"
    assert page.evaluate("[...document.querySelectorAll('iframe')].every(each => each.contentDocument === null)")


def test_a_copied_question_is_shown_without_its_run(run: Run) -> None:
    html = framed(show(copy.deepcopy(run.questions()[5]))._repr_html_())
    assert "what is the number 5 about" in html
    assert '"tokens":{},' in html
    with pytest.raises(SelectionError, match=r"run\.questions\(\)\[0\]"):
        show(run[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [(), ("--site", "resid_post.1", "--position", "prompt[0]")])
def test_an_atlas_holds_the_rows_of_the_questions(
    place: tuple[str, ...], run: Run, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "it is.parquet"
    done = within("report", "run", "--to", "embedding-atlas", "-o", str(file), *place, cwd=folder)
    assert done.returncode == 0, done.stderr
    key, position = ("layer_1", "prompt[0]") if place else ("layer_2", "prompt[-1]")
    assert f"130 questions at {key}, {position}; x and y hold " in done.stdout
    assert f"embedding-atlas '{file}' --text prompt --x x --y y\n" in done.stdout
    assert f"embedding-atlas '{file}' --text prompt --vector activation\n" in done.stdout
    table = pyarrow.parquet.read_table(file)
    assert table.schema.field("activation").type == pyarrow.list_(pyarrow.float32())
    about = ["prompt", "task", "response", "doc_id", "repeat", "correct"]
    assert table.column_names == [*about, "activation", "x", "y"]
    rows = np.array(table["activation"].to_pylist(), np.float32)
    np.testing.assert_array_equal(rows, run.questions().activations(key, position).numpy())
    assert table["prompt"].to_pylist() == run.questions().column("question")
    for name in ("task", "doc_id", "correct"):
        assert table[name].to_pylist() == run.questions().column(name)
    theirs = PCA(2, svd_solver="full").fit(rows.astype(np.float64))
    points = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    np.testing.assert_allclose(np.abs(points), np.abs(theirs.transform(rows.astype(np.float64))), atol=1e-5)
    assert f"hold {theirs.explained_variance_ratio_.sum():.0%} of" in done.stdout


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 4), (9, 1), (9, 2), (9, 3)])
def test_a_map_of_few_rows_or_directions(shape: tuple[int, int], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for wide, rank in ((rows, 2), (np.outer(rows[:, 0], [1.0] * shape[1]), 1), (np.ones(shape), 0)):
        given = wide.astype(np.float32)
        points, share = atlas._coordinates(given, np.ones(len(given), bool))
        exact = np.linalg.svd(given - given.mean(axis=0), compute_uv=False)
        spread = np.sqrt((points**2).sum(axis=0))
        kept = np.append(exact, [0, 0])[:2]
        np.testing.assert_allclose(spread, np.where(np.arange(2) < rank, kept, 0), atol=1e-5)
        assert (
            share is None
            if rank == 0 or len(given) == 1
            else share == pytest.approx((kept**2).sum() / (exact**2).sum())
        )


def test_a_row_that_is_not_finite_has_no_place_on_the_map(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rows[2, 1] = np.inf
    columns = [{"doc_id": n, "correct": True, "task": None} for n in range(6)]
    run_of(tmp_path / "run", {"embeddings": rows}, columns, [*"abcd", "\x1b[31m", "\u202e"])
    missing = within("report", "run", "--to", "embedding-atlas", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "no residual stream of a layer; name one of its sites with --site: embeddings" in missing.stderr
    done = within("report", "run", "--to", "embedding-atlas", "--site", "embed", cwd=tmp_path)
    assert "1 of them have an infinite number or NaN" in done.stdout
    table = pyarrow.parquet.read_table(tmp_path / "atlas.parquet")
    assert [each is None for each in table["x"].to_pylist()] == [False, False, True, False, False, False]
    assert table["prompt"].to_pylist()[4:] == ["\\x1b[31m", "\\u202e"]
    assert table["activation"].to_pylist()[2][1] == float("inf")
    assert "confidence" not in table.column_names  # no question has one


def test_what_does_not_go_together_is_refused_in_one_line(folder: Path) -> None:
    for options, said in (
        (("--to", "embedding-atlass"), "no tool 'embedding-atlass'. Did you mean 'embedding-atlas'?"),
        (("run", "--to", "embedding-atlas"), "run was given, but a file for embedding-atlas is of one run"),
        (("--to", "embedding-atlas", "-o", "x.html"), "-o x.html is no .parquet file"),
        (("--to", "embedding-atlas", "--site", "layer_9"), "holds no 'layer_9'"),
        (("--to", "embedding-atlas", "--position", "prompt[-9]"), "0 positions of t document 0"),
    ):
        done = within("report", "run", *options, cwd=folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    assert not (folder / "atlas.parquet").exists()
    done = within("export", "run", "-o", "out", "--to", "embedding-atlas", cwd=folder)
    assert (done.returncode, "`main.py report RUN --to embedding-atlas` writes it" in done.stderr) == (2, True)
