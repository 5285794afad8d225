"use strict";
// Tables sort by a button in each heading; "#sort=<table id>.<column>" in the address opens the page sorted.
function number(text) {
  const found = text.replace(/,/g, "").match(/^[-+]?\d+(\.\d+)?/);
  return found ? parseFloat(found[0]) : NaN;
}
function sort(table, column) {
  const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
  const falling = heads[column].getAttribute("aria-sort") === "descending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", falling ? "ascending" : "descending");
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const x = a.cells[column].textContent.trim(), y = b.cells[column].textContent.trim();
    const m = number(x), n = number(y);
    const order = isNaN(m) || isNaN(n) ? x.localeCompare(y, undefined, { numeric: true }) : m - n;
    return falling ? order : -order;
  });
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
  Array.from(heads).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column));
    head.append(button);
  });
}
const asked = location.hash.match(/^#sort=([\w-]+)\.(\d+)$/);
const table = asked && document.getElementById(asked[1]);
if (table && table.matches("table.sortable")) sort(table, Number(asked[2]));
