// The table of every form, sorted by a click on a heading, filtered by choices and words.
"use strict";
(() => {
  document.querySelectorAll(".needs-script").forEach((element) => { element.hidden = false; });
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const search = document.getElementById("search");
  const choices = [...document.querySelectorAll("select[data-column]")];
  const shown = document.getElementById("shown");

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word)) && choices.every(
        (choice) => !choice.value || row.cells[+choice.dataset.column].textContent === choice.value);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${rows.length} rows.`;
  };
  search.addEventListener("input", filter);
  choices.forEach((choice) => choice.addEventListener("change", filter));

  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const by = (row) => row.cells[column].dataset.by;
      rows.sort((a, b) => {
        const [x, y] = [by(a), by(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown comes last
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return descending ? -order : order;
      });
      body.append(...rows);
    });
  });
})();
