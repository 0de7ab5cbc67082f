"use strict";
// Keys for what the buttons and links of the page do; nothing here that a click does not do, too.
const one = document.getElementById("one");
const many = one !== null && "many" in one.dataset;
const typed = document.getElementById("typed");
const coded = [...document.querySelectorAll("[data-code]")].filter((e) => e.dataset.code);
let first = "", busy = false;

const wait = (key) => {
  first = key;
  for (const e of coded) (e.closest(".chip") ?? e).classList.toggle("waits", key !== "" && e.dataset.code.startsWith(key));
  if (typed) typed.textContent = key && key + " …";
};
const click = (e) => {
  if (!e) return;
  if (e.tagName === "INPUT") { e.checked = !e.checked; return; }
  busy = true;
  e.click();
};
const ids = { u: "undo", n: "next", p: "previous", l: "list" };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || busy) return;
  const at = event.target;
  if (at.matches("input:not([type=checkbox]), select, textarea")) return;
  const key = event.key.toLowerCase();
  if (key === "enter" && !at.matches("a, button")) {
    event.preventDefault();
    click(document.getElementById(many ? "set" : "start"));
  } else if (first) {
    const found = coded.find((e) => e.dataset.code === first + key);
    wait("");
    if (found) event.preventDefault();
    click(found);
  } else if (/^[0-9]$/.test(key) && coded.some((e) => e.dataset.code.startsWith(key))) {
    wait(key);
  } else if (one && "kao".includes(key) && key.length === 1) {
    click(document.querySelector(`#decide button[value="${{ k: "keep", a: "accept", o: "off-topic" }[key]}"]`));
  } else if (ids[key]) {
    click(document.getElementById(ids[key]));
  }
});
// A page that comes back from the browser's own memory is not busy any more.
window.addEventListener("pageshow", () => { busy = false; wait(""); });
