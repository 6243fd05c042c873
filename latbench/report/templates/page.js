"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const ROW = 28, SPARE = 12, PRINTED = 40;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Grids: columns of values -> one object per row, shared with the charts that draw them.
  const rowsOf = {};
  for (const [name, grid] of Object.entries(page.grids)) {
    const fields = Object.keys(grid.values);
    const count = fields.length ? grid.values[fields[0]].length : 0;
    rowsOf[name] = Array.from({ length: count }, (_, i) => {
      const row = {};
      for (const field of fields) row[field] = grid.values[field][i];
      return row;
    });
  }

  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const forms = {
    ms: (v) => v.toPrecision(4), number: (v) => number.format(v), count: (v) => compact.format(v),
    percent: (v) => v.toFixed(Math.abs(v) < 10 ? 2 : 1), ratio: (v) => v.toFixed(4),
  };
  const widths = { text: "13rem", word: "5.5rem", ms: "7.5rem", number: "7rem", count: "5.5rem", percent: "6.5rem", ratio: "6rem", verdict: "6.5rem" };

  class Grid {
    constructor(element) {
      const { columns } = page.grids[element.dataset.grid];
      this.rows = rowsOf[element.dataset.grid];
      this.columns = columns;
      this.scroller = element.querySelector(".rows");
      this.body = element.querySelector("tbody");
      this.count = element.querySelector(".count");
      this.filter = element.querySelector("input");
      this.texts = this.rows.map((row) => columns.map((c) => row[c.field] ?? "").join(" ").toLowerCase());
      this.sort = null;
      this.head(element.querySelector("table"));
      this.filter.addEventListener("input", () => this.choose());
      this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
      addEventListener("resize", () => this.draw());
      addEventListener("beforeprint", () => this.draw(PRINTED));
      addEventListener("afterprint", () => this.draw());
      this.choose();
    }

    head(table) {
      const line = table.tHead.insertRow();
      const group = document.createElement("colgroup");
      for (const column of this.columns) {
        const width = widths[column.form];
        group.append(Object.assign(document.createElement("col"), { style: `width:${width}` }));
        const cell = document.createElement("th");
        cell.scope = "col";
        if (column.form in forms) cell.className = "number";
        const button = document.createElement("button");
        button.textContent = column.title;
        button.addEventListener("click", () => this.sortBy(column, cell));
        cell.append(button);
        line.append(cell);
      }
      table.prepend(group);
      table.style.width = `max(100%, calc(${this.columns.map((c) => widths[c.form]).join(" + ")}))`;
    }

    sortBy(column, cell) {
      const numeric = column.form in forms;
      const again = this.sort && this.sort.field === column.field;
      const sign = again ? -this.sort.sign : numeric ? -1 : 1;
      this.sort = { field: column.field, sign, numeric };
      for (const other of cell.parentNode.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      this.choose();
    }

    choose() {
      const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      this.chosen = this.rows.map((_, i) => i).filter((i) => words.every((word) => this.texts[i].includes(word)));
      if (this.sort) {
        const { field, sign, numeric } = this.sort;
        const value = (i) => this.rows[i][field];
        const missing = (v) => v === null || v === "";
        this.chosen.sort((a, b) => {
          const x = value(a), y = value(b);
          if (missing(x) || missing(y)) return missing(x) - missing(y);
          return sign * (numeric ? x - y : String(x).localeCompare(String(y)));
        });
      }
      const all = this.rows.length.toLocaleString("en"), some = this.chosen.length.toLocaleString("en");
      this.count.textContent = all === some ? `${all} rows` : `${some} of ${all} rows`;
      this.scroller.scrollTop = 0;
      this.draw();
    }

    // Only the rows in sight are in the document: twenty thousand scroll like twenty.
    draw(printed = 0) {
      const first = printed ? 0 : Math.max(0, Math.floor(this.scroller.scrollTop / ROW) - SPARE);
      const last = printed || Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / ROW) + SPARE;
      const shown = this.chosen.slice(first, last);
      const lines = shown.map((i) => this.line(this.rows[i]));
      const rest = printed ? 0 : this.chosen.length - first - shown.length;
      this.body.replaceChildren(this.space(first), ...lines, this.space(rest));
      if (printed && this.chosen.length > shown.length) {
        this.count.textContent = `the first ${shown.length} of ${this.chosen.length} rows`;
      }
    }

    space(rows) {
      const line = document.createElement("tr");
      line.style.height = `${rows * ROW}px`;
      line.hidden = rows === 0;
      return line;
    }

    line(row) {
      const line = document.createElement("tr");
      for (const column of this.columns) {
        const value = row[column.field];
        const cell = line.insertCell();
        if (column.form in forms) {
          cell.className = "number";
          cell.textContent = value === null ? "" : forms[column.form](value);
        } else {
          cell.textContent = cell.title = value ?? "";
          if (column.form === "verdict") cell.className = `verdict-${value}`;
        }
      }
      return line;
    }
  }

  function themed(value) {
    const colours = page.themes[dark.matches ? "dark" : "light"];
    return JSON.parse(JSON.stringify(value).replace(/"@(\w+)"/g, (whole, name) => (name in colours ? `"${colours[name]}"` : whole)));
  }

  async function drawCharts() {
    const config = themed(page.config);
    for (const [name, raw] of Object.entries(page.specs)) {
      const spec = themed(raw);
      spec.datasets = { ...spec.datasets };
      for (const [dataset, rows] of Object.entries(rowsOf)) {
        if (JSON.stringify(raw).includes(`{"name":"${dataset}"}`)) spec.datasets[dataset] = rows;
      }
      const element = document.getElementById(name);
      element.classList.toggle("drawn-dark", dark.matches);
      await vegaEmbed(element, spec, { config, actions: false, renderer: "canvas", scaleFactor: Math.max(2, devicePixelRatio), tooltip: { theme: "page", disableDefaultStyle: true } });
    }
    document.documentElement.dataset.ready = "yes";
  }

  for (const element of document.querySelectorAll(".grid")) new Grid(element);
  if (Object.keys(page.specs).length) {
    const start = () => {
      let drawing = drawCharts();
      dark.addEventListener("change", () => (drawing = drawing.then(drawCharts)));
    };
    if (window.vegaEmbed) start();
    else addEventListener("vega-ready", start, { once: true });
  } else document.documentElement.dataset.ready = "yes";
})();
