
const rows = [...document.querySelectorAll("[data-adapter]")];
const search = document.querySelector("#search"), verdict = document.querySelector("#verdict");
const shown = document.querySelector("#shown");
function filter() {
  const text = search.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = row.dataset.adapter.includes(text) && (!verdict.value || row.dataset.verdict === verdict.value);
    row.hidden = !fits;
    if (fits && row.tagName === "TR") count += 1;
  }
  shown.textContent = `${count} shown`;
}
function open() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
document.querySelector("#filters").hidden = false;
search.addEventListener("input", filter);
verdict.addEventListener("change", filter);
window.addEventListener("hashchange", open);
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
filter();
open();
