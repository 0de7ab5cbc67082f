"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const $ = (id) => document.getElementById(id);
  const items = read("items"), sheets = read("sheets"), setup = read("setup");
  const page = 60, side = 96;
  const el = (tag, cls, text) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const thumb = (i) => {
    const e = el("div", "thumb"), at = i % 100;
    e.style.width = e.style.height = side + "px";
    e.style.backgroundImage = `url("${sheets[Math.floor(i / 100)]}")`;
    e.style.backgroundSize = 10 * side + "px auto";
    e.style.backgroundPosition = `${-(at % 10) * side}px ${-Math.floor(at / 10) * side}px`;
    e.setAttribute("role", "img");
    e.setAttribute("aria-label", "picture " + items[i].id);
    return e;
  };
  const chips = (x) => {
    const box = el("div", "chips");
    for (const [names, cls, sign] of [[x.g, "", ""], [x.a, "added", "+ "]])
      for (const name of names) {
        const state = x.r.includes(name) ? "removed" : x.i.includes(name) ? "ignored" : cls;
        const chip = el("span", "chip " + state); chip.append(sign, el("bdi", "", name)); box.append(chip);
      }
    return box;
  };
  let found = [], drawn = 0;
  const draw = () => {
    const part = document.createDocumentFragment();
    for (const i of found.slice(drawn, drawn + page)) {
      const card = el("div", "item"), words = el("div", "words");
      words.append(el("bdi", "", items[i].t));
      card.append(thumb(i), chips(items[i]), words);
      part.append(card);
    }
    $("gallery").append(part);
    drawn = Math.min(found.length, drawn + page);
    $("count").textContent = found.length + " images, " + drawn + " shown";
    $("more").hidden = drawn >= found.length;
  };
  const search = () => {
    const words = $("search").value.toLowerCase(), c = setup.classes[$("class").value], change = $("change").value;
    found = [];
    items.forEach((x, i) => {
      if (c !== undefined && !x.g.includes(c) && !x.a.includes(c)) return;
      if (change === "k" ? x.a.length + x.r.length + x.i.length : change && !x[change].length) return;
      if (words && !(x.t + " " + x.id).toLowerCase().includes(words)) return;
      found.push(i);
    });
    found.sort((a, b) => items[b].p - items[a].p);
    $("gallery").replaceChildren(); drawn = 0; draw();
  };
  for (const id of ["search", "class", "change"]) $(id).addEventListener("input", search);
  $("more").addEventListener("click", draw);
  search();
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();
