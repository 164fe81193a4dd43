"use strict";
// Draws the curves and the histograms of the page, and fetches a served page anew.

const PALETTE = 8;
const DASH = [8, 5];
let over = "step";
let plots = [];

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toPrecision(4);
}

function axis(size) {
  return {
    stroke: color("--quiet"), grid: { stroke: color("--grid"), width: 1 },
    ticks: { stroke: color("--grid"), width: 1 }, size,
    values: (plot, splits) => splits.map((split) => (split === null ? "" : shortened(split))),
  };
}

function shortened(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(4));
}

// Each series has x of its own: the runs are laid over each other at the x that they share.
function joined(page, series) {
  const tables = series.map((each) => {
    const x = page.axes[each.run][each.axis][over];
    const at = new Map();
    x.forEach((value, index) => { if (value !== null) at.set(value, each.values[index]); });
    const sorted = [...at.keys()].sort((one, other) => one - other);
    return [sorted, sorted.map((value) => at.get(value))];
  });
  return uPlot.join(tables);
}

function drawChart(element, page, chart) {
  const several = page.runs.length > 1;
  const data = joined(page, chart.series);
  if (data[0].length === 0) return;
  const few = data[0].length <= 30;
  // A figure and the same of held-out data have one colour.
  const kindOf = (each) => each.name.replace(/, held out$/, "");
  const names = [...new Set(chart.series.map(kindOf))];
  const series = chart.series.map((each) => {
    const kind = names.indexOf(kindOf(each));
    const paint = color(`--c${(several ? each.run : kind) % PALETTE}`);
    const dashed = each.axis === "eval" || (several && kind > 0);
    return {
      label: several ? `${page.runs[each.run]}: ${each.name}` : each.name,
      stroke: paint, width: 2, dash: dashed ? DASH : undefined, spanGaps: true,
      points: { show: few || each.axis === "eval", size: 6, fill: paint },
      value: (plot, value) => shown(value),
    };
  });
  const plot = new uPlot({
    width: element.clientWidth, height: 240, series: [
      { label: over, value: (plot, value) => shown(value) }, ...series,
    ],
    scales: { x: { time: false } }, axes: [axis(34), axis(58)],
    cursor: { sync: { key: over }, drag: { x: true, y: false } },
    hooks: { setSeries: [sayWhatIsShown] },
  }, data, element);
  switchByKeyboard(plot);
  plots.push(plot);
}

// uPlot's legend shows and hides a series by the mouse alone.
function switchByKeyboard(plot) {
  plot.root.querySelectorAll(".u-legend .u-series th").forEach((label, index) => {
    if (index === 0) return;  // the axis
    label.tabIndex = 0;
    label.setAttribute("role", "switch");
    label.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      plot.setSeries(index, { show: !plot.series[index].show });
    });
  });
  sayWhatIsShown(plot);
}

function sayWhatIsShown(plot) {
  plot.root.querySelectorAll("[role=switch]").forEach((label, index) => {
    label.setAttribute("aria-checked", String(plot.series[index + 1].show));
  });
}

function drawHistogram(element) {
  const [from, to, counts] = JSON.parse(element.dataset.histogram);
  const width = (to - from) / counts.length;
  const isPoint = width === 0;
  const x = isPoint ? [from] : counts.map((_, bin) => from + (bin + 0.5) * width);
  const y = isPoint ? [counts.reduce((sum, count) => sum + count, 0)] : counts;
  const half = isPoint ? 1 : width / 2;
  plots.push(new uPlot({
    width: element.clientWidth, height: 150, legend: { show: false },
    scales: { x: { time: false, range: () => [x[0] - half, x[x.length - 1] + half] },
              y: { range: (plot, least, most) => [0, most * 1.05] } },
    axes: [axis(30), axis(50)], cursor: { show: false },
    series: [{}, { fill: color("--c0"), stroke: color("--c0"), width: 0, points: { show: false },
                   paths: uPlot.paths.bars({ size: [0.92] }) }],
  }, [x, y], element));
}

function draw() {
  const holder = document.getElementById("chart-data");
  if (!holder) return;
  const page = JSON.parse(holder.textContent);
  plots.forEach((plot) => plot.destroy());
  plots = [];
  document.querySelectorAll("[data-chart]").forEach((element) => {
    drawChart(element, page, page.charts[Number(element.dataset.chart)]);
  });
  document.querySelectorAll("[data-histogram]").forEach(drawHistogram);
}

function listen() {
  document.querySelectorAll("[data-axis]").forEach((button) => {
    button.setAttribute("aria-pressed", String(button.dataset.axis === over));
    button.addEventListener("click", () => {
      over = button.dataset.axis;
      document.querySelectorAll("[data-axis]").forEach((each) => {
        each.setAttribute("aria-pressed", String(each === button));
      });
      draw();
    });
  });
}

// A served page: what is new takes the place of what is there; what is open or chosen stays so.
async function refresh(seconds) {
  const again = () => setTimeout(() => refresh(seconds), seconds * 1000);
  try {
    const isBusy = document.hidden || document.activeElement?.closest("form, .plot");
    if (isBusy) return;
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) return;
    const news = new DOMParser().parseFromString(await answer.text(), "text/html");
    const opened = [...document.querySelectorAll("details")].map((each) => each.open);
    const chosen = new Set([...document.querySelectorAll("input:checked")].map((each) => each.value));
    const holder = document.getElementById("chart-data");
    const newHolder = news.getElementById("chart-data");
    if (holder && newHolder) holder.textContent = newHolder.textContent;
    document.getElementById("main").replaceWith(document.adoptNode(news.getElementById("main")));
    const details = document.querySelectorAll("details");
    if (details.length === opened.length) {
      details.forEach((each, index) => { each.open = opened[index]; });
    }
    document.querySelectorAll("input[type=checkbox]").forEach((each) => {
      each.checked = chosen.has(each.value);
    });
    listen();
    draw();
  } catch (error) {
    // The server is gone: the page stays as it was, and asks again.
  } finally {
    again();
  }
}

let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(draw, 150); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
listen();
draw();
if (document.body.dataset.refresh) {
  const seconds = Number(document.body.dataset.refresh);
  setTimeout(() => refresh(seconds), seconds * 1000);
}
