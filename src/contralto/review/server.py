"""The review page: a local web server on which people go through what a run flagged.

Pages are rendered here; every form works without a script, which only adds keys. What protects it: it listens on this machine
alone unless told otherwise, and then asks for a token; Host and Origin are checked, forms carry a key of their session; only
pictures of the run are served, re-encoded; pages may load nothing but what comes from here.
"""

import hashlib
import hmac
import io
import ipaddress
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import jinja2
from PIL import Image

from contralto.data.images import ImageError, decode_image
from contralto.errors import ContraltoError, MissingExtraError, UsageError
from contralto.review.listing import ORDERS, STATES, Filter, Listing
from contralto.review.report import shown_text

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

__all__ = ["class_codes", "create_app", "serve"]

PAGE = 60
SIDES = (96, 480)
MAX_BODY = 2**20
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FILES = {"report.css": "text/css", "review.css": "text/css", "review.js": "text/javascript"}
_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"


def class_codes(count: int) -> list[str]:
    """Two keys for each class: two digits up to 100 classes, a digit and a digit or letter up to 360; none beyond.

    Examples
    --------
    >>> class_codes(12)[10:], class_codes(200)[36], class_codes(1000)[0]
    (['10', '11'], '10', '')
    """
    base = 10 if count <= 100 else len(_SIGNS)
    return [f"{i // base}{_SIGNS[i % base]}" if count <= 360 else "" for i in range(count)]


def create_app(run: str | Path, *, host: str = "127.0.0.1", token: str | None = None) -> "FastAPI":
    """The page as an application, for a server of your own.

    Parameters
    ----------
    run : path
        A finished run.
    host : str
        The address that it will be served on; requests for other hosts are refused.
    token : str, optional
        What a person must know to come in; needed for any host but this machine's.

    Returns
    -------
    fastapi.FastAPI

    Raises
    ------
    UsageError
        If it were open to other machines without a token.
    DataError
        If the run is not finished or damaged.
    MissingExtraError
        If FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import RedirectResponse, Response
        from python_multipart.exceptions import FormParserError
        from starlette.exceptions import HTTPException
    except ModuleNotFoundError as error:
        raise MissingExtraError("the review page", extra="review") from error

    if not token and not _is_loopback(host):
        raise UsageError(f"{host} is open to other machines, so a token is needed")
    listing = Listing(run)
    secret = listing.decisions.secret()
    names = listing.manifest.class_names
    definitions = {c.name: c.definition for c in listing.manifest.classes}
    codes = class_codes(len(names))
    verdicts = ["changed", "kept"] if listing.multilabel else ["corrected", "off-topic", "kept", "anchor"]
    known = {"verdict": {"flagged", "any", *verdicts}, "label": {"", *names}, "state": STATES, "order": ORDERS}
    templates = _templates()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    reading = Lock()

    # Who it is.

    def sign(*parts: str) -> str:
        return hmac.new(secret, "\0".join(parts).encode(), hashlib.sha256).hexdigest()

    def reviewer_of(request: Request) -> str | None:
        name, _, signature = request.cookies.get("reviewer", "").rpartition(".")
        try:
            name = bytes.fromhex(name).decode()
        except ValueError:
            return None
        right = sign("reviewer", name, token or "")
        return name if name and _same(signature, right) else None

    def checked_form(request: Request, form: Mapping[str, Any]) -> str:
        """Who sends a form, if it comes from one of our pages."""
        reviewer = reviewer_of(request)
        if reviewer is None:
            raise HTTPException(401, "Say who you are first.")
        if not _same(form.get("key", ""), sign("form", reviewer)):
            raise HTTPException(403, "This form is not of this page: go back, load the page again, and repeat it.")
        return reviewer

    # Answers.

    def page(name: str, request: Request, status: int = 200, **values: Any) -> Response:
        reviewer = reviewer_of(request)
        shared = {
            "reviewer": reviewer, "key": sign("form", reviewer) if reviewer else "", "run_name": Path(run).resolve().name,
            "classes": names, "codes": codes, "multilabel": listing.multilabel, "status": status,
        }  # fmt: skip
        html = templates.get_template(f"{name}.html.j2").render(shared | values)
        return Response(html, status, media_type="text/html")

    def goes_to(path: str, **query: Any) -> Response:
        return RedirectResponse(path + ("?" + urlencode(query) if query else ""), 303)

    def filter_of(values: Mapping[str, Any]) -> Filter:
        """The filter in an address or a form; what makes no sense is refused."""
        wanted: dict[str, Any] = {}
        for f in fields(Filter):
            if f.name not in values:
                continue
            value: Any = values[f.name]
            if f.name == "least":
                try:
                    value = min(max(float(value), 0.0), 1.0)
                except ValueError:
                    raise HTTPException(422, "least must be a number between 0 and 1.") from None
                if value != value:
                    raise HTTPException(422, "least must be a number between 0 and 1.")
            elif f.name in known and value not in known[f.name]:
                raise HTTPException(422, f"There is no {f.name} of this name.")
            wanted[f.name] = str(value)[:200] if f.name == "words" else value
        return Filter(**wanted)

    def position(value: Any) -> int:
        n = _number(str(value), digits=9)
        if n is None or n >= len(listing):
            raise HTTPException(404, "There is no such picture.")
        return n

    def card(n: int) -> dict[str, Any]:
        holds = listing.decision(n)
        return {
            "n": n, "id": shown_text(listing.ids[n], 120), "text": shown_text(listing.texts[n]), "given": listing.given[n],
            "new": listing.new[n], "verdict": listing.verdict[n], "p_wrong": float(listing.p_wrong[n]),
            "holds": holds, "differ": bool(listing.differ[n]),
        }  # fmt: skip

    def told(labels: tuple[str, ...]) -> str:
        return ", ".join(labels) or "none of the classes"

    def meant(action: str, labels: list[str], found: Sequence[int]) -> list[tuple[str, ...]]:
        """Labels of some pictures after an action."""
        if action == "keep":
            return [listing.given[n] for n in found]
        if action == "accept":
            return [listing.new[n] for n in found]
        if action == "off-topic":
            return [()] * len(found)
        if action != "set":
            raise HTTPException(422, "There is no such action.")
        if any(name not in definitions for name in labels) or not labels:
            raise HTTPException(422, "Choose one of the classes.")
        if len(labels) > 1 and not listing.multilabel:
            raise HTTPException(422, "A picture of this run has one label.")
        return [tuple(name for name in names if name in labels)] * len(found)

    # Pages.

    @app.get("/")
    def overview(request: Request) -> Response:
        reviewer = reviewer_of(request)
        if reviewer is None:
            return page(
                "review_who", request, needs_token=token is not None, given=request.query_params.get("token", "")
            )
        chosen = filter_of(request.query_params)
        found = listing.find(chosen, reviewer)
        at_page = _number(request.query_params.get("page", ""), digits=8) or 0
        part = found[at_page * PAGE : (at_page + 1) * PAGE]
        return page(
            "review_list", request, filter=chosen, query=asdict(chosen), total=len(found), cards=[card(int(n)) for n in part],
            page=at_page, pages=-(-len(found) // PAGE), progress=listing.progress(), verdicts=verdicts,
        )  # fmt: skip

    @app.get("/picture/{n}")
    def picture(request: Request, n: str) -> Response:
        reviewer = reviewer_of(request)
        if reviewer is None:
            return goes_to("/")
        at, chosen = position(n), filter_of(request.query_params)
        preceding, following, left = listing.around(at, chosen, reviewer)
        near = [card(i) | {"similarity": s} for i, s in listing.neighbours(at)]
        of_it = sorted(listing.decisions.by_reviewer(listing.ids[at]).values(), key=lambda d: -d.action)
        wanted = {*listing.given[at], *listing.new[at], *(name for d in of_it for name in d.labels)}
        return page(
            "review_picture", request, filter=chosen, query=asdict(chosen), card=card(at), neighbours=near, said=of_it,
            definitions={c: definitions[c] for c in names if c in wanted}, left=left,
            preceding=preceding, following=following, progress=listing.progress(),
        )  # fmt: skip

    @app.get("/reviewers")
    def reviewers(request: Request) -> Response:
        if reviewer_of(request) is None:
            return goes_to("/")
        last = _number(request.query_params.get("last", ""), digits=14)
        actions = listing.decisions.history(PAGE, last=2**62 if last is None else last)
        return page(
            "review_history", request, actions=actions, agreement=listing.agreement(), progress=listing.progress(),
            older=actions[-1].number - 1 if len(actions) == PAGE else None,
        )  # fmt: skip

    # What people do.

    async def form_of(request: Request) -> Any:
        try:
            return await request.form(max_files=0, max_fields=2000)
        except FormParserError as error:  # older versions of the reader let it through
            raise HTTPException(400, "This is no form.") from error

    @app.post("/enter")
    async def enter(request: Request) -> Response:
        form = await form_of(request)
        name = " ".join(shown_text(str(form.get("name", "")), 60).split())
        if token is not None and not _same(form.get("token", ""), token):
            return page("review_who", request, 401, needs_token=True, given="", wrong="This is not the token.")
        if not name:
            return page("review_who", request, 422, needs_token=token is not None, given="", wrong="A name is needed.")
        answer = goes_to("/")
        value = name.encode().hex() + "." + sign("reviewer", name, token or "")
        answer.set_cookie("reviewer", value, max_age=30 * 86400, httponly=True, samesite="strict")
        return answer

    @app.post("/leave")
    async def leave(request: Request) -> Response:
        checked_form(request, await form_of(request))
        answer = goes_to("/")
        answer.delete_cookie("reviewer", httponly=True, samesite="strict")
        return answer

    @app.post("/decide")
    async def decide(request: Request) -> Response:
        form = await form_of(request)
        reviewer, at, chosen = checked_form(request, form), position(form.get("n", "")), filter_of(form)
        action = str(form.get("action", "set"))
        (labels,) = meant(action, [str(x) for x in form.getlist("set")], [at])
        following = listing.around(at, chosen, reviewer)[1]
        listing.decisions.decide({listing.ids[at]: labels}, reviewer=reviewer, told=f"{action}: {told(labels)}")
        return goes_to("/" if following is None else f"/picture/{following}", **asdict(chosen))

    @app.post("/batch")
    async def batch(request: Request) -> Response:
        form = await form_of(request)
        reviewer, chosen = checked_form(request, form), filter_of(form)
        found = listing.find(chosen, reviewer)
        if str(form.get("count", "")) != str(len(found)):
            raise HTTPException(
                409, f"There are {len(found)} pictures now, not as many as you saw: look again, then repeat it."
            )
        if len(found):
            action, wanted = str(form.get("action", "")), [str(x) for x in form.getlist("set")]
            labels = meant(action, wanted, found.tolist())
            what = f"{action}: {told(labels[0])}" if action in ("set", "off-topic") else action
            decided = {listing.ids[n]: after for n, after in zip(found, labels, strict=True)}
            listing.decisions.decide(decided, reviewer=reviewer, told=f"{what} (all {len(found)} of a list)")
        return goes_to("/", **asdict(chosen))

    @app.post("/undo")
    async def undo(request: Request) -> Response:
        form = await form_of(request)
        reviewer, chosen = checked_form(request, form), filter_of(form)
        undone = listing.decisions.undo(reviewer)
        if undone is not None and undone.pictures == 1:
            (identity,) = listing.decisions.pictures_of(undone.number)
            if (n := listing.position(identity)) is not None:
                return goes_to(f"/picture/{n}", **asdict(chosen))
        return goes_to("/", **asdict(chosen))

    # Pictures and files.

    @lru_cache(maxsize=2000)
    def encoded(n: int, side: int) -> bytes:
        with reading:
            data = listing.manifest.read_bytes(int(listing.rows[n]))
        image = Image.fromarray(decode_image(data))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    @app.get("/image/{n}/{side}")
    def image(request: Request, n: str, side: str) -> Response:
        if reviewer_of(request) is None:
            raise HTTPException(401, "Say who you are first.")
        if side not in map(str, SIDES):
            raise HTTPException(404, "There is no such size.")
        try:
            data = encoded(position(n), int(side))
        except (ContraltoError, ImageError) as error:
            raise HTTPException(410, f"The picture cannot be read any more: {error}") from error
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "There is no such file.")
        text = resources.files("contralto.review").joinpath("templates", name).read_text("utf-8")
        return Response(text, media_type=_FILES[name], headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)  # browsers ask for one

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return page("review_error", request, error.status_code, told=str(error.detail))

    @app.exception_handler(ContraltoError)
    async def failed(request: Request, error: ContraltoError) -> Response:
        return page("review_error", request, 500, told=str(error))

    @app.middleware("http")
    async def guarded(request: Request, follow: Callable[[Any], Any]) -> Response:
        problem = _problem(request, host)
        answer: Response = (
            Response(problem[1], problem[0], media_type="text/plain") if problem else await follow(request)
        )
        answer.headers.update(
            {
                "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
                "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
            }
        )  # fmt: skip
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    return app


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the review page of a run until Ctrl-C.

    Parameters
    ----------
    run : path
        A finished run.
    host, port
        Where to listen; port 0 takes a free one.
    token : str, optional
        What a person must know to come in; drawn at random where one is needed and none is given.
    ready : function
        Called with the address once it can be opened.

    Raises
    ------
    UsageError
        If the port is taken.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtraError("the review page", extra="review") from error

    if token is None and not _is_loopback(host):
        token = secrets.token_urlsafe(24)
    app = create_app(run, host=host, token=token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once, without waiting 40 ms for the other side, where the protocol is said.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # whoever opens the address at once waits, and is not refused
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from error
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?{urlencode({'token': token})}" if token else "")
    ready(address)
    config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False)
    uvicorn.Server(config).run(sockets=[listener])


def _same(given: Any, right: str) -> bool:
    """Whether a secret is the right one, in a time that does not tell how much of it is."""
    return hmac.compare_digest(str(given).encode(), right.encode())


def _number(text: str, *, digits: int) -> int | None:
    """A whole number of at most so many plain digits, else None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _problem(request: "Request", host: str) -> tuple[int, str] | None:
    """Why a request is refused before anything looks at it: another host (DNS rebinding), another page's form, too large."""
    named = request.headers.get("host", "")
    try:
        asked = urlsplit(f"//{named}").hostname or ""
    except ValueError:
        asked = ""
    if not _is_ours(asked, host):
        return 421, "This server answers only to its own name."
    if request.method not in ("GET", "HEAD", "POST"):
        return 405, "Only GET and POST are known here."
    if request.method == "POST":
        origin = request.headers.get("origin")
        try:
            theirs = urlsplit(origin or "")
        except ValueError:
            return 403, "This form comes from another page."
        if theirs.scheme not in ("http", "https") or theirs.netloc != named:
            return 403, "This form comes from another page."
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, "The length of the form must be told."
        if int(length) > MAX_BODY:
            return 413, "The form is too large."
    return None


def _is_ours(asked: str, host: str) -> bool:
    """Whether a name in a request is one of this server's."""
    if _is_loopback(host):
        return _is_loopback(asked)
    if asked == host or _is_loopback(asked):
        return True
    if host in ("0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
        if asked == socket.gethostname():
            return True
        try:
            ipaddress.ip_address(asked)
        except ValueError:
            return False
        return True
    return False


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("contralto.review"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda x, digits=0: "-" if x is None else f"{100 * x:.{digits}f} %"
    environment.filters["query"] = urlencode
    environment.filters["shown"] = shown_text
    return environment
