const strip = (i, count, side) => {
  const e = el("div", "strip");
  for (const j of items[i].n.slice(0, count)) {
    const t = thumb(j, side);
    if (items[i].t && items[j].t !== items[i].t) t.classList.add("other");
    t.title = items[j].t || items[j].id;
    e.append(t);
  }
  return e;
};
const dialog = $("detail"), body = $("detail-body");
const show = gallery((i) => {
  const b = el("button", "item"); b.type = "button";
  b.append(thumb(i, setup.thumbnail), strip(i, 6, 32));
  b.addEventListener("click", () => {
    const name = el("h3"); name.append(el("bdi", "", items[i].t || items[i].id));
    body.replaceChildren(name, thumb(i, 2 * setup.thumbnail), strip(i, 24, setup.thumbnail));
    dialog.showModal();
  });
  return b;
});
$("detail-close").addEventListener("click", () => dialog.close());
const search = () => {
  const words = $("search").value.toLowerCase();
  show((x) => !words || (x.t + " " + x.id).toLowerCase().includes(words));
};
$("search").addEventListener("input", search);
search();
