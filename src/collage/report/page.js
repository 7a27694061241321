"use strict";

/* The page: its switches, its drawing, and where it is served live, its following of the runs. */
(() => {
  const byId = (id) => document.getElementById(id);
  let view = JSON.parse(byId("data").textContent);
  const live = view.live; // milliseconds between questions, null for a page that stays as it is
  let version = view.version ?? 0;
  const state = {off: new Set(), module: "", axis: "step", smoothing: 5, seeds: true, range: null};
  const sorting = {column: null, descending: false};

  // ---- colours

  function look() {
    const css = (element, property) => getComputedStyle(element)[property];
    const chosen = document.documentElement.dataset.theme;
    const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    return {
      theme: dark ? 1 : 0,
      ink: css(document.body, "color"),
      dim: css(document.querySelector("figcaption"), "color"),
      line: css(byId("controls"), "borderTopColor"),
      card: css(byId("controls"), "backgroundColor"),
      narrow: innerWidth < 600,
      touch: matchMedia("(pointer: coarse)").matches,
    };
  }

  function setTheme(name) {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("collage-theme", name);
    } catch { /* a page opened as a file may keep nothing */ }
  }

  function storedTheme() {
    try {
      return localStorage.getItem("collage-theme") ?? "";
    } catch {
      return "";
    }
  }

  // ---- switches

  /** Fill a select, keeping what is chosen where it still exists. `options` is a list of [value, text]. */
  function fill(select, options) {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === before)) select.value = before;
    select.disabled = options.length < 2;
  }

  function chip(group, theme) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), {type: "checkbox", checked: !state.off.has(group.label), name: group.label});
    const dash = group.dash === "solid" ? "" : group.dash.replaceAll("px", "");
    label.innerHTML = `<svg width="30" height="12" aria-hidden="true"><line x1="0" y1="6" x2="30" y2="6" stroke="${group.colours[theme]}" stroke-width="${group.width}" stroke-dasharray="${dash}"/></svg>`;
    label.prepend(box);
    label.append(group.label);
    box.addEventListener("change", () => {
      if (box.checked) state.off.delete(group.label);
      else state.off.add(group.label);
      draw();
    });
    return label;
  }

  function button(text, act) {
    const made = Object.assign(document.createElement("button"), {type: "button", textContent: text});
    made.addEventListener("click", act);
    return made;
  }

  function buildChips() {
    const {theme} = look();
    const chips = document.querySelector("#strategies .chips");
    const focused = chips.contains(document.activeElement) ? document.activeElement.name : null;
    const all = (off) => () => {
      state.off = new Set(off ? view.groups.map((group) => group.label) : []);
      buildChips();
      draw();
    };
    chips.replaceChildren(...view.groups.map((group) => chip(group, theme)));
    if (view.groups.length > 2) chips.append(button("all", all(false)), button("none", all(true)));
    if (focused) chips.querySelector(`input[name="${CSS.escape(focused)}"]`)?.focus();
  }

  const offered = (names) => Object.entries(names).filter(([key]) => view.runs.some((run) => run.series[key]));

  function buildSwitches() {
    buildChips();
    fill(byId("module"), [["", "whole model"], ...view.modules.map((name) => [name, name])]);
    state.module = byId("module").value;
    const note = byId("module-note");
    note.hidden = view.modules.length > 0;
    note.textContent = "(no figures by module in these runs)";
    const tokens = view.runs.some((run) => run.tokens_per_step);
    fill(byId("axis"), [["step", "steps"], ...(tokens ? [["tokens", "tokens"]] : [])]);
    fill(byId("loss-figure"), offered(Charts.LOSSES).map(([key, text]) => [key, text.replace("the baseline's", view.baseline)]));
    fill(byId("lost-figure"), offered(Charts.LOST));
    fill(byId("modules-figure"), Object.entries(Charts.MODULES));
    const counted = view.groups.filter((_, index) => view.runs.some((run) => run.group === index && run.histogram));
    fill(byId("histogram-group"), counted.map((group) => [group.label, group.label]));
    for (const id of ["modules-figure", "histogram-group"])
      byId(id).closest(".switches").hidden = id === "modules-figure" ? !view.modules.length : !counted.length;
    byId("controls").hidden = byId("plots").hidden = !view.runs.length;
  }

  // ---- drawing

  const CHARTS = {
    loss: (l) => Charts.curves(view, state, l, byId("loss-figure").value, byId("loss-log").checked),
    edq: (l) => Charts.curves(view, state, l, "edq_ratio", false),
    lost: (l) => Charts.curves(view, state, l, byId("lost-figure").value || "lost_fraction", byId("lost-log").checked),
    modules: (l) => Charts.modules(view, state, l, byId("modules-figure").value),
    histogram: (l) => Charts.histogram(view, state, l, byId("histogram-group").value),
    validation: (l) => Charts.validation(view, state, l),
    memory: (l) => Charts.memory(view, state, l),
  };
  const LINKED = ["loss", "edq", "lost"];

  function draw() {
    if (!window.Plotly || byId("plots").hidden) return;
    const colours = look();
    const config = {responsive: true, displaylogo: false, displayModeBar: colours.touch ? false : "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
    for (const [name, chart] of Object.entries(CHARTS)) {
      const plot = byId(`plot-${name}`);
      const {data, layout, note} = chart(colours);
      byId(`note-${name}`).textContent = note ?? "";
      plot.hidden = !data;
      if (!data) continue;
      Plotly.react(plot, data, layout, config);
      describe(plot, data);
      if (!plot.watched) watch(name, plot);
    }
  }

  function describe(plot, data) {
    const heading = plot.closest("figure").querySelector("h2").textContent;
    const names = [...new Set(data.map((trace) => trace.meta.group ?? trace.meta.part))];
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${heading}: ${names.join(", ")}`);
  }

  function watch(name, plot) {
    plot.watched = true;
    if (name === "modules") plot.on("plotly_click", ({points}) => {
      byId("module").value = state.module = points[0].customdata;
      draw();
    });
    if (LINKED.includes(name)) plot.on("plotly_relayout", (change) => {
      if (change["xaxis.autorange"]) state.range = null;
      else if ("xaxis.range[0]" in change) state.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      else return;
      draw();
    });
  }

  // ---- the table

  const figure = (text) => text.startsWith("–") ? NaN : parseFloat(text.replace(/[<,\s]/g, ""));

  function sortTable() {
    const table = document.querySelector("table.sortable");
    if (!table || sorting.column === null) return;
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((cell, i) => cell.toggleAttribute("aria-sort", i === sorting.column));
    headings[sorting.column].setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [row.cells[sorting.column].textContent, row]);
    const sign = sorting.descending ? -1 : 1;
    const compare = sorting.column
      ? ([a], [b]) => (isNaN(figure(a)) - isNaN(figure(b))) || sign * (figure(a) - figure(b))
      : ([a], [b]) => sign * a.localeCompare(b);
    table.tBodies[0].replaceChildren(...rows.sort(compare).map(([, row]) => row));
  }

  byId("before").addEventListener("click", (event) => {
    const cell = event.target.closest(".sortable thead th");
    if (!cell) return;
    sorting.descending = sorting.column === cell.cellIndex && !sorting.descending;
    sorting.column = cell.cellIndex;
    sortTable();
  });

  // ---- following

  function say(text, stale) {
    byId("live").textContent = text;
    byId("live").classList.toggle("stale", stale);
  }

  function accept(message) {
    ({view, version} = message);
    document.title = message.title;
    byId("before").innerHTML = message.before;
    byId("after").innerHTML = message.after;
    sortTable();
    buildSwitches();
    draw();
  }

  function progress() {
    const running = view.runs.filter((run) => run.status === "running");
    const steps = running.map((run) => `${run.name} step ${run.step}${run.steps ? ` of ${run.steps}` : ""}`);
    if (!view.runs.length) return "waiting for runs";
    return running.length ? `following ${steps.slice(0, 3).join(", ")}${steps.length > 3 ? ` and ${steps.length - 3} more` : ""}` : "following; no run is running";
  }

  async function follow() {
    try {
      const answer = await fetch(`data.json?known=${version}`, {cache: "no-store"});
      if (answer.status === 200) accept(await answer.json());
      else if (answer.status !== 204) throw new Error(await answer.text());
      say(progress(), false);
    } catch (error) {
      const stopped = error instanceof TypeError;
      say(stopped ? "collage report --watch has stopped; the page shows what it last knew" : `not up to date: ${error.message}`, true);
    }
    setTimeout(follow, live);
  }

  // ---- start

  async function unpackLibrary() {
    const packed = Uint8Array.from(atob(byId("library").textContent), (sign) => sign.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    byId("library").remove();
  }

  function bind() {
    const on = (id, event, act) => byId(id).addEventListener(event, () => { act(byId(id)); draw(); });
    on("module", "change", (field) => { state.module = field.value; });
    on("axis", "change", (field) => { state.axis = field.value; state.range = null; });
    on("seeds", "change", (field) => { state.seeds = field.checked; });
    on("smoothing", "input", (field) => {
      state.smoothing = Number(field.value);
      document.querySelector("output").textContent = `${field.value} %`;
    });
    for (const id of ["loss-figure", "loss-log", "lost-figure", "lost-log", "modules-figure", "histogram-group"]) on(id, "change", () => {});
    on("theme", "change", (field) => { setTheme(field.value); buildChips(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { buildChips(); draw(); });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    let width = innerWidth;
    addEventListener("resize", () => {
      if ((width < 600) !== (innerWidth < 600)) draw();
      width = innerWidth;
    });
  }

  async function start() {
    byId("theme").value = storedTheme();
    setTheme(byId("theme").value);
    bind();
    buildSwitches();
    try {
      await unpackLibrary();
    } catch (error) {
      byId("problem").hidden = false;
      byId("problem").textContent = `The plots can't be drawn in this browser (${error.message}); the same plots stand as pictures in the folder plots and in report.md.`;
    }
    draw();
    document.documentElement.dataset.ready = "true";
    if (live !== null) follow();
  }

  start();
})();
