"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const numbers = (name, kind) => {
    if (!data.columns[name]) return null;
    const bytes = Uint8Array.from(atob(data.columns[name]), (c) => c.charCodeAt(0));
    return kind === "bytes" ? bytes : new Float32Array(bytes.buffer);
  };
  const confidence = numbers("confidence");
  const preference = numbers("preference");
  const bias = numbers("position_bias");
  const noisy = numbers("noisy", "bytes");
  const agreed = numbers("agreed", "bytes");
  const signals = { confidence, consistency: numbers("consistency"), reflection: numbers("reflection"), preference };
  const state = { gamma: data.gamma, eta: data.eta, signal: "confidence", sort: "confidence", down: false, page: 0 };
  const SIZE = 50, BINS = 40, NEAR = 5, WORDS = 600, HEAD = 150, TAIL = 350;
  const whole = (n) => n.toLocaleString("en");
  const rowsOf = (n) => `${whole(n)} ${n === 1 ? "row" : "rows"}`;
  const share = (a, b) => (b ? `${((100 * a) / b).toFixed(1)}%` : "none");

  // As decide() has it: what the page shows and what a run does are the same.
  const decisionOf = (i, eta = state.eta) => {
    const c = confidence[i];
    if (Number.isNaN(c)) return data.rules.failed === "drop" ? "drop" : "keep";
    const kept = c > state.gamma || (data.rules.agreed === "keep" && agreed && agreed[i]);
    if (preference && preference[i] > eta && (!kept || data.rules.correct === "all")) return "replace";
    return kept ? "keep" : "drop";
  };

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // Words that stay, go and come, by the longest common subsequence.
  const difference = (before, after) => {
    const a = before.match(/\S+\s*/g) || [], b = after.match(/\S+\s*/g) || [];
    const made = document.createDocumentFragment();
    if (a.length > WORDS || b.length > WORDS) {
      made.append(element("del", before), " ", element("ins", after));
      return made;
    }
    const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        longest[i][j] = a[i].trim() === b[j].trim() ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i].trim() === b[j].trim()) { made.append(b[j]); i++; j++; }
      else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) made.append(element("del", a[i++]));
      else made.append(element("ins", b[j++]));
    }
    return made;
  };

  let view = null;
  const bars = () => {
    const values = signals[state.signal], counts = { keep: new Array(BINS).fill(0), replace: new Array(BINS).fill(0), drop: new Array(BINS).fill(0) };
    for (let i = 0; i < values.length; i++)
      if (!Number.isNaN(values[i])) counts[decisionOf(i)][Math.min(BINS - 1, Math.floor(values[i] * BINS))]++;
    return Object.entries(counts).flatMap(([decision, rows]) =>
      rows.map((n, bin) => ({ decision, rows: n, from: bin / BINS, to: (bin + 1) / BINS })).filter((bar) => bar.rows));
  };
  const mark = () => (state.signal === "confidence" ? [{ at: state.gamma }] : state.signal === "preference" ? [{ at: state.eta }] : []);

  const draw = () => {
    if (!view) return;
    view.data("bars", bars()).data("mark", mark()).run();
    $("chart").setAttribute("aria-label", `Histogram of ${state.signal}: ${$("counts").textContent}`);
  };

  const start = async () => {
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
    const text = colour("--text"), line = colour("--line"), decisions = preference ? ["keep", "replace", "drop"] : ["keep", "drop"];
    const spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      width: "container", height: 200, background: "transparent",
      config: { axis: { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line }, legend: { labelColor: text, orient: "top" }, view: { stroke: line } },
      layer: [
        { data: { name: "bars", values: bars() }, mark: "bar", encoding: {
          x: { field: "from", type: "quantitative", bin: "binned", scale: { domain: [0, 1] }, title: null }, x2: { field: "to" },
          y: { field: "rows", type: "quantitative", stack: true, title: "rows" },
          color: { field: "decision", type: "nominal", title: null, scale: { domain: decisions, range: decisions.map((d) => colour(`--${d}`)) } },
          tooltip: [{ field: "decision" }, { field: "rows" }, { field: "from", format: ".3f" }, { field: "to", format: ".3f" }] } },
        { data: { name: "mark", values: mark() }, mark: { type: "rule", strokeDash: [4, 4], color: text }, encoding: { x: { field: "at", type: "quantitative" } } },
      ],
    };
    view?.finalize();
    view = (await vegaEmbed("#chart", spec, { actions: false, renderer: "svg" })).view;
    draw();
  };

  const count = () => {
    const counts = { keep: 0, replace: 0, drop: 0 };
    let failed = 0, out = 0, outNoisy = 0, noisyRows = 0;
    for (let i = 0; i < confidence.length; i++) {
      const decision = decisionOf(i);
      counts[decision]++;
      if (Number.isNaN(confidence[i])) failed++;
      if (noisy) { noisyRows += noisy[i]; if (decision !== "keep") { out++; outNoisy += noisy[i]; } }
    }
    const become = data.rules.failed === "drop" ? "dropped" : "kept";
    $("counts").textContent = `${whole(counts.keep)} kept (${share(counts.keep, confidence.length)}), ${whole(counts.drop)} dropped` +
      (preference ? `, ${whole(counts.replace)} replaced` : "") + (failed ? `; ${whole(failed)} without a score ${failed === 1 ? "is" : "are"} ${become}` : "");
    if (noisy) {
      $("noise").hidden = false;
      $("noise").textContent = `Of ${whole(noisyRows)} rows with known noise ${whole(outNoisy)} are not kept (recall ${share(outNoisy, noisyRows)}); ` +
        `of ${whole(out)} rows that are not kept as many have noise (precision ${share(outNoisy, out)}).`;
    }
  };

  // A question may stand first or last; cut between words where there are any.
  const short = (text) => (text.length <= HEAD + TAIL ? text
    : `${text.slice(0, HEAD).replace(/\s\S{0,20}$/, "")} … ${text.slice(-TAIL).replace(/^\S{0,20}\s/, "")}`);
  const item = (row, figures, ...more) => {
    const made = element("li");
    made.append(element("span", `row ${row.i}, ${figures}`, "label"), element("div", short(row.prompt), "text"), ...more);
    return made;
  };
  const changed = (row) => {
    const made = element("div", undefined, "text");
    made.append(difference(row.target, row.candidate));
    return made;
  };
  const ordered = (values, rows) => rows.filter((r) => !Number.isNaN(values[r.i])).sort((a, b) => values[a.i] - values[b.i]);
  const scored = ordered(confidence, data.rows), judged = preference ? ordered(preference, data.rows.filter((r) => r.candidate)) : [];
  const around = (rows, values, cut, above, below, made) => {
    let first = rows.findIndex((row) => values[row.i] > cut);
    if (first < 0) first = rows.length;
    for (const [id, found] of [[above, rows.slice(first, first + NEAR)], [below, rows.slice(Math.max(0, first - NEAR), first).reverse()]])
      $(id).replaceChildren(...(found.length ? found.map(made) : [element("li", "none", "label")]));
  };
  const near = () => {
    const target = (row) => item(row, `confidence ${confidence[row.i].toFixed(4)}`, element("div", `→ ${row.target}`, "text"));
    around(scored, confidence, state.gamma, "above", "below", target);
    const open = judged.filter((row) => decisionOf(row.i, -1) === "replace"); // those that eta decides on
    around(open, preference, state.eta, "eta-above", "eta-below", (row) => item(row, `preference ${preference[row.i].toFixed(4)}`, changed(row)));
  };

  const heads = [["row", "i"], ["confidence", "confidence"], ...(preference ? [["preference", "preference"]] : []), ["decision", "decision"], ["prompt and target", "prompt"]];
  const valueOf = (row, name) => (name === "i" ? row.i : name === "prompt" ? row.prompt : name === "decision" ? decisionOf(row.i) : signals[name][row.i]);
  let shown = [];
  const select = () => {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), wanted = $("decision").value;
    shown = data.rows.filter((row) => (!wanted || decisionOf(row.i) === wanted) &&
      words.every((w) => `${row.prompt}\n${row.target}\n${row.candidate || ""}\n${row.error || ""}`.toLowerCase().includes(w)));
    const sign = state.down ? -1 : 1;
    shown.sort((a, b) => {
      const x = valueOf(a, state.sort), y = valueOf(b, state.sort);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.i - b.i; // without a score: last
      return sign * (x < y ? -1 : x > y ? 1 : 0) || a.i - b.i;
    });
    const last = Math.max(0, Math.ceil(shown.length / SIZE) - 1);
    state.page = Math.min(state.page, last);
    $("found").textContent = rowsOf(shown.length);
    $("page").textContent = `page ${state.page + 1} of ${last + 1}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page === last;
    $("body").replaceChildren(...shown.slice(state.page * SIZE, (state.page + 1) * SIZE).map(line));
  };
  const line = (row) => {
    const made = element("tr"), decision = decisionOf(row.i), text = element("td");
    const number = (v) => element("td", v === undefined || Number.isNaN(v) ? "–" : v.toFixed(3), "number");
    made.append(element("td", row.i, "number"), number(confidence[row.i]), ...(preference ? [number(preference[row.i])] : []), element("td", decision, decision), text);
    text.append(element("div", row.prompt, "text"));
    if (decision === "replace") {
      text.append(element("div", "target, changed", "label"), changed(row));
    } else {
      if (row.target) text.append(element("div", "target", "label"), element("div", row.target, "text"));
      if (row.candidate) text.append(element("div", "candidate", "label"), element("div", row.candidate, "text"));
    }
    if (row.error) text.append(element("div", row.error, "label"));
    if (row.noise) text.append(element("div", `known noise: ${row.noise}`, "label"));
    return made;
  };

  const update = () => { count(); near(); select(); draw(); };
  for (const name of ["gamma", "eta"]) {
    const slider = $(name), number = $(`${name}-number`);
    const set = (value) => {
      if (!(value >= 0 && value <= 1)) return;
      state[name] = value;
      slider.value = value;
      if (document.activeElement !== number) number.value = +value.toFixed(4);
      update();
    };
    slider.addEventListener("input", () => set(+slider.value));
    number.addEventListener("input", () => number.value !== "" && set(+number.value));
    slider.value = state[name];
    number.value = +state[name].toFixed(4);
  }
  for (const [title, name] of heads) {
    const head = element("th", undefined, { i: "number row", prompt: "", decision: "short" }[name] ?? "number"), button = element("button", title);
    button.type = "button";
    head.append(button);
    head.setAttribute("aria-sort", state.sort === name ? "ascending" : "none");
    button.addEventListener("click", () => {
      state.down = state.sort === name && !state.down;
      state.sort = name;
      for (const other of $("heads").children) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      state.page = 0;
      select();
    });
    $("heads").append(head);
  }
  for (const [name, values] of Object.entries(signals)) if (values) $("signal").append(element("option", name));
  $("signal").addEventListener("change", () => { state.signal = $("signal").value; draw(); });
  for (const id of ["search", "decision"]) $(id).addEventListener("input", () => { state.page = 0; select(); });
  $("previous").addEventListener("click", () => { state.page--; select(); });
  $("next").addEventListener("click", () => { state.page++; select(); });
  $("download").addEventListener("click", () => {
    const lines = shown.map((row) => {
      const more = Object.fromEntries(Object.entries(signals).filter(([, v]) => v).map(([n, v]) => [n, Number.isNaN(v[row.i]) ? null : v[row.i]]));
      return JSON.stringify({ row: row.i, prompt: row.prompt, target: row.target, candidate: row.candidate || "", ...more, decision: decisionOf(row.i), error: row.error || "", cut: row.cut });
    });
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n"), "\n"], { type: "application/jsonl" }));
    link.download = "rows.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  for (const part of document.querySelectorAll(".with-candidates")) part.hidden = !preference;
  $("about").textContent = data.about;
  const hints = [];
  if (data.rows.length < confidence.length) hints.push(`The texts of ${whole(data.rows.length)} of ${whole(confidence.length)} rows are in this file, spread evenly over the confidence; all figures are of all rows.`);
  if (data.rows.some((row) => row.cut)) hints.push("Long texts are cut off here, and in the download, whose \"cut\" names them: take whole ones from the dataset by the row's number.");
  $("sampled").textContent = hints.join(" ");
  if (data.failures.length) {
    $("failures-section").hidden = false;
    $("failures").replaceChildren(...data.failures.map(([reason, n]) => element("li", `${rowsOf(n)}: ${reason}`)));
  }
  if (bias) {
    const known = Array.from(bias).filter((b) => !Number.isNaN(b)), mean = (v) => v.reduce((a, b) => a + b, 0) / Math.max(1, v.length);
    const ordersMatter = known.some((b) => b !== 0); // ByConfidence judges either response by itself
    $("judge").textContent = !known.length ? "No candidate was judged." : !ordersMatter
      ? `${whole(known.length)} candidates were judged, each by itself: there is no position to be biased by.`
      : `${whole(known.length)} candidates were judged in both orders. Position bias: ${mean(known).toFixed(3)} on average (1: what stands first always wins, -1: what stands second), ${mean(known.map(Math.abs)).toFixed(3)} without its sign.`;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", start);
  update();
  start();
})();
