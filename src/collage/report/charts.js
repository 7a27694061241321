"use strict";

/* From the data and the switches to the traces and the layout that plotly draws. Nothing here touches the page.
 *
 * view:   what the server or the file gives (collage.report.view).
 * state:  the switches; state.off holds the labels of the groups that are switched off.
 * look:   colours of the page's theme, look.theme 0 = light, 1 = dark; look.narrow, look.touch.
 * Each chart is {data, layout}, or {note} where there is nothing to draw, or all three.
 */
const Charts = (() => {
  const AUDITED = ["edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction"];
  const LOSSES = {
    loss: "training loss",
    loss_difference: "training loss minus the baseline's",
    validation_loss: "validation loss",
    grad_norm: "gradient norm",
    lr: "learning rate",
    tokens_per_s: "tokens per second",
  };
  const LOST = {
    lost_fraction: "updates, whole value",
    lost_fraction_hi: "updates, hi alone",
    v_lost_fraction: "second moment (v)",
  };
  const MODULES = {edq_ratio: "EDQ ratio", lost_fraction: "lost updates", lost_fraction_hi: "lost updates, hi alone", v_lost_fraction: "lost v"};
  const MARKED = 40; // curves of at most so many points have a mark at each

  // ---- series

  /** The centred moving mean over a share of the points, cut off at both ends; nulls are left out. */
  function smooth(values, share) {
    const half = Math.floor(values.length * share / 2);
    const totals = [0], counts = [0];
    for (const value of values) {
      totals.push(totals.at(-1) + (value ?? 0));
      counts.push(counts.at(-1) + (value === null ? 0 : 1));
    }
    return values.map((_, i) => {
      const first = Math.max(0, i - half), last = Math.min(values.length, i + half + 1);
      const count = counts[last] - counts[first];
      return count ? (totals[last] - totals[first]) / count : null;
    });
  }

  /** The mean over several series with its smallest and largest value, wherever all of them have a point. */
  function meanOf(series) {
    const mean = {x: [], y: [], low: [], high: []};
    if (!series.length) return mean;
    const others = series.slice(1).map((each) => new Map(each.x.map((x, i) => [x, each.y[i]])));
    series[0].x.forEach((x, i) => {
      if (!others.every((other) => other.has(x))) return;
      const column = [series[0].y[i], ...others.map((other) => other.get(x))];
      const whole = column.every((value) => value !== null);
      mean.x.push(x);
      mean.y.push(whole ? column.reduce((a, b) => a + b) / column.length : null);
      mean.low.push(whole ? Math.min(...column) : null);
      mean.high.push(whole ? Math.max(...column) : null);
    });
    return mean;
  }

  /** A figure of a run, of the whole model or of one module; null where the run has not got it. */
  function seriesOf(run, key, module) {
    if (!module || !AUDITED.includes(key)) return run.series[key] ?? null;
    const y = run.modules?.[key][module];
    return y && y.some((value) => value !== null) ? {x: run.modules.x, y} : null;
  }

  const shown = (view, state) =>
    view.groups.map((group, index) => ({...group, index})).filter((group) => !state.off.has(group.label));
  const runsOf = (view, group) => view.runs.filter((run) => run.group === group.index);

  // ---- layout

  function layout(look, height, more) {
    const axis = {gridcolor: look.line, zerolinecolor: look.line, linecolor: look.line, automargin: true};
    const merged = {
      height,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: "system-ui, sans-serif", size: 12, color: look.ink},
      margin: {l: 8, r: 12, t: 10, b: 8},
      showlegend: false,
      dragmode: look.touch ? false : "zoom",
      hoverlabel: {bgcolor: look.card, bordercolor: look.line, font: {color: look.ink}},
      ...more,
    };
    merged.xaxis = {...axis, ...more.xaxis};
    merged.yaxis = {...axis, ...more.yaxis};
    return merged;
  }

  const rule = (look, at) => ({type: "line", layer: "below", line: {color: look.dim, width: 1, dash: "dot"}, xref: "paper", x0: 0, x1: 1, yref: "y", y0: at, y1: at});

  // ---- curves

  /** The points of a run as they were: where it is shortened, from the smallest to the largest of each stretch. */
  function rawTrace(run, series, group, look, scale) {
    const twice = (list) => list.flatMap((value) => [value, value]);
    const y = series.low ? series.low.flatMap((low, i) => [low, series.high[i]]) : series.y;
    return {
      meta: {kind: "run", group: group.label, run: run.name},
      x: scale(series.low ? twice(series.x) : series.x),
      y,
      mode: series.x.length === 1 ? "markers" : "lines",
      line: {color: group.colours[look.theme], width: 0.8},
      marker: {color: group.colours[look.theme], size: 4},
      opacity: 0.45,
      hoverinfo: "skip",
    };
  }

  function meanTrace(mean, group, look, scale, share, format, seeds) {
    const text = (i) => mean.y[i] === null ? "" : ` (${format(mean.low[i])} to ${format(mean.high[i])})`;
    return {
      meta: {kind: "mean", group: group.label},
      name: group.label,
      x: scale(mean.x),
      y: smooth(mean.y, share),
      text: seeds > 1 && !look.narrow ? mean.x.map((_, i) => text(i)) : "",
      hovertemplate: `%{y:${format.form}}%{text}`,
      mode: mean.x.length <= MARKED ? "lines+markers" : "lines",
      line: {color: group.colours[look.theme], width: group.width, dash: group.dash},
      marker: {color: group.colours[look.theme], size: 5},
    };
  }

  function formatter(form) {
    const digits = {".4f": (v) => v.toFixed(4), ".2%": (v) => `${(100 * v).toFixed(2)}%`, ".3g": (v) => v.toPrecision(3), ",.0f": (v) => v.toFixed(0)};
    return Object.assign(digits[form], {form});
  }

  const FORMS = {lr: ".3g", grad_norm: ".3g", tokens_per_s: ",.0f", lost_fraction: ".2%", lost_fraction_hi: ".2%", v_lost_fraction: ".2%"};

  /** One figure against the step or the tokens, for every run of the groups that are switched on. */
  function curves(view, state, look, key, log) {
    const format = formatter(FORMS[key] ?? ".4f");
    const raw = [], means = [], without = [], notes = [];
    const groups = shown(view, state).sort((a, b) => a.order - b.order);
    for (const group of groups) {
      const runs = runsOf(view, group).map((run) => [run, seriesOf(run, key, state.module)]).filter(([, series]) => series);
      if (!runs.length) without.push(group.label);
      const tokens = state.axis === "tokens" ? runs[0]?.[0].tokens_per_step : null;
      const scale = (steps) => tokens ? steps.map((step) => step * tokens) : steps;
      const counted = runs.filter(([run]) => run.counted).map(([, series]) => series);
      const mean = meanOf(counted);
      if (mean.x.length) means.push(meanTrace(mean, group, look, scale, state.smoothing / 100, format, counted.length));
      if (state.seeds) raw.push(...runs.map(([run, series]) => rawTrace(run, series, group, look, scale)));
    }
    const of = key === "loss_difference" ? ` (no ${view.baseline} run of the same seed, or ${view.baseline} itself)` : "";
    if (!means.length && !raw.length) return {note: groups.length ? `Nothing was recorded${of}.` : "Every strategy is switched off."};
    if (without.length) notes.push(`Not recorded for ${without.join(", ")}${of}.`);
    if (view.runs.some((run) => run.series[key]?.low)) notes.push("Long runs are shortened: a point is the mean of a stretch of steps, and thin lines go from its smallest to its largest value.");
    const shapes = key === "edq_ratio" ? [rule(look, 1)] : [];
    const percent = format.form === ".2%";
    return {
      data: [...raw, ...means],
      layout: layout(look, 300, {
        hovermode: "x unified",
        uirevision: [state.axis, key, log, state.module].join(),
        shapes,
        xaxis: {title: {text: state.axis === "tokens" ? "tokens" : "optimizer step"}, range: state.range ?? undefined, autorange: !state.range, rangemode: "tozero"},
        yaxis: {type: log ? "log" : "linear", tickformat: percent ? ".3~%" : undefined, rangemode: percent || key === "edq_ratio" ? "tozero" : "normal"},
      }),
      note: notes.join(" "),
    };
  }

  // ---- by module

  const average = (values) => values.length ? values.reduce((a, b) => a + b) / values.length : null;

  /** The mean of a module's figure over the audits of the last tenth of a run. */
  function atEnd(run, key, module) {
    const last = run.modules.x.at(-1), from = last - Math.max(1, Math.floor(last / 10));
    const values = run.modules[key][module] ?? [];
    return average(values.filter((value, i) => value !== null && run.modules.x[i] > from));
  }

  /** Module names for the axis: without what all of several parts begin with; on a phone the layer's number and the last word. */
  function shortNames(names, narrow) {
    const dotted = names.filter((name) => name.includes(".")).map((name) => name.split("."));
    let common = 0;
    while (dotted.length > 1 && dotted.every((each) => each.length > common + 1 && each[common] === dotted[0][common])) common += 1;
    return names.map((name) => {
      const parts = name.split("."), layer = parts.find((part) => /^\d+$/.test(part)), last = parts.at(-1);
      if (!narrow) return parts.slice(parts.length > 1 ? common : 0).join(".");
      return (layer === undefined ? "" : `${layer} `) + (last.length > 16 ? `…${last.slice(-15)}` : last);
    });
  }

  function modules(view, state, look, key) {
    if (!view.modules.length) return {note: "These runs hold no figures by module; collage train writes them to audit.jsonl."};
    const percent = key !== "edq_ratio";
    const rows = view.modules.map((_, index) => index);
    const data = shown(view, state).map((group) => {
      const runs = runsOf(view, group).filter((run) => run.counted && run.modules);
      const values = view.modules.map((name) => average(runs.map((run) => atEnd(run, key, name)).filter((value) => value !== null)));
      return {
        meta: {kind: "mean", group: group.label},
        name: group.label,
        x: values,
        y: rows,
        customdata: view.modules,
        mode: "markers",
        marker: {color: group.colours[look.theme], size: 5 + 1.6 * group.width, symbol: "circle-open", line: {width: 2}},
        hovertemplate: `%{customdata}<br>${group.label}: %{x:${percent ? ".2%" : ".4f"}}<extra></extra>`,
      };
    });
    return {
      data,
      layout: layout(look, 50 + 18 * rows.length, {
        uirevision: key,
        hovermode: "closest",
        dragmode: false,
        xaxis: {rangemode: "tozero", side: "top", tickformat: percent ? ".3~%" : undefined},
        yaxis: {tickvals: rows, ticktext: shortNames(view.modules, look.narrow), range: [rows.length - 0.4, -0.6], zeroline: false, tickfont: {size: 11}},
      }),
    };
  }

  // ---- the histogram

  function histogram(view, state, look, label) {
    const group = view.groups.findIndex((each) => each.label === label);
    const found = view.runs.filter((run) => run.group === group && run.histogram);
    if (!found.length) return {note: "None of these runs has recorded the sizes of its updates; collage train does so at every fifth audit of a run that is not sharded."};
    const all = found.flatMap((run) => run.histogram.log2);
    const bins = Array.from({length: Math.max(...all) - Math.min(...all) + 1}, (_, i) => Math.min(...all) + i);
    const bin = ({log2, shares, x}, name) => ({x, y: shares.map((each) => each[name - log2[0]] ?? 0)});
    const means = bins.map((name) => meanOf(found.map((run) => bin(run.histogram, name))));
    const tokens = state.axis === "tokens" ? found[0].tokens_per_step : null;
    // Bins that never hold a two-thousandth of the updates are left to the zoom.
    const filled = bins.filter((_, i) => Math.max(...means[i].y) > 5e-4);
    const scale = look.theme
      ? [[0, "#1b1f26"], [0.5, "#0072B2"], [1, "#ffe08a"]]
      : [[0, "#ffffff"], [0.5, "#56B4E9"], [1, "#00304f"]];
    return {
      data: [{
        type: "heatmap",
        meta: {kind: "histogram", group: label},
        x: means[0].x.map((step) => tokens ? step * tokens : step),
        y: bins.map((name) => name + 0.5),
        z: means.map((mean) => mean.y),
        zmin: 0,
        colorscale: scale,
        colorbar: {thickness: 10, tickformat: ".0%", outlinewidth: 0},
        customdata: bins.map((name) => means[0].x.map(() => `2^${name} to 2^${name + 1} ulp`)),
        hovertemplate: `${tokens ? "tokens" : "step"} %{x}<br>%{customdata}<br>%{z:.2%} of the updates<extra></extra>`,
      }],
      layout: layout(look, 300, {
        uirevision: `${label},${state.axis}`,
        shapes: [{...rule(look, -1), layer: "above", line: {color: look.ink, width: 1.5, dash: "dot"}}],
        xaxis: {title: {text: state.axis === "tokens" ? "tokens" : "optimizer step"}, showgrid: false},
        yaxis: {title: {text: "update / ulp"}, range: [Math.min(-2, filled[0] ?? 0), (filled.at(-1) ?? 0) + 1], tickprefix: "2<sup>", ticksuffix: "</sup>", showgrid: false, zeroline: false},
      }),
    };
  }

  // ---- bars and points

  function validation(view, state, look) {
    const rows = view.validation.rows.filter((row) => !state.off.has(view.groups[row.group].label));
    if (!rows.length) return {note: "No run that is switched on has finished with a validation loss."};
    const data = rows.flatMap((row, y) => {
      const {label, colours} = view.groups[row.group];
      const colour = colours[look.theme];
      return [{
        meta: {kind: "mean", group: label},
        x: [row.mean], y: [y], mode: "markers", hoverinfo: "skip",
        marker: {symbol: "line-ns-open", size: 16, color: colour, line: {width: 2}},
        error_x: row.spread === null ? undefined : {type: "data", array: [row.spread], color: colour, thickness: 2, width: 5},
      }, {
        meta: {kind: "run", group: label},
        x: row.values, y: row.values.map(() => y), mode: "markers", customdata: row.seeds,
        marker: {symbol: "circle-open", size: 8, color: colour, line: {width: 1.5}},
        hovertemplate: `${label}, seed %{customdata}: %{x:.4f}<extra></extra>`,
      }];
    });
    const {differences} = view.validation;
    return {
      data,
      layout: layout(look, 70 + 46 * rows.length, {
        uirevision: "validation",
        hovermode: "closest",
        shapes: differences ? [{type: "line", layer: "below", line: {color: look.dim, width: 1.5}, yref: "paper", y0: 0, y1: 1, xref: "x", x0: 0, x1: 0}] : [],
        xaxis: {title: {text: differences ? `validation loss minus ${view.baseline}` : "validation loss"}, nticks: 6},
        yaxis: {
          tickvals: rows.map((_, y) => y),
          ticktext: rows.map((row) => `${view.groups[row.group].label}<br>${row.text}`),
          range: [rows.length - 0.5, -0.5], zeroline: false,
        },
      }),
    };
  }

  function memory(view, state, look) {
    const groups = shown(view, state).filter((group) => Object.keys(group.bytes).length);
    if (!groups.length) return {note: "The files of these runs do not say how many bytes a parameter takes."};
    const total = (group) => Object.values(group.bytes).reduce((a, b) => a + b, 0);
    const rows = groups.map((_, y) => y);
    const data = view.parts.filter((part) => groups.some((group) => group.bytes[part.name])).map((part) => ({
      type: "bar",
      orientation: "h",
      meta: {kind: "bar", part: part.name},
      name: part.name,
      x: groups.map((group) => group.bytes[part.name] ?? 0),
      y: rows,
      text: groups.map((group) => group.bytes[part.name] ? String(+group.bytes[part.name].toPrecision(3)) : ""),
      textposition: "inside",
      textangle: 0,
      insidetextanchor: "middle",
      insidetextfont: {color: "#000000"},
      marker: {color: part.colours[look.theme], line: {color: look.card, width: 1}},
      customdata: groups.map((group) => group.label),
      hovertemplate: `%{customdata}: %{x} bytes of ${part.name}<extra></extra>`,
    }));
    return {
      data,
      layout: layout(look, (look.narrow ? 220 : 110) + 32 * rows.length, {
        uirevision: "memory",
        barmode: "stack",
        bargap: 0.3,
        hovermode: "closest",
        dragmode: false,
        showlegend: true,
        legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal", itemclick: false, itemdoubleclick: false},
        xaxis: {title: {text: "bytes per parameter"}, range: [0, 1.12 * Math.max(...groups.map(total))]},
        yaxis: {tickvals: rows, ticktext: groups.map((group) => group.label), range: [rows.length - 0.5, -0.5], showgrid: false},
        annotations: groups.map((group, y) => ({x: total(group), y, text: `<b>${+total(group).toPrecision(4)}</b>`, showarrow: false, xanchor: "left", xshift: 4})),
      }),
    };
  }

  return {AUDITED, LOSSES, LOST, MODULES, smooth, meanOf, seriesOf, curves, modules, histogram, validation, memory};
})();
