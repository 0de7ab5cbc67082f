"""The review page: a local web server on which people go through what a run flagged, or name the classes that it found.

Pages are rendered here; every form works without a script, which only adds keys. What protects them is in `review.web`.
"""

import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from contralto.errors import MissingExtraError, UsageError
from contralto.review.discovered import is_discovery
from contralto.review.listing import ORDERS, STATES, Filter, Listing
from contralto.review.report import shown_text
from contralto.review.web import Site, is_loopback, whole_number

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["class_codes", "create_app", "serve"]

PAGE = 60
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
    if is_discovery(run):
        from contralto.review.naming import create_naming_app

        return create_naming_app(run, host=host, token=token)
    listing = Listing(run)
    names = listing.manifest.class_names
    definitions = {c.name: c.definition for c in listing.manifest.classes}
    verdicts = ["changed", "kept"] if listing.multilabel else ["corrected", "off-topic", "kept", "anchor"]
    known = {"verdict": {"flagged", "any", *verdicts}, "label": {"", *names}, "state": STATES, "order": ORDERS}
    site = Site(
        run, listing.decisions.secret(), lambda n: listing.manifest.read_bytes(int(listing.rows[n])), len(listing),
        host=host, token=token,
        shared={"classes": names, "codes": class_codes(len(names)), "multilabel": listing.multilabel},
    )  # fmt: skip
    from fastapi import Request  # `Site` has made sure that it is there

    app, page, goes_to, position, form_of = site.app, site.page, site.goes_to, site.position, site.form_of
    reviewer_of, checked_form, refusal = site.reviewer_of, site.checked_form, site.refusal

    # What a request means.

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
                    raise refusal(422, "least must be a number between 0 and 1.") from None
                if value != value:
                    raise refusal(422, "least must be a number between 0 and 1.")
            elif f.name in known and value not in known[f.name]:
                raise refusal(422, f"There is no {f.name} of this name.")
            wanted[f.name] = str(value)[:200] if f.name == "words" else value
        return Filter(**wanted)

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
            raise refusal(422, "There is no such action.")
        if any(name not in definitions for name in labels) or not labels:
            raise refusal(422, "Choose one of the classes.")
        if len(labels) > 1 and not listing.multilabel:
            raise refusal(422, "A picture of this run has one label.")
        return [tuple(name for name in names if name in labels)] * len(found)

    # Pages.

    @app.get("/")
    def overview(request: Request) -> Any:
        reviewer = reviewer_of(request)
        if reviewer is None:
            return site.who(request, given=request.query_params.get("token", ""))
        chosen = filter_of(request.query_params)
        found = listing.find(chosen, reviewer)
        at_page = whole_number(request.query_params.get("page", ""), digits=8) or 0
        part = found[at_page * PAGE : (at_page + 1) * PAGE]
        return page(
            "review_list", request, filter=chosen, query=asdict(chosen), total=len(found), cards=[card(int(n)) for n in part],
            page=at_page, pages=-(-len(found) // PAGE), progress=listing.progress(), verdicts=verdicts,
        )  # fmt: skip

    @app.get("/picture/{n}")
    def picture(request: Request, n: str) -> Any:
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
    def reviewers(request: Request) -> Any:
        if reviewer_of(request) is None:
            return goes_to("/")
        last = whole_number(request.query_params.get("last", ""), digits=14)
        actions = listing.decisions.history(PAGE, last=2**62 if last is None else last)
        return page(
            "review_history", request, actions=actions, agreement=listing.agreement(), progress=listing.progress(),
            older=actions[-1].number - 1 if len(actions) == PAGE else None,
        )  # fmt: skip

    # What people do.

    @app.post("/decide")
    async def decide(request: Request) -> Any:
        form = await form_of(request)
        reviewer, at, chosen = checked_form(request, form), position(form.get("n", "")), filter_of(form)
        action = str(form.get("action", "set"))
        (labels,) = meant(action, [str(x) for x in form.getlist("set")], [at])
        following = listing.around(at, chosen, reviewer)[1]
        listing.decisions.decide({listing.ids[at]: labels}, reviewer=reviewer, told=f"{action}: {told(labels)}")
        return goes_to("/" if following is None else f"/picture/{following}", **asdict(chosen))

    @app.post("/batch")
    async def batch(request: Request) -> Any:
        form = await form_of(request)
        reviewer, chosen = checked_form(request, form), filter_of(form)
        found = listing.find(chosen, reviewer)
        if str(form.get("count", "")) != str(len(found)):
            raise refusal(
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
    async def undo(request: Request) -> Any:
        form = await form_of(request)
        reviewer, chosen = checked_form(request, form), filter_of(form)
        undone = listing.decisions.undo(reviewer)
        if undone is not None and undone.pictures == 1:
            (identity,) = listing.decisions.pictures_of(undone.number)
            if (n := listing.position(identity)) is not None:
                return goes_to(f"/picture/{n}", **asdict(chosen))
        return goes_to("/", **asdict(chosen))

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

    if token is None and not is_loopback(host):
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
