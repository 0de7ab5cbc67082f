const show = gallery((i) => {
  const e = el("div", "item"), now = el("p", "muted");
  now.append("task " + items[i].k + ", now ", el("bdi", "", items[i].p));
  e.append(thumb(i, setup.thumbnail), now);
  return e;
});
const search = () => {
  const words = $("search").value.toLowerCase();
  show((x) => !words || (x.t + " " + x.p + " task " + x.k + " " + x.id).toLowerCase().includes(words));
};
$("search").addEventListener("input", search);
search();
