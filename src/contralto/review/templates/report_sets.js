const chips = (x) => {
  const box = el("div", "chips");
  for (const [names, cls, sign] of [[x.g, "", ""], [x.a, "added", "+ "]])
    for (const name of names) {
      const state = x.r.includes(name) ? "removed" : x.i.includes(name) ? "ignored" : cls;
      const chip = el("span", "chip " + state); chip.append(sign, el("bdi", "", name)); box.append(chip);
    }
  return box;
};
const show = gallery((i) => {
  const card = el("div", "item"); card.append(thumb(i, 96), chips(items[i]));
  return card;
});
const search = () => {
  const words = $("search").value.toLowerCase(), c = setup.classes[$("class").value], change = $("change").value;
  show((x) =>
    (c === undefined || x.g.includes(c) || x.a.includes(c))
    && (change === "k" ? !(x.a.length + x.r.length + x.i.length) : !change || x[change].length > 0)
    && (!words || (x.t + " " + x.id).toLowerCase().includes(words)),
  (a, b) => b.p - a.p);
};
for (const id of ["search", "class", "change"]) $(id).addEventListener("input", search);
search();
