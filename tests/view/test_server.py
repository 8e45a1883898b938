"""The live page, asked over HTTP as a browser would, and then by a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from browser import DRAWN, MISSING, Browser

from pytracker.errors import InvalidValueError, RunNotFoundError
from pytracker.store import Run
from pytracker.view import make_app, serve

pytest.importorskip("starlette", reason="the server is starlette's")
pytest.importorskip("plotly", reason="the page draws with plotly")


@contextmanager
def serving(folder, *options):
    """Run `pytracker serve` and give its address."""
    command = [sys.executable, "-m", "pytracker", "serve", str(folder), "--port", "0", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.terminate()
        assert server.wait(60) is not None
        server.stdout.close()


def ask(address, path="", *, method="GET", **headers):
    """Return status, headers and text of an answer."""
    request = urllib.request.Request(address + path, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def record(folder, name, steps=20, **config):
    with Run(folder, name=name, config=config) as run:
        for step in range(steps):
            run.log(step, loss=1.0 / (step + 1), lr=0.1)
    return run.path


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        record(tmp_path, f"run-{index}", lr=0.1 * index)
    return tmp_path


def test_it_listens_on_this_machine_alone_and_answers_by_its_names_alone(folder):
    with serving(folder) as address:
        assert address.startswith("http://127.0.0.1:")
        assert ask(address)[0] == 200
        assert ask(address, Host="localhost:1")[0] == 200
        for stranger in ("evil.example", "evil.example:8321", "127.0.0.1.evil.example", ""):
            status, _, text = ask(address, "api/runs", Host=stranger)
            assert (status, "localhost alone" in text) == (403, True)


def test_every_answer_carries_the_policy_and_nothing_can_be_written(folder):
    with serving(folder) as address:
        for path in ("", "api/runs", "api/runs/run-0", "assets/page.js", "nothing"):
            _, headers, _ = ask(address, path)
            assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                assert ask(address, path, method=method)[0] in (404, 405)


def test_elsewhere_a_token_is_needed(folder):
    with serving(folder, "--host", "0.0.0.0") as address:
        base, token = address.replace("0.0.0.0", "127.0.0.1").split("?token=")
        assert len(token) >= 24
        for path in ("", "api/runs", "assets/page.js", "?token=guess", "api/runs?token=", "?token=%C3%A9"):
            assert ask(base, path)[0] == 403, path
        assert ask(base, "api/runs", Cookie=f"pytracker={token}")[0] == 200
        status, _, text = ask(base, f"?token={token}")
        assert (status, "<h1>" in text) == (200, True)


@pytest.mark.parametrize("name", ["..", "../run-0", "%2e%2e%2frun-0", "run-0%00", "/etc/passwd", "nothing"])
def test_only_runs_of_the_folder_can_be_asked_for(folder, tmp_path_factory, name):
    inner = folder / "inner"
    inner.mkdir()
    with serving(inner) as address:
        assert ask(address, f"api/runs/{name}")[0] in (404, 405)


def test_only_what_has_changed_is_sent_again(folder):
    with serving(folder) as address:
        first = json.loads(ask(address, "api/runs")[2])
        assert {run["id"] for run in first["runs"]} == {"run-0", "run-1", "run-2"}
        again = json.loads(ask(address, f"api/runs?since={first['version']}")[2])
        assert (again["runs"], again["gone"], again["version"]) == ([], [], first["version"])
        record(folder, "run-3")
        shutil.rmtree(folder / "run-0")
        later = json.loads(ask(address, f"api/runs?since={first['version']}")[2])
        assert ([run["id"] for run in later["runs"]], later["gone"]) == (["run-3"], ["run-0"])
        assert ask(address, "api/runs?since=x")[0] == 400


def test_a_run_that_is_damaged_is_a_row_that_says_so_and_the_others_are_shown(folder):
    (folder / "run-1" / "run.sqlite").write_bytes(b"nothing" * 100)
    with serving(folder) as address:
        rows = {run["id"]: run for run in json.loads(ask(address, "api/runs")[2])["runs"]}
        assert {name: run["state"] for name, run in rows.items()} == {
            "run-0": "finished",
            "run-1": "unreadable",
            "run-2": "finished",
        }
        assert "damaged" in rows["run-1"]["error"]
        assert json.loads(ask(address, "api/runs/run-1")[2])["series"] == {}


def test_a_folder_or_port_that_cannot_be_is_named(folder):
    with pytest.raises(RunNotFoundError, match="there is no folder nowhere"):
        make_app("nowhere")
    with pytest.raises(InvalidValueError, match=r"cannot listen on 203\.0\.113\.1:0"):
        serve(folder, host="203.0.113.1", port=0)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_running_training_grows_while_one_looks_and_the_page_does_not(folder):
    browser, done = Browser(), threading.Event()
    run = Run(folder, name="live", flush_seconds=0.1)

    def train():
        step = 0
        while not done.wait(0.02):
            run.log(step, loss=1.0 / (step + 1), lr=0.1)
            step += 1

    training = threading.Thread(target=train)
    training.start()
    try:
        with serving(folder) as address:
            browser.resize(1400, 4000)
            browser.open(address)
            browser.wait("pageRuns.get('live')?.curves?.series.loss && document.querySelector('.main-svg')")
            length = "pageRuns.get('live').curves.series.loss.x.length"
            before = browser.run(f"return {length}")
            browser.wait(f"{length} > {before}")
            browser.wait(DRAWN)
            # Ten answers later nothing has piled up: as many elements, charts and cards as before.
            count = "return [document.querySelectorAll('*').length, cards.size, pageRuns.size]"
            browser.run(
                "POLLED = 0; const poll = live.poll.bind(live); live.poll = () => { POLLED += 1; return poll(); }"
            )
            elements, *kept = browser.run(count)
            browser.wait("POLLED >= 10")
            later, *still = browser.run(count)
            assert still == kept
            assert later < 1.3 * elements
            done.set()
            training.join()
            run.finish()
            browser.wait("document.querySelector('tr[data-run=live] .state').dataset.state === 'finished'")
            assert browser.console() == []
    finally:
        done.set()
        training.join()
        run.finish()
        browser.close()
