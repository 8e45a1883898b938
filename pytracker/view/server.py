"""The live page: ``pytracker serve`` shows all runs of a folder in a browser while they grow. No torch here.

Read only. It answers on this machine alone unless another address is given, and then only to who has the token.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import InvalidValueError, MissingExtraError, RunNotFoundError, StoreError
from ..history import History
from ..store import StoredRun, Tail, jsonable, load_run
from .page import LIVE_POLICY, curves, html, known_names, plotly, row, script

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_COOKIE: Final = "pytracker"
_TAILS: Final = 16  # running runs that are read on from where the last answer ended
_ANSWERS: Final = 32  # curves kept ready
_DRAWN_TOGETHER: Final = 10  # how many runs a reader looks at, which decides how many points each has
_ALL_INTERVALS: Final = 1_000_000
_HEADERS: Final = {
    "Content-Security-Policy": LIVE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_Send = Callable[[Any], Awaitable[None]]


class Folder:
    """The runs of a folder, as the page asks for them: what has changed since a version, and one run's curves.

    A run's header is read again when its file has changed or it is running; nothing else is. So a thousand finished
    runs cost a look at their files' times.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Remember where the runs are.

        Raises:
            RunNotFoundError: there is no such folder.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunNotFoundError(f"there is no folder {self.path} to serve")
        self._version = 0
        self._rows: dict[str, dict[str, Any]] = {}
        self._gone: dict[str, int] = {}
        self._signatures: dict[str, tuple[int, ...]] = {}
        self._scanning, self._reading = threading.Lock(), threading.Lock()
        self._tails: OrderedDict[str, Tail] = OrderedDict()
        self._answers: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def changes(self, since: int) -> dict[str, Any]:
        """Return the rows that are newer than the version ``since``, the newest run first, and what has gone."""
        with self._scanning:
            self._scan()
            rows = sorted(
                (each for each in self._rows.values() if each["version"] > since),
                key=lambda each: -(each["created"] or 0.0),
            )
            names = known_names(dict.fromkeys(name for each in rows for name in each["metrics"]))
            gone = [name for name, version in self._gone.items() if version > since]
            return {"version": self._version, "runs": rows, "names": names, "gone": gone}

    def curves(self, name: str) -> bytes | None:
        """Return a run's curves as JSON; None where there is no such run."""
        with self._scanning:
            known = self._rows.get(name)
        if known is None:
            return None
        key = (name, int(known["version"]))
        with self._reading:
            if key not in self._answers:
                document = self._read(name, known["state"])
                self._answers[key] = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
                while len(self._answers) > _ANSWERS:
                    self._answers.popitem(last=False)
            self._answers.move_to_end(key)
            return self._answers[key]

    def _read(self, name: str, state: str) -> dict[str, Any]:
        try:
            if state != "running":
                self._tails.pop(name, None)
                run = load_run(self.path / name)
                return curves(run.history, run.clock(), _DRAWN_TOGETHER)
            tail = self._tails.setdefault(name, Tail(self.path / name, intervals=_ALL_INTERVALS))
            self._tails.move_to_end(name)
            while len(self._tails) > _TAILS:
                self._tails.popitem(last=False)
            tail.read()
            tail.history.meta = tail.run.meta
            return curves(tail.history, tail.clock, _DRAWN_TOGETHER)
        except StoreError:  # the row says why
            self._tails.pop(name, None)
            return curves(History(), (np.empty(0, np.int64), np.empty(0)))

    def _scan(self) -> None:
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                signature = _signature(Path(entry.path))
                if signature is not None:
                    found[entry.name] = signature
        for name in self._rows.keys() - found.keys():
            self._version += 1
            self._gone[name] = self._version
            del self._rows[name]
        for name, signature in found.items():
            known = self._rows.get(name)
            if known is not None and known["state"] != "running" and self._signatures.get(name) == signature:
                continue
            self._signatures[name] = signature
            self._take(name, known)

    def _take(self, name: str, known: dict[str, Any] | None) -> None:
        try:
            run = load_run(self.path / name)
        except StoreError as error:
            run = StoredRun(self.path / name, name, "unreadable", str(error))
        fresh = row(run, name)
        if known is not None and all(known.get(key) == value for key, value in fresh.items()):
            return
        self._version += 1
        self._rows[name] = {**fresh, "version": self._version}
        self._gone.pop(name, None)


def _signature(run: Path) -> tuple[int, ...] | None:
    """Return what changes when a run is written; None where there is no run."""
    try:
        main = (run / "run.sqlite").stat()
    except OSError:
        return None
    try:
        log = (run / "run.sqlite-wal").stat()
    except OSError:
        return (main.st_mtime_ns, main.st_size, 0, 0)
    return (main.st_mtime_ns, main.st_size, log.st_mtime_ns, log.st_size)


def make_app(directory: str | os.PathLike[str], *, token: str | None = None) -> Any:
    """Return the ASGI application that shows the runs of ``directory``.

    Args:
        directory: the folder of the runs.
        token: without it nothing is answered; None answers who asks by a name of this machine.

    Raises:
        RunNotFoundError: there is no such folder.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("pytracker serve", "starlette", "serve") from error
    folder = Folder(directory)
    title = f"runs in {Path(directory).name or directory}"

    def page(request: Request) -> Response:
        if token is not None and "token" in request.query_params:  # no token stays in the address
            answer: Response = RedirectResponse("./", 303)
            answer.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
            return answer
        return Response(html(None, title), media_type="text/html")

    def runs(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not since.isdecimal() or len(since) > 15:
            return PlainTextResponse(f"since: expected a version, got {since[:40]!r}", 400)
        return JSONResponse(jsonable(folder.changes(int(since))))

    def run(request: Request) -> Response:
        found = folder.curves(request.path_params["name"])
        if found is None:
            return PlainTextResponse("there is no such run", 404)
        return Response(found, media_type="application/json")

    def asset(source: Callable[[], str]) -> Callable[[Request], Response]:
        return lambda request: Response(source(), media_type="text/javascript")

    routes = [
        Route("/", page),
        Route("/api/runs", runs),
        Route("/api/runs/{name}", run),
        Route("/assets/plotly.js", asset(plotly)),
        Route("/assets/page.js", asset(script)),
    ]
    return _guarded(Starlette(routes=routes), token)


def _guarded(app: Any, token: str | None) -> Any:
    """Let nobody in without the token, or by another name than this machine's; give every answer its headers."""
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse

    async def guarded(scope: Any, receive: Any, send: _Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        request = Request(scope)
        if token is None:
            refused = None if _name_of(request) in _LOOPBACK else "this page answers to localhost alone"
        else:
            refused = None if _has_token(request, token) else "no token: open the address that serve printed"
        await (app if refused is None else PlainTextResponse(refused, 403))(scope, receive, sending)

    return guarded


def _name_of(request: Request) -> str:
    """Return the name by which the page was asked for: a stranger may have made a name of theirs mean this machine."""
    host = request.headers.get("host", "")
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _has_token(request: Request, token: str) -> bool:
    given = request.query_params.get("token")
    if given is None:
        cookie = SimpleCookie(request.headers.get("cookie", ""))
        given = cookie[_COOKIE].value if _COOKIE in cookie else ""
    return hmac.compare_digest(given.encode(), token.encode())


def serve(
    directory: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the runs of ``directory`` until Ctrl-C.

    Args:
        directory: the folder of the runs.
        host: the address to listen on; other than this machine's own, a token is made unless one is given.
        port: the port.
        token: what a reader must bring; None on this machine means that none is needed.
        ready: called with the address to open.

    Raises:
        InvalidValueError: the port is none, or taken, or the address is not this machine's.
        RunNotFoundError: there is no such folder.
    """
    if token is None and host not in _LOOPBACK:
        token = secrets.token_urlsafe(24)
    app = make_app(directory, token=token)
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("pytracker serve", "uvicorn", "serve") from error
    config = uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InvalidValueError(f"serve: cannot listen on {host}:{port}: {error}; try another port") from error
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listening.getsockname()[1]}/"
    ready(address if token is None else f"{address}?token={token}")
    with listening:
        uvicorn.Server(config).run([listening])
