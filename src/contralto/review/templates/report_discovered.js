const cards = read("cards");
const names = new Map(read("names"));  // every new class, those without a card too
let changed = false;

const strip = (list, side) => {
  const e = el("div", "strip");
  for (const i of list) { const t = thumb(i, side); t.title = items[i].id + ", " + percent(items[i].p); e.append(t); }
  return e;
};
const dialog = $("detail"), body = $("detail-body");
const detail = (c) => {
  const title = el("h3"); title.append(el("bdi", "", names.get(c.c) || c.c));
  body.replaceChildren(title, el("p", "muted", c.size + " images; typical ones:"), strip(c.typical, setup.thumbnail));
  if (c.unsure.length) body.append(el("p", "muted", "those that it is least sure of:"), strip(c.unsure, setup.thumbnail));
  dialog.showModal();
};
$("detail-close").addEventListener("click", () => dialog.close());

const told = () => {
  const every = [...names.values()];
  return every.filter((n) => n.trim()).length + " of " + every.length + " new classes have a name";
};
const card = (c) => {
  const e = el("div", "item class"), near = el("div", "words");
  if (c.new) {
    const field = el("input"); field.value = names.get(c.c); field.placeholder = c.c; field.maxLength = 200;
    field.setAttribute("list", "known"); field.setAttribute("aria-label", "name of " + c.c);
    field.addEventListener("input", () => { names.set(c.c, field.value); changed = true; count(); });
    e.append(field);
  } else { const h = el("div", "label"); h.append(el("bdi", "", c.c)); e.append(h); }
  const b = el("button", "more-images", "images"); b.type = "button";
  b.addEventListener("click", () => detail(c));
  const given = c.given ? ", " + c.given + " labelled" : "";
  e.append(strip(c.typical.slice(0, 8), 48), el("div", "badge", c.size + " unlabelled images" + given + ", " + percent(c.p) + " sure"));
  if (c.near.length) { near.append("most like ", el("bdi", "", c.near[0][0]), " (cosine " + c.near[0][1].toFixed(2) + ")"); e.append(near); }
  e.append(b);
  return e;
};
const by = { size: (a, b) => b.size - a.size, p: (a, b) => b.p - a.p, near: (a, b) => (a.near[0]?.[1] ?? -1) - (b.near[0]?.[1] ?? -1) };
const fits = { new: (c) => c.new, old: (c) => !c.new, all: () => true, open: (c) => c.new && !names.get(c.c).trim() };
let found = [], drawn = 0;
const count = () => { $("count").textContent = found.length + " classes, " + drawn + " shown; " + told(); };
const draw = () => {
  const part = document.createDocumentFragment();
  for (const c of found.slice(drawn, drawn + 60)) part.append(card(c));
  $("gallery").append(part);
  drawn = Math.min(found.length, drawn + 60);
  $("more").hidden = drawn >= found.length;
  count();
};
const show = () => {
  const words = $("search").value.toLowerCase();
  found = cards.filter((c) => fits[$("which").value](c) && (!words || (c.c + " " + (names.get(c.c) ?? "")).toLowerCase().includes(words)));
  found.sort(by[$("order").value]);
  $("gallery").replaceChildren(); drawn = 0; draw();
};
$("more").addEventListener("click", draw);
for (const id of ["which", "order", "search"]) $(id).addEventListener("input", show);
$("save").addEventListener("click", () => {
  const a = el("a"), given = Object.fromEntries([...names].map(([c, n]) => [c, n.trim()]));
  a.href = URL.createObjectURL(new Blob([JSON.stringify(given, null, 1)], { type: "application/json" }));
  a.download = "names.json"; a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10000);
  changed = false;
});
window.addEventListener("beforeunload", (event) => { if (changed) event.preventDefault(); });
show();
