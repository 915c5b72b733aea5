for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, body = table.tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.number ?? row.cells[column].textContent;
    const missing = (row) => row.cells[column].textContent === "–";  // last, whichever way
    const order = (a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const [one, other] = [key(a), key(b)], numbers = [Number(one), Number(other)];
      const compared = numbers.some(Number.isNaN) ? one.localeCompare(other) : numbers[0] - numbers[1];
      return rising ? compared : -compared;
    };
    body.append(...[...body.rows].sort(order));
  }));
}
