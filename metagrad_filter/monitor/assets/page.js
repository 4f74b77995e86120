// Draws a run's view (see view.py) and, in live mode, draws it again whenever the run changes.
// Text reaches the page through textContent only, so nothing in a run is ever taken as markup.
"use strict";
(() => {
  const page = document.getElementById("page");
  const live = document.documentElement.dataset.live === "yes";
  const LOOKS = [
    ["--blue", []], ["--orange", [7, 3]], ["--green", [2, 3]],
    ["--pink", [9, 3, 2, 3]], ["--gold", [12, 4]], ["--grey", [4, 4]],
  ];
  let view = null, selected = null, plots = [], status = null, statusText = live ? "live" : "";

  // ---- text
  const DASH = "\u2013";
  const known = (x) => x !== null && x !== undefined;
  const number = (x, digits) => (typeof x === "number" ? x.toFixed(digits) : DASH);
  const signed = (x) => (typeof x === "number" ? (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(4) : DASH);
  const count = (x) => (typeof x === "number" ? x.toLocaleString("en-US") : DASH);
  const percent = (x, digits = 1) => (typeof x === "number" ? (100 * x).toFixed(digits) + "%" : DASH);
  const short = (x) => {
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(x) >= size) return +(x / size).toPrecision(3) + unit;
    return String(+x.toPrecision(3));
  };
  const strength = (x) => (x === "inf" ? "hard top-k" : x === 0 ? "0 (uniform)" : known(x) ? String(x) : DASH);
  const duration = (s) => {
    if (typeof s !== "number") return DASH;
    if (s < 90) return `${Math.round(s)} s`;
    if (s < 5400) return `${Math.round(s / 60)} min`;
    return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
  };
  const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

  // ---- elements
  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {}))
      if (value !== null && value !== false) element.setAttribute(name, value);
    element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== ""));
    return element;
  }
  const empty = (missing, remedy) =>
    h("div", { class: "card empty" }, h("p", {}, missing), remedy ? h("p", { class: "small" }, remedy) : null);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function sample(line) {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", "0 0 26 10");
    svg.setAttribute("aria-hidden", "true");
    const shape = document.createElementNS(ns, line.fill ? "rect" : "line");
    const at = line.fill
      ? { x: 0, y: 0, width: 26, height: 10, fill: colour(line.colour), opacity: line.opacity || 1 }
      : { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(line.colour), "stroke-width": line.width || 2,
          "stroke-dasharray": (line.dash || []).join(" ") };
    for (const [name, value] of Object.entries(at)) shape.setAttribute(name, value);
    svg.append(shape);
    return svg;
  }

  // ---- charts
  // lines: {label, values, colour, dash, width, fill, opacity, quiet, bars}; quiet: not in the key
  function chart(box, { title, caption, summary, x, lines, bands, marks, alarms, format, axis, wide, range, ticks }) {
    const readings = lines.map(() => h("b"));
    const shown = lines.map((line, i) => [line, i]).filter(([line]) => !line.quiet);
    const key = h("ul", { class: "key" }, shown.map(([line, i]) => h("li", {}, sample(line), line.label, readings[i])));
    const plot = h("div", { class: "plot", role: "img", "aria-label": `${title}. ${summary}` });
    box.append(h("figure", { class: wide ? "card wide" : "card" }, h("h3", {}, title), key, plot, h("figcaption", {}, caption, alarms && alarms.length ? " \u25B2 an alarm is raised, \u25B3 it is cleared." : "")));
    const read = (u) => {
      const at = known(u.cursor.idx) ? u.cursor.idx : x.length - 1;
      for (const [line, i] of shown) if (!line.silent) readings[i].textContent = known(line.values[at]) ? format(line.values[at]) : DASH;
    };
    const draw = () => {
      const font = "12px " + getComputedStyle(document.body).fontFamily;
      const grid = { stroke: colour("--rule"), width: 1 };
      const edge = { font, stroke: colour("--muted"), ticks: { show: false }, grid };
      const below = ticks || { values: (u, splits) => splits.map((s) => (Number.isInteger(s) ? short(s) : "")) };
      const width = Math.max(plot.clientWidth, 120);
      const options = {
        width, height: 230, legend: { show: false }, padding: [marks && marks.length > 1 ? 16 : 8, range ? 20 : 12, 0, 0],
        cursor: { y: false, drag: { x: true, y: false }, points: { show: false } },
        scales: {
          x: { time: false, range: (u, low, high) => (range ? range : low === high ? [low - 1, high + 1] : [low, high]) },
          y: { range: (u, low, high) => padded(low, high, axis) },
        },
        axes: [
          { ...edge, grid: { show: false }, space: 48, size: 28, label: axis.x, labelSize: 18, labelGap: 0, labelFont: font, ...below },
          { ...edge, size: 58, values: (u, splits) => splits.map((s) => axis.format(s)) },
        ],
        series: [{}, ...lines.map((line) => ({
          label: line.label, width: line.bars ? 0 : (known(line.width) ? line.width : 2),
          stroke: line.bars || line.width === 0 ? "transparent" : colour(line.colour), dash: line.dash || [],
          fill: line.bars ? colour(line.colour) : null, paths: line.bars ? uPlot.paths.bars({ size: [1, 100], gap: 1, align: 1 }) : null,
          points: { show: !line.bars && line.width !== 0 && (x.length < 3 || (line.dots === true && x.length <= 60)), size: 6 },
        }))],
        bands: (bands || []).map(([high, low, name]) => ({ series: [high + 1, low + 1], fill: colour(name) + "30" })),
        hooks: { drawAxes: [(u) => drawMarks(u, marks || [], font)], draw: [(u) => drawAlarms(u, alarms || [])], setCursor: [read] },
      };
      const u = new uPlot(options, [x, ...lines.map((line) => line.values)], plot);
      read(u);
      return u;
    };
    plots.push({ plot, draw, u: draw() });
  }

  function padded(low, high, axis) {
    if (!known(low)) return [0, 1];
    if (axis.zero) low = Math.min(low, 0);
    if (known(axis.most)) high = Math.max(high, axis.most);
    const space = (high - low || Math.abs(high) || 1) * 0.08;
    return [axis.zero && low === 0 ? 0 : low - space, high + space];
  }

  function drawMarks(u, marks, font) {
    const context = u.ctx, ratio = devicePixelRatio || 1;
    const { left, top, width, height } = u.bbox;
    let free = -Infinity;
    context.save();
    context.strokeStyle = context.fillStyle = colour("--muted");
    context.lineWidth = ratio;
    context.setLineDash([2 * ratio, 3 * ratio]);
    context.textAlign = "left";
    context.textBaseline = "alphabetic";
    context.font = font.replace(/^12/, String(11 * ratio));
    marks.forEach((mark, i) => {
      // The first version acts from before the first point on.
      const at = i ? u.valToPos(mark.block, "x", true) : Math.max(u.valToPos(mark.block, "x", true), left);
      if (at < left - 1 || at > left + width + 1) return;
      if (i) {
        context.beginPath();
        context.moveTo(at, top);
        context.lineTo(at, top + height);
        context.stroke();
      }
      const name = mark.version > 0 ? `v${mark.version}` : "uniform";
      const size = context.measureText(name).width;
      if (at >= free && at + size < left + width + 12 * ratio && marks.length > 1) {
        context.fillText(name, at, top - 5 * ratio);
        free = at + size + 8 * ratio;
      }
    });
    context.restore();
  }

  function drawAlarms(u, alarms) {
    const context = u.ctx, ratio = devicePixelRatio || 1, size = 6 * ratio;
    const { left, top, width, height } = u.bbox, foot = top + height - ratio;
    context.save();
    context.setLineDash([]);
    context.lineWidth = 1.5 * ratio;
    for (const alarm of alarms) {
      const at = u.valToPos(alarm.block, "x", true);
      if (at < left - 1 || at > left + width + 1) continue;
      const raised = alarm.state === "raised";
      context.strokeStyle = context.fillStyle = colour(raised ? "--bad" : "--good");
      context.beginPath();
      context.moveTo(at, foot - 1.6 * size);
      context.lineTo(at - size, foot);
      context.lineTo(at + size, foot);
      context.closePath();
      if (raised) context.fill();
      context.stroke();
    }
    context.restore();
  }

  // ---- parts of the page
  function drift(filter) {
    const s = filter && filter.series, values = (s && s.psi) || [];
    const recent = values.map((v, i) => [v, s.psi_limit[i]]).filter(([v]) => known(v)).slice(-5);
    if (!recent.length) return { state: "unknown" };
    const above = recent.filter(([v, limit]) => v > limit).length;
    const [value, limit] = recent[recent.length - 1];
    const state = value <= limit && above < 3 ? "none" : above >= 3 ? "drift" : "above once";
    return { state, value, limit, above, of: recent.length };
  }

  const actingOf = (filter) => view.versions.find((v) => filter && filter.version && v.version === filter.version);

  function headline(filter) {
    if (!filter) return "No filter has run yet.";
    if (!filter.records) return "The filter has no block statistics yet.";
    const kept = `${percent(filter.kept_ratio)} of ${plural(filter.windows, "window")}`;
    const acting = actingOf(filter), uniform = acting && acting.strength === 0;
    const who = !filter.version ? "No scorer is acting yet, so the choice is uniform"
      : uniform && acting.fallback ? `Version ${filter.version} has fallen back to a uniform choice`
      : uniform ? `Version ${filter.version} is acting and chooses uniformly` : `Version ${filter.version} is acting`;
    const found = drift(filter);
    const standing = filter.alarms.standing.length;
    if (standing) return `${who}; ${kept} kept so far. ${plural(standing, "alarm")} ${standing === 1 ? "stands" : "stand"}.`;
    const tail = { drift: " Scores have drifted from the reference.", none: " Scores agree with the reference.",
      "above once": " The newest scores differ from the reference." }[found.state] || "";
    return `${who}; ${kept} kept so far.${tail}`;
  }

  function tiles(filter) {
    const tile = (name, figure, small, look) =>
      h("div", { class: "card" }, h("dt", {}, name), h("dd", { class: `figure ${look || ""}` }, figure), h("dd", { class: "small" }, small));
    const has = filter && filter.records, found = drift(filter);
    const published = view.versions.length ? view.versions[view.versions.length - 1].version : null;
    const behind = has && published && published > filter.version ? `; version ${published} is published` : "";
    const last = view.rounds[view.rounds.length - 1];
    const agreed = view.rounds.filter((r) => r.agreement && known(r.agreement.rho)).slice(-1)[0];
    const cut = (filter && filter.threshold) || {}, cost = view.cost, acting = actingOf(filter), uniform = acting && acting.strength === 0;
    const alarms = filter ? filter.alarms : { count: 0, standing: [] };
    const words = { none: ["\u25CF no drift", "good"], drift: ["\u25B2 drift", "bad"], "above once": ["\u25B3 above its limit", "bad"], unknown: [DASH, ""] }[found.state];
    return h("dl", { class: "tiles" },
      tile("Acting version", has ? (filter.version ? String(filter.version) : "uniform") : DASH, has ? `${plural(filter.swaps.length - 1, "change")} so far${behind}` : "no records"),
      tile("Version age", has ? plural(filter.age_blocks, "block") : DASH, has && known(filter.age_seconds) ? duration(filter.age_seconds) : "of the stream"),
      tile("Realised keep ratio", has ? percent(filter.kept_ratio, 2) : DASH, filter && known(filter.target_ratio) ? `target ${percent(filter.target_ratio, 2)}` : "target unknown"),
      tile("Score threshold", uniform ? DASH : number(cut.realised, 3), uniform ? "nothing is cut: the choice is uniform" : known(cut.reference)
        ? `${percent(filter.target_ratio, 0)} of the reference lie above ${number(cut.reference, 3)}, of the newest windows above ${number(cut.newest, 3)}` : "no reference to compare with"),
      tile("Drift (PSI)", words[0], found.state === "unknown" ? "no scores to compare" : `${number(found.value, 4)}, limit ${number(found.limit, 4)}; above in ${found.above} of ${found.of}`, words[1]),
      !view.watched && !alarms.count ? tile("Alarms", DASH, "no drift monitor has run; Calibrator.background() runs one") : tile("Alarms", alarms.standing.length ? `\u25B2 ${alarms.standing.length} ${alarms.standing.length === 1 ? "stands" : "stand"}` : "\u25CF none stands", `${plural(alarms.count, "change")} recorded`, alarms.standing.length ? "bad" : "good"),
      tile("Agreement with fresh labels", agreed ? number(agreed.agreement.rho, 3) : DASH, agreed
        ? `${number(agreed.agreement.low, 3)} to ${number(agreed.agreement.high, 3)}, version ${count(agreed.agreement.version)}, round ${count(agreed.round)}` : "no round has measured it"),
      tile("Calibration cost", percent(cost.share), known(cost.share) ? `of training's gradients: ${short(cost.gradients)} of ${short(cost.trained_windows)}`
        : known(cost.gradients) ? `${short(cost.gradients)} window gradients` : "no round has counted its gradients"),
      tile("Last round", last ? (known(last.version) ? `published v${last.version}` : "not published") : "none yet",
        last ? `round ${count(last.round)}${known(last.version) ? "" : `: ${last.verdict.replace(/^Not published: /, "")}`}` : "run Calibrator.round()", last && !known(last.version) ? "bad" : ""));
  }

  function charts(filter) {
    if (!filter || !filter.records)
      return empty("There are no block statistics to draw.", "A filter writes a record to metrics/ in the run directory every 8 blocks; iterate the filtered dataset, or wait for the first record.");
    const box = h("div", { class: "grid" }), s = filter.series, x = s.block, marks = filter.swaps;
    const alarmed = (...kinds) => filter.alarms.events.filter((a) => !kinds.length || kinds.includes(a.kind.split(":")[0]));
    page.append(h("h2", {}, "Over the stream"), box);
    const last = (values) => values.filter(known).slice(-1)[0];
    const any = (values) => values.some(known);
    const axis = (format, more) => ({ x: "block of the stream", format, ...more });
    const plain = (v) => String(+v.toPrecision(3));
    if (any(s.score_mean))
      chart(box, { title: "Scores over the stream", wide: true, x, marks, alarms: alarmed(), format: (v) => number(v, 3), axis: axis(plain),
        summary: `Newest mean score ${number(last(s.score_mean), 3)}, newest mean threshold ${number(last(s.threshold_mean), 3)}.`,
        caption: "Threshold: the lowest score that a block keeps; the band spans its least and greatest value. Dashed verticals: the scorer version changes, and the scale of the scores with it.",
        lines: [
          { label: "greatest threshold", values: s.threshold_max, colour: "--orange", width: 0, quiet: true },
          { label: "least threshold", values: s.threshold_min, colour: "--orange", width: 0, quiet: true },
          { label: "mean score", values: s.score_mean, colour: "--blue" },
          { label: "mean threshold", values: s.threshold_mean, colour: "--orange", dash: [7, 3] },
        ], bands: [[0, 1, "--orange"]] });
    else box.append(empty("No scores yet: every block was chosen uniformly.", "Publish a scorer with Calibrator.round(); scores appear once an interval is ranked by it."));
    const g = filter.histogram;
    if (g) {
      const level = g.windows / g.bins.length, at = g.bins.map((_, i) => i);
      const ends = [0, 16, 32, 48, 64];
      const name = (i) => (g.edges ? number(g.edges[i], 2) : `${Math.round((100 * i) / 64)}%`);
      chart(box, { title: `Newest scores against the reference of version ${g.version}`, x: [...at, 64], range: [0, 64], format: short,
        axis: { x: g.edges ? "score" : "quantile of the reference", format: short, zero: true, most: level * 1.5 },
        ticks: { splits: () => ends, values: () => ends.map(name) },
        summary: `${plural(g.windows, "window")} of blocks ${g.first_block} to ${g.last_block} in 64 bins.`,
        caption: `${plural(g.windows, "window")} of blocks ${count(g.first_block)} to ${count(g.last_block)}. Each bin holds 1/64 of the reference, so without drift every bar ends at the dashed line; the outer bins are open.`,
        lines: [
          { label: "dropped", values: [...g.bins, null], colour: "--pale", fill: true, bars: true, silent: true },
          { label: "kept", values: [...(g.kept_bins || g.bins.map(() => 0)), null], colour: "--blue", fill: true, bars: true, silent: true },
          { label: "reference", values: [...at, 64].map(() => level), colour: "--orange", dash: [6, 4], silent: true },
        ] });
    } else box.append(empty("No histogram: the acting version stores no reference quantiles, or scored nothing yet.", "Scorers that a calibration round fits have a reference; publish one."));
    for (const [title, field, what, kinds, words] of [
      ["Drift: population stability index", "psi", "PSI", ["psi"], "Scores against the reference of their version, in nats."],
      ["Drift: Kolmogorov\u2013Smirnov distance", "ks", "KS", ["ks"], "Largest gap between the distribution functions of scores and reference."],
      ["Drift: Wasserstein distance", "wasserstein", "distance", ["mean"], "How far the scores moved from their reference, in units of the score."]]) {
      if (!any(s[field])) continue;
      const limit = s[field + "_limit"], rare = field === "wasserstein" ? "500" : "1,000";
      chart(box, { title, x, marks, alarms: alarmed(...kinds), format: (v) => number(v, 4), axis: axis(plain, { zero: true }),
        summary: `Newest value ${number(last(s[field]), 4)}, limit ${number(last(limit), 4)}.`,
        caption: `${words} Above the limit once in ${rare} records if nothing changed.`,
        lines: [{ label: what, values: s[field], colour: "--blue" }, { label: "limit", values: limit, colour: "--orange", dash: [6, 4] }] });
    }
    const features = Object.entries(filter.features).filter(([, f]) => f.deviation > 0 && any(f.series)).slice(0, LOOKS.length);
    if (features.length)
      chart(box, { title: "Features of the windows", x, marks, alarms: alarmed("feature"), format: (v) => number(v, 2), axis: axis(plain),
        summary: features.map(([name, f]) => `${name}: ${number(f.shift, 2)}`).join(", ") + ".",
        caption: "Mean of each feature, in its standard deviations from the mean of all records; the table below has the numbers.",
        lines: features.map(([name, f], i) => ({ label: name, values: f.series.map((v) => (known(v) ? (v - f.mean) / f.deviation : null)), colour: LOOKS[i][0], dash: LOOKS[i][1] })) });
    for (const [key, labels] of Object.entries(filter.groups)) {
      const drawn = labels.filter((l) => l.share);
      chart(box, { title: `Kept share per ${key}`, x, marks, format: (v) => percent(v), axis: axis((v) => percent(v, 0), { zero: true }),
        summary: drawn.map((l) => `${l.label}: ${percent(l.kept / l.seen)}`).join(", ") + ".",
        caption: labels.length > drawn.length ? `The ${drawn.length} largest of ${labels.length}; the table below has all.` : "Share of the windows of each that is kept.",
        lines: drawn.map((l, i) => ({ label: l.label, values: l.share, colour: LOOKS[i % 6][0], dash: LOOKS[i % 6][1] })) });
    }
    const target = known(filter.target_ratio) ? [{ label: "target", values: x.map(() => filter.target_ratio), colour: "--orange", dash: [6, 4] }] : [];
    chart(box, { title: "Realised keep ratio", x, marks, alarms: alarmed("keep_ratio"), format: (v) => percent(v, 2), axis: axis((v) => percent(v, 1)),
      summary: `${percent(filter.kept_ratio, 2)} over all records.`, caption: "Windows kept of windows seen, record by record.",
      lines: [{ label: "kept", values: s.kept_ratio, colour: "--blue" }, ...target] });
    if (any(s.us_per_window))
      chart(box, { title: "Scoring cost", x, marks, format: (v) => `${number(v, 2)} \u00B5s`, axis: axis((v) => `${short(v)} \u00B5s`, { zero: true }),
        summary: `Newest ${number(last(s.us_per_window), 2)} microseconds a window.`, caption: "Microseconds of scoring per window, in the process that reads.",
        lines: [{ label: "per window", values: s.us_per_window, colour: "--blue" }] });
    return null;
  }

  function roundCharts() {
    const rounds = view.rounds, x = rounds.map((r) => r.round), of = (get) => rounds.map((r) => { const v = get(r); return known(v) ? v : null; });
    const agreement = of((r) => r.agreement && r.agreement.rho), reliability = of((r) => r.reliability), unseen = of((r) => r.rank_correlation);
    if (x.length < 2 || !x.every((r, i) => typeof r === "number" && (!i || r > x[i - 1])) || ![...agreement, ...reliability, ...unseen].some(known)) return null;
    const box = h("div", { class: "grid" }), last = (values) => values.filter(known).slice(-1)[0];
    page.append(h("h2", {}, "From round to round"), box);
    chart(box, { title: "Agreement of the scorer with fresh labels", wide: true, x, format: (v) => number(v, 3),
      axis: { x: "calibration round", format: (v) => String(+v.toPrecision(2)), zero: true, most: 1 },
      ticks: { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], values: (u, splits) => splits.map((s) => (Number.isInteger(s) ? String(s) : "")) },
      summary: `Newest agreement ${number(last(agreement), 3)}, newest reliability ${number(last(reliability), 3)}.`,
      caption: "Agreement: rank correlation of the running version with labels measured anew on windows that stay the same; the band is its 95 % interval. Reliability: of one half of the labels with the other. Unseen: of the new scorer with labels that its fit has not seen.",
      lines: [
        { label: "high", values: of((r) => r.agreement && r.agreement.high), colour: "--blue", width: 0, quiet: true },
        { label: "low", values: of((r) => r.agreement && r.agreement.low), colour: "--blue", width: 0, quiet: true },
        { label: "agreement", values: agreement, colour: "--blue", dots: true },
        { label: "label reliability", values: reliability, colour: "--orange", dash: [7, 3], dots: true },
        { label: "unseen labels", values: unseen, colour: "--green", dash: [2, 3], dots: true },
      ], bands: [[0, 1, "--blue"]] });
    return box;
  }

  function validationChart() {
    const { steps, losses } = view.validation;
    if (steps.length < 2) return;
    const box = h("div", { class: "grid" }), falls = view.versions.filter((v) => known(v.fallback_step)).map((v) => ({ block: v.fallback_step, state: "raised" }));
    page.append(h("h2", {}, "Over training"), box);
    chart(box, { title: "Live validation loss", wide: true, x: steps, alarms: falls, format: (v) => number(v, 4), axis: { x: "training step", format: (v) => String(+v.toPrecision(4)) },
      summary: `Newest loss ${number(losses[losses.length - 1], 4)} at step ${count(steps[steps.length - 1])}.`,
      caption: "As training records it. Where it breaks its trend, selection falls back to a uniform choice until a round publishes again.",
      lines: [{ label: "loss", values: losses, colour: "--blue" }] });
  }

  // Columns whose name starts with "<" hold text.
  function table(caption, head, rows) {
    const prose = head.map((name) => name.startsWith("<"));
    return h("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": caption },
      h("table", {}, h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: prose[i] ? "left" : null }, name.replace("<", ""))))),
        h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => (i ? h("td", { class: prose[i] ? "left prose" : null }, cell) : h("th", { scope: "row" }, cell))))))));
  }

  const armName = (arm) => (arm.running ? `version ${arm.version} as it runs` : strength(arm.strength));
  const share = (s) => (s && known(s.source) ? ` \u2717 starves ${s.source} (${percent(s.before)} to ${percent(s.after)})` : "");
  const objection = (arm) => (arm.broken_guard ? ` \u2717 guard ${arm.broken_guard} gets worse` : share(arm.starved))
    + (arm.running && arm.harmful ? " \u2717 loses to uniform" : "");
  function arms(gate) {
    if (!gate || !gate.arms.length) return DASH;
    const lines = gate.arms.map((arm) => {
      const chosen = arm.strength === gate.chosen && !arm.running;
      return h("div", { class: chosen ? "chosen" : null }, `${armName(arm)}: ${signed(arm.gain)} \u00B1 ${number(arm.standard_error, 4)}${chosen ? " \u2713 chosen" : objection(arm)}`);
    });
    if (gate.chosen === 0) lines.push(h("div", { class: "chosen" }, "uniform \u2713 chosen"));
    if (known(gate.bar)) lines.push(h("div", { class: "small" }, `${plural(gate.pairs, "pair")}; a gain counts from ${number(gate.bar, 1)} standard errors`));
    return lines;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function sparkline(values, name) {
    const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
    const svg = document.createElementNS(SVG, "svg"), line = document.createElementNS(SVG, "polyline");
    const at = values.map((v, i) => `${((300 * i) / Math.max(values.length - 1, 1)).toFixed(1)},${(35 - (32 * (v - low)) / span).toFixed(1)}`);
    for (const [key, value] of Object.entries({ viewBox: "0 0 300 38", class: "spark", role: "img", preserveAspectRatio: "none", "aria-label": `${name}, from ${short(low)} to ${short(high)}` }))
      svg.setAttribute(key, value);
    for (const [key, value] of Object.entries({ points: at.join(" "), fill: "none", "vector-effect": "non-scaling-stroke" })) line.setAttribute(key, value);
    svg.append(line);
    return h("div", { class: "channel" }, h("span", { class: "small" }, `${name}: ${short(low)} to ${short(high)}`), svg);
  }

  function examples(found) {
    if (!found) return [];
    if (found.missing) return [h("h2", {}, "Example windows"), empty(`There are no windows to show: ${found.missing}.`)];
    const one = (e) => h("li", {}, h("p", { class: "small" }, h("b", {}, number(e.score, 3)), `scores higher than ${percent(e.share)} of the windows`),
      e.series ? e.series.map((values, i) => sparkline(values, `channel ${i}`)) : h("div", { class: "text", dir: "auto" }, String(e.text)));
    const list = (items) => h("ul", { class: "card examples" }, items.map(one));
    const said = `${plural(found.windows, "window")}, ${found.origin}, as version ${found.version} scores them.`;
    return [h("h2", {}, "Windows with the highest scores"), h("p", { class: "small" }, said), list(found.high),
      ...(found.low.length ? [h("h2", {}, "Windows with the lowest scores"), list(found.low)] : [])];
  }

  // What retraining found: of classes whose share was tilted, or of random halves.
  function retrained(check) {
    const classes = Array.isArray(check.classes) ? check.classes : [];
    const facts = [["sign agreement", percent(check.sign_agreement, 0)], ["ceiling", number(check.ceiling, 3)]].filter(([, v]) => v !== DASH);
    return [...facts.map(([name, v]) => h("div", {}, `${name} ${v}`)),
      ...classes.map((c) => h("div", { class: "small" }, `${c.name} (${percent(c.share)}): label ${number(c.predicted, 3)}, effect ${signed(c.effect)} \u00B1 ${number(c.standard_error, 4)}`))];
  }

  const total = (parts) => Object.values(parts || {}).reduce((a, b) => a + (typeof b === "number" ? b : 0), 0);
  function outcome(round) {
    const reason = round.reason || "";
    if (known(round.version))
      return [h("span", { class: "good" }, `\u2713 published version ${round.version}`), reason !== "published" ? h("div", { class: "small" }, reason) : null].filter(Boolean);
    return [h("span", { class: "bad" }, `\u2717 ${round.verdict}`), reason && reason !== round.verdict ? h("div", { class: "small" }, reason) : null].filter(Boolean);
  }

  function tables(filter) {
    const parts = [];
    for (const [key, labels] of Object.entries((filter && filter.groups) || {}))
      parts.push(h("h2", {}, `Groups: ${key}`), table(`Kept share per ${key}`, [key, "seen", "kept", "<kept share"], labels.map((l) => {
        const bar = h("i"), share = l.seen ? l.kept / l.seen : 0;
        bar.style.width = `${100 * share}%`;
        return [l.label, count(l.seen), count(l.kept), [h("span", { class: "meter", "aria-hidden": "true" }, bar), percent(share)]];
      })));
    const features = Object.entries((filter && filter.features) || {});
    if (features.length)
      parts.push(h("h2", {}, "Features of the windows"), table("Features", ["feature", "mean", "standard deviation", "newest mean", "shift (sd)"],
        features.map(([name, f]) => [name, number(f.mean, 4), number(f.deviation, 4), number(f.newest_mean, 4), number(f.shift, 3)])));
    const alarms = filter ? filter.alarms : null;
    if (alarms && alarms.events.length)
      parts.push(h("h2", {}, "Alarms"), alarms.count > alarms.events.length ? h("p", { class: "small" }, `The newest ${alarms.events.length} of ${count(alarms.count)}.`) : null,
        table("Alarms", ["block", "<state", "<what", "version"], [...alarms.events].reverse().map((a) => [count(a.block), h("span", { class: a.state === "raised" ? "bad" : "good" }, a.state === "raised" ? "\u25B2 raised" : "\u25B3 cleared"), a.text, count(a.version)])));
    parts.push(h("h2", {}, "Versions"), view.versions.length
      ? table("Published versions", ["version", "round", "<state", "labels", "reliability", "rank correlation", "strength", "<gate: gain over uniform, nats/token"],
          [...view.versions].reverse().map((v) => [count(v.version), count(v.round), known(v.fallback) ? [v.state, h("div", { class: "bad" }, `fallback: ${typeof v.fallback === "string" ? v.fallback : JSON.stringify(v.fallback)}`)] : v.state, count(v.labels), number(v.reliability, 3), number(v.rank_correlation, 3), strength(v.strength), known(v.fallback) ? DASH : arms(v.gate)]))
      : empty("No version is published yet: the filter keeps a uniform choice.", "Run a calibration round: Calibrator(run_dir, ...).round()."));
    parts.push(h("h2", {}, "Calibration rounds"), view.rounds.length
      ? table("Calibration rounds", ["round", "<outcome", "<gate: gain over uniform, nats/token", "<agreement with fresh labels", "reliability", "unseen labels", "labels", "training step", "seconds", "gradients"],
          [...view.rounds].reverse().map((r) => [count(r.round), outcome(r), arms(r.gate), r.agreement && known(r.agreement.rho) ? `${number(r.agreement.rho, 3)} (${number(r.agreement.low, 3)} to ${number(r.agreement.high, 3)}), version ${count(r.agreement.version)}` : DASH,
            number(r.reliability, 3), number(r.rank_correlation, 3), count(r.labels), count(r.live_step), number(total(r.seconds), 1), Object.keys(r.gradients || {}).length ? short(total(r.gradients)) : DASH]))
      : empty("No calibration round has ended yet.", "A round takes minutes; Calibrator.background() runs them beside training."));
    if (view.rejected.length)
      parts.push(h("h2", {}, "Rejected candidates"), table("Rejected candidates", ["round", "<why", "reliability", "<gate: gain over uniform, nats/token"],
        [...view.rejected].reverse().map((r) => [count(r.round), [h("div", {}, r.verdict), r.detail ? h("div", { class: "small" }, r.detail) : null].filter(Boolean), number(r.reliability, 3), arms(r.gate)])));
    if (filter && filter.intervals.length)
      parts.push(h("h2", {}, "Ledger"), table("Ledger", ["intervals", "version"], [...filter.intervals].reverse().map((i) => [i.first === i.last ? count(i.first) : `${count(i.first)} to ${count(i.last)}`, i.version ? count(i.version) : "uniform"])));
    if (view.checks.length)
      parts.push(h("h2", {}, "Are the labels right? Retraining says"), table("Checks of labels by retraining", ["check", "<kind", "split half", "<validity", "<found", "training step"],
        [...view.checks].reverse().map((c) => [c.name, c.kind === "lds" ? "random halves" : c.kind === "tilt" ? "tilted classes" : String(c.kind), number(c.reliability, 3),
          `${number(c.validity, 3)}${known(c.low) ? ` (${number(c.low, 3)} to ${number(c.high, 3)})` : ""}`, retrained(c), count(c.live_step)])));
    parts.push(...examples(view.examples));
    return parts.filter(known);
  }

  function render(next) {
    view = next;
    plots.forEach(({ u }) => u.destroy());
    plots = [];
    const names = Object.keys(view.filters), at = scrollY;
    if (!names.includes(selected)) selected = names.reduce((a, b) => (a && view.filters[a].windows >= view.filters[b].windows ? a : b), null);
    const filter = selected === null ? null : view.filters[selected];
    status = live ? h("span", { role: "status" }, statusText) : null;
    page.replaceChildren(h("header", {}, h("p", { class: "over" }, h("span", {}, `metagrad-filter \u00B7 ${view.run}`), status), h("h1", {}, headline(filter))));
    if (view.problems.length)
      page.append(h("div", { class: "card note" }, h("strong", {}, `\u25B2 ${plural(view.problems.length, "part")} of the run cannot be read`), h("ul", {}, view.problems.slice(0, 20).map((p) => h("li", {}, p)))));
    if (names.length > 1)
      page.append(h("nav", { "aria-label": "Filters of this run" }, names.map((name) => {
        const button = h("button", { type: "button", "aria-pressed": String(name === selected) }, name);
        button.addEventListener("click", () => { selected = name; render(view); });
        return button;
      })));
    page.append(tiles(filter));
    if (filter && filter.alarms.standing.length)
      page.append(h("div", { class: "card note standing" }, h("strong", {}, "\u25B2 Alarms that stand"), h("ul", {}, filter.alarms.standing.map((a) => h("li", {}, `Since block ${count(a.block)}: ${a.text}`)))));
    const missing = charts(filter);
    if (missing) page.append(h("h2", {}, "Over the stream"), missing);
    roundCharts();
    validationChart();
    page.append(...tables(filter));
    const sum = filter && filter.records ? `${plural(filter.records, "record")} of filter ${selected}. ` : "";
    page.append(h("footer", {}, `${sum}Charts: drag to zoom, double-click for all. Times are information only; block numbers are what a run is reproducible by.`));
    scrollTo(0, at);
  }

  const redraw = () => plots.forEach((p) => { p.u.destroy(); p.u = p.draw(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; plots.forEach((p) => p.u.setSize({ width: Math.max(p.plot.clientWidth, 120), height: 230 })); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view && render(view));
  addEventListener("beforeprint", redraw);
  render(JSON.parse(document.getElementById("view").textContent));

  if (live) {
    const say = (text) => { statusText = text; if (status) status.textContent = text; };
    const events = new EventSource("events");
    events.addEventListener("view", (event) => { statusText = `live \u00B7 updated ${new Date().toLocaleTimeString()}`; render(JSON.parse(event.data)); });
    events.addEventListener("problem", (event) => say(`\u25B2 ${event.data}`));
    events.addEventListener("error", () => say("\u25B2 connection lost, trying again"));
    events.addEventListener("open", () => say("live"));
  }
})();
