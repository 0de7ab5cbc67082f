"""The review page of a discovery: classes that were found, with all of their pictures, to be named by people."""

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from contralto.data.decisions import Decisions
from contralto.data.names import called, save_names
from contralto.review.discovered import Discoveries
from contralto.review.report import shown_text
from contralto.review.web import Site, whole_number

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_naming_app"]

PAGE = 60
STRIP = 10


def create_naming_app(run: str | Path, *, host: str = "127.0.0.1", token: str | None = None) -> "FastAPI":
    """The page as an application; see `contralto.review.server.create_app`, which makes it for a run that discovered classes.

    Every name is in `names.json` of the run folder before the page answers. Where two people name the same class, the last one
    holds; an empty name takes it back.
    """
    found, saving = Discoveries(run), Lock()
    site = Site(
        run, Decisions(run).secret(), found.read_bytes, len(found), host=host, token=token,
        shared={"naming": True, "known": [c for c, new in zip(found.classes, found.is_new, strict=True) if not new]},
    )  # fmt: skip
    from fastapi import Request  # `Site` has made sure that it is there

    order = found.by_size()
    summaries = [found.summary(k) | {"pictures": found.shown(k, STRIP)[0].tolist()} for k in range(len(found.classes))]

    def card(k: int, told: list[str], names: dict[str, str]) -> dict[str, Any]:
        return summaries[k] | {
            "class": found.classes[k], "name": names.get(found.classes[k], ""), "told": shown_text(told[k], 120),
            "anchor": f"class-{k}",
        }  # fmt: skip

    def class_of(value: Any) -> int:
        k = whole_number(str(value), digits=7)
        if k is None or k >= len(found.classes):
            raise site.refusal(404, "There is no such class.")
        return k

    @site.app.get("/")
    def overview(request: Request) -> Any:
        if site.reviewer_of(request) is None:
            return site.who(request, given=request.query_params.get("token", ""))
        names = found.names
        told = called(found.classes, names)
        at_page = whole_number(request.query_params.get("page", ""), digits=6) or 0
        part = order[at_page * PAGE : (at_page + 1) * PAGE]
        return site.page(
            "review_classes", request, cards=[card(k, told, names) for k in part], page=at_page,
            pages=-(-len(order) // PAGE), named=len(names), new=len(found.new_classes),
        )  # fmt: skip

    @site.app.get("/class/{k}")
    def one(request: Request, k: str) -> Any:
        if site.reviewer_of(request) is None:
            return site.goes_to("/")
        number, names = class_of(k), found.names
        told = called(found.classes, names)
        members = found.members(number)
        at_page = whole_number(request.query_params.get("page", ""), digits=8) or 0
        place = order.index(number)
        part = members[at_page * PAGE : (at_page + 1) * PAGE].tolist()
        pictures = [{"n": n, "id": shown_text(found.ids[n], 120), "p": float(found.confidence[n])} for n in part]
        return site.page(
            "review_class", request, card=card(number, told, names), pictures=pictures, page=at_page,
            pages=-(-len(members) // PAGE), following=order[(place + 1) % len(order)], preceding=order[place - 1],
        )  # fmt: skip

    @site.app.post("/name")
    async def name(request: Request) -> Any:
        form = await site.form_of(request)
        site.checked_form(request, form)
        number = class_of(form.get("class", ""))
        if not found.is_new[number]:
            raise site.refusal(422, "This class had its name before: only new ones are named here.")
        with saving:
            # The file may have been edited by hand meanwhile; classes without a name stay in it, empty.
            names = dict.fromkeys(found.new_classes, "") | found.names
            names[found.classes[number]] = str(form.get("name", ""))
            save_names(run, names)
        back = whole_number(str(form.get("page", "")), digits=8) or 0
        if form.get("back") == "class":
            return site.goes_to(f"/class/{number}", page=back)
        return site.goes_to(f"/?page={back}#class-{number}")

    return site.app
