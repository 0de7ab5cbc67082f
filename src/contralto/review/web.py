"""What every page that is served here has: who comes in, which requests are refused, how forms are known, how pictures go out.

What protects a page: it listens on this machine alone unless told otherwise, and then asks for a token; Host and Origin are
checked, forms carry a key of their session; only pictures of the run are served, re-encoded; pages may load nothing but what
comes from here.
"""

import hashlib
import hmac
import io
import ipaddress
import socket
from collections.abc import Callable, Mapping
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
from contralto.review.report import shown_text

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

__all__ = ["Site", "is_loopback", "whole_number"]

SIDES = (96, 480)
MAX_BODY = 2**20
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FILES = {"report.css": "text/css", "review.css": "text/css", "review.js": "text/javascript"}


class Site:
    """A local web application for one run, to which routes are added.

    Parameters
    ----------
    run : path
    secret : bytes
        Key of the signatures of cookies and forms.
    picture : function
        Number of a picture -> its encoded bytes.
    count : int
        How many pictures there are.
    host : str
        The address that it will be served on; requests for other hosts are refused.
    token : str, optional
        What a person must know to come in; needed for any host but this machine's.
    shared : mapping, optional
        What the templates of all pages are given.

    Attributes
    ----------
    app : fastapi.FastAPI
        With `/enter`, `/leave`, `/image/{n}/{side}`, `/static/{name}`, and the guard before all of it.

    Raises
    ------
    UsageError
        If it were open to other machines without a token.
    MissingExtraError
        If FastAPI is not installed.
    """

    app: "FastAPI"

    def __init__(
        self,
        run: str | Path,
        secret: bytes,
        picture: Callable[[int], bytes],
        count: int,
        *,
        host: str = "127.0.0.1",
        token: str | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from fastapi import FastAPI
            from fastapi.responses import RedirectResponse, Response
            from python_multipart.exceptions import FormParserError
            from starlette.exceptions import HTTPException
        except ModuleNotFoundError as error:
            raise MissingExtraError("the review page", extra="review") from error

        if not token and not is_loopback(host):
            raise UsageError(f"{host} is open to other machines, so a token is needed")
        self.run_name, self.secret, self.host, self.token = Path(run).resolve().name, secret, host, token
        self.shared, self.count, self.templates = dict(shared or {}), count, _templates()
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self._picture, self._reading = picture, Lock()
        self._encoded = lru_cache(maxsize=2000)(self._encode)
        self.refusal, self._answer, self._redirect, self._no_form = (
            HTTPException, Response, RedirectResponse, FormParserError
        )  # fmt: skip
        self._add_routes()

    # Who it is.

    def sign(self, *parts: str) -> str:
        """A signature that only this run can make."""
        return hmac.new(self.secret, "\0".join(parts).encode(), hashlib.sha256).hexdigest()

    def reviewer_of(self, request: "Request") -> str | None:
        """Who sends a request; None if they have not said so here."""
        name, _, signature = request.cookies.get("reviewer", "").rpartition(".")
        try:
            name = bytes.fromhex(name).decode()
        except ValueError:
            return None
        right = self.sign("reviewer", name, self.token or "")
        return name if name and _same(signature, right) else None

    def checked_form(self, request: "Request", form: Mapping[str, Any]) -> str:
        """Who sends a form, if it comes from one of our pages."""
        reviewer = self.reviewer_of(request)
        if reviewer is None:
            raise self.refusal(401, "Say who you are first.")
        if not _same(form.get("key", ""), self.sign("form", reviewer)):
            raise self.refusal(403, "This form is not of this page: go back, load the page again, and repeat it.")
        return reviewer

    async def form_of(self, request: "Request") -> Any:
        """The fields of a form; files are refused."""
        try:
            return await request.form(max_files=0, max_fields=2000)
        except self._no_form as error:  # older versions of the reader let it through
            raise self.refusal(400, "This is no form.") from error

    # Answers.

    def page(self, name: str, request: "Request", status: int = 200, **values: Any) -> Any:
        """The page of a template."""
        reviewer = self.reviewer_of(request)
        shared = {
            "reviewer": reviewer, "key": self.sign("form", reviewer) if reviewer else "", "run_name": self.run_name,
            "status": status, "naming": False,
        }  # fmt: skip
        html = self.templates.get_template(f"{name}.html.j2").render(shared | self.shared | values)
        return self._answer(html, status, media_type="text/html")

    def goes_to(self, path: str, **query: Any) -> Any:
        """On to another page."""
        return self._redirect(path + ("?" + urlencode(query) if query else ""), 303)

    def who(self, request: "Request", status: int = 200, **values: Any) -> Any:
        """The page that asks who it is."""
        return self.page("review_who", request, status, needs_token=self.token is not None, **({"given": ""} | values))

    def position(self, value: Any) -> int:
        """The number of a picture in an address or a form; what is none is refused."""
        n = whole_number(str(value), digits=9)
        if n is None or n >= self.count:
            raise self.refusal(404, "There is no such picture.")
        return n

    def _encode(self, n: int, side: int) -> bytes:
        with self._reading:
            data = self._picture(n)
        image = Image.fromarray(decode_image(data))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def _add_routes(self) -> None:
        from fastapi import Request

        app, http_exception, response = self.app, self.refusal, self._answer

        @app.post("/enter")
        async def enter(request: Request) -> Any:
            form = await self.form_of(request)
            name = " ".join(shown_text(str(form.get("name", "")), 60).split())
            if self.token is not None and not _same(form.get("token", ""), self.token):
                return self.who(request, 401, wrong="This is not the token.")
            if not name:
                return self.who(request, 422, wrong="A name is needed.")
            answer = self.goes_to("/")
            value = name.encode().hex() + "." + self.sign("reviewer", name, self.token or "")
            answer.set_cookie("reviewer", value, max_age=30 * 86400, httponly=True, samesite="strict")
            return answer

        @app.post("/leave")
        async def leave(request: Request) -> Any:
            self.checked_form(request, await self.form_of(request))
            answer = self.goes_to("/")
            answer.delete_cookie("reviewer", httponly=True, samesite="strict")
            return answer

        @app.get("/image/{n}/{side}")
        def image(request: Request, n: str, side: str) -> Any:
            if self.reviewer_of(request) is None:
                raise http_exception(401, "Say who you are first.")
            if side not in map(str, SIDES):
                raise http_exception(404, "There is no such size.")
            try:
                data = self._encoded(self.position(n), int(side))
            except (ContraltoError, ImageError) as error:
                raise http_exception(410, f"The picture cannot be read any more: {error}") from error
            return response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

        @app.get("/static/{name}")
        def static(name: str) -> Any:
            if name not in _FILES:
                raise http_exception(404, "There is no such file.")
            text = resources.files("contralto.review").joinpath("templates", name).read_text("utf-8")
            return response(text, media_type=_FILES[name], headers={"Cache-Control": "private, max-age=3600"})

        @app.get("/favicon.ico")
        def icon() -> Any:
            return response(status_code=204)  # browsers ask for one

        @app.exception_handler(http_exception)
        async def refused(request: Request, error: Any) -> Any:
            return self.page("review_error", request, error.status_code, told=str(error.detail))

        @app.exception_handler(ContraltoError)
        async def failed(request: Request, error: ContraltoError) -> Any:
            return self.page("review_error", request, 500, told=str(error))

        @app.middleware("http")
        async def guarded(request: Request, follow: Callable[[Any], Any]) -> Any:
            problem = _problem(request, self.host)
            answer: Any = (
                response(problem[1], problem[0], media_type="text/plain") if problem else await follow(request)
            )
            answer.headers.update(
                {
                    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
                    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
                }
            )  # fmt: skip
            answer.headers.setdefault("Cache-Control", "no-store")
            return answer


def _same(given: Any, right: str) -> bool:
    """Whether a secret is the right one, in a time that does not tell how much of it is."""
    return hmac.compare_digest(str(given).encode(), right.encode())


def whole_number(text: str, *, digits: int) -> int | None:
    """A whole number of at most so many plain digits, else None.

    Examples
    --------
    >>> whole_number("12", digits=2), whole_number("-1", digits=2), whole_number("123", digits=2)
    (12, None, None)
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own.

    Examples
    --------
    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
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
    if is_loopback(host):
        return is_loopback(asked)
    if asked == host or is_loopback(asked):
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
