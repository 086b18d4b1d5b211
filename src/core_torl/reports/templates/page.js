"use strict";
// Light or dark: what the system says, until the reader says otherwise.
(() => {
  const root = document.documentElement;
  const button = document.createElement("button");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.type = "button";
  button.className = "theme";
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();
  document.querySelector("nav").append(button);
})();
// A click on a head sorts its table: first down, then up. Rows with data-fixed stay where they are.
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
  // A row without a number goes to the end, whichever way the others are sorted.
  const empty = (value) => typeof value === "string" && ["", "–", "not recorded", "(baseline)"].includes(value);
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const body = table.tBodies[0];
        const numbers = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
        const before = head.getAttribute("aria-sort");
        const up = before ? before === "descending" : !numbers;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const all = [...body.rows];
        const first = all.findIndex((row) => !("fixed" in row.dataset));
        const loose = all.filter((row) => !("fixed" in row.dataset));
        loose.sort((one, two) => {
          const a = key(one, column), b = key(two, column);
          if (empty(a) !== empty(b)) return empty(a) ? 1 : -1;
          return up ? compare(a, b) : compare(b, a);
        });
        const top = all.slice(0, Math.max(first, 0)).filter((row) => "fixed" in row.dataset);
        const bottom = all.filter((row) => "fixed" in row.dataset && !top.includes(row));
        body.append(...top, ...loose, ...bottom);
      });
    });
  }
})();
