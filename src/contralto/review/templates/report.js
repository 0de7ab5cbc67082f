const label = (x) => {
  const e = el("div", "label");
  e.append(el("bdi", "", x.g));
  if (x.v === "corrected") { e.append(" → ", el("bdi", "", x.n)); }
  return e;
};
const badge = (x) => {
  const e = el("div", "badge");
  e.append(el("i", "k-" + x.v), x.v + ", wrong: " + percent(x.p));
  return e;
};

const dialog = $("detail"), body = $("detail-body");
const tell_of = (i) => {
  const x = items[i];
  body.replaceChildren();
  const title = el("h3"); title.append(label(x)); body.append(title, thumb(i, 192), badge(x));
  const text = el("p"); text.append(el("bdi", "", x.t || "no text")); body.append(text);
  const table = el("table"), head = el("tr");
  for (const t of ["score", "given: " + x.g, "best" ]) head.append(el("th", "", t));
  table.append(head);
  ["classifier", "auxiliary head", "prototype", "fused"].forEach((name, j) => {
    const row = el("tr"); row.append(el("td", "", name), el("td", "", percent(x.a[j])), el("td", "", percent(x.b[j]))); table.append(row);
  });
  const text_rows = x.r === null ? [] : [["text match", percent(x.m)], ["text rank in class", String(x.r + 1)]];
  for (const [name, value] of [...text_rows, ["nearest prototypes", x.k.join(", ")], ["id", x.id]]) {
    const row = el("tr"), cell = el("td"); cell.colSpan = 2; cell.append(el("bdi", "", value)); row.append(el("td", "", name), cell); table.append(row);
  }
  body.append(table);
  dialog.showModal();
};
$("detail-close").addEventListener("click", () => dialog.close());

const show = gallery((i) => {
  const b = el("button", "item"); b.type = "button";
  b.append(thumb(i, 96), badge(items[i]), label(items[i]));
  b.addEventListener("click", () => tell_of(i));
  return b;
});
const orders = { p: (a, b) => b.p - a.p, q: (a, b) => a.p - b.p, r: (a, b) => a.r - b.r };
let target = "";
const search = () => {
  const words = $("search").value.toLowerCase(), c = $("class").value, v = $("verdict").value, p = Number($("least").value) / 100;
  show((x) =>
    (!c || x.g === setup.classes[c]) && (!v || x.v === v) && (!target || x.n === target) && x.p >= p
    && (!words || (x.t + " " + x.id + " " + x.n).toLowerCase().includes(words)),
  orders[$("sort").value]);
};
for (const id of ["search", "class", "verdict", "least", "sort"]) $(id).addEventListener("input", () => { target = ""; search(); });
search();

for (const box of document.querySelectorAll("[data-anchors]")) {
  const c = setup.classes[Number(box.dataset.anchors)];
  items.map((x, i) => [x, i]).filter(([x]) => x.g === c && x.v === "anchor").sort((a, b) => a[0].r - b[0].r).slice(0, 8)
    .forEach(([x, i]) => { const t = thumb(i, 48); t.title = x.t; box.append(t); });
}
for (const cell of document.querySelectorAll("#flow-chart .cell")) {
  const go = () => {
    const [given, , to] = cell.querySelector("title").textContent.match(/^([\s\S]*?)( → )([\s\S]*): \d+$/).slice(1);
    $("class").value = String(setup.classes.indexOf(given));
    $("verdict").value = to === "off-topic" ? "off-topic" : "corrected";
    target = to === "off-topic" ? "" : to;
    search(); $("images").scrollIntoView();
  };
  cell.addEventListener("click", go);
  cell.addEventListener("keydown", (e) => { if (e.key === "Enter") go(); });
}
if ($("openset-data")) {
  const set = read("openset-data"), box = $("openset-pictures"), slider = $("threshold");
  const drawn = set.items.map((x, i) => {
    const e = el("figure", "seen " + (x.known ? (x.right ? "right" : "wrong") : "foreign"));
    const told = el("figcaption"); told.append(el("bdi", "", x.n), " " + percent(x.p));
    e.append(sprite(set.sheet, i, set.side, x.id), told); box.append(e);
    return [e, x];
  });
  const tell = () => {
    const t = Number(slider.value), c = set.curve;
    let at = 0;
    while (at < c.thresholds.length - 1 && c.thresholds[at] < t - 1e-9) at++;
    const part = (v, text) => v === null ? [] : [percent(v) + text];
    $("threshold-told").textContent = t.toFixed(2) + ": " + [
      ...part(c.rejected_known[at], " of the pictures of the classes rejected"),
      ...part(c.rejected_unknown[at], " of those of no class"),
      ...part(c.accepted_right[at], " of the accepted answers right"),
    ].join(", ");
    for (const [e, x] of drawn) e.classList.toggle("rejected", x.p <= t);
  };
  slider.addEventListener("input", tell);
  tell();
}
const pick = $("map-class");
if (pick) pick.addEventListener("input", () => {
  for (const dot of document.querySelectorAll("#map-chart .dot")) dot.setAttribute("visibility", pick.value && dot.dataset.class !== pick.value ? "hidden" : "visible");
});
