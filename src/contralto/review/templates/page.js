"use strict";
// What both kinds of report need; the script of each follows in the same block.
const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);
const items = read("items"), sheets = read("sheets"), setup = read("setup");

const el = (tag, cls, text) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
};
const percent = (v) => (100 * v).toFixed(0) + " %";

const sprite = (sheet, at, side, id) => {
  const e = el("div", "thumb");
  e.style.width = e.style.height = side + "px";
  e.style.backgroundImage = `url("${sheet}")`;
  e.style.backgroundSize = 10 * side + "px auto";
  e.style.backgroundPosition = `${-(at % 10) * side}px ${-Math.floor(at / 10) * side}px`;
  e.setAttribute("role", "img");
  e.setAttribute("aria-label", "picture " + id);
  return e;
};
const thumb = (i, side) => sprite(sheets[Math.floor(i / 100)], i % 100, side, items[i].id);

// A gallery of the items for which `matches` holds, 60 at a time, each as the element that `card` makes of it.
const gallery = (card) => {
  let found = [], drawn = 0;
  const draw = () => {
    const part = document.createDocumentFragment();
    for (const i of found.slice(drawn, drawn + 60)) {
      const words = el("div", "words"), e = card(i);
      words.append(el("bdi", "", items[i].t)); e.append(words); part.append(e);
    }
    $("gallery").append(part);
    drawn = Math.min(found.length, drawn + 60);
    $("count").textContent = found.length + " images, " + drawn + " shown";
    $("more").hidden = drawn >= found.length;
  };
  $("more").addEventListener("click", draw);
  return (matches, order) => {
    found = items.flatMap((x, i) => (matches(x) ? [i] : []));
    if (order) found.sort((a, b) => order(items[a], items[b]));
    $("gallery").replaceChildren(); drawn = 0; draw();
  };
};

$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
