"""Style and script of the page. They stand in it, so that one file is all there is to send."""

STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#fff, #16181c); --ink: light-dark(#1c2024, #e6e8eb);
  --soft: light-dark(#5c6570, #9aa4b0); --line: light-dark(#dde1e6, #343a42); --card: light-dark(#f6f7f9, #1e2126);
  --run0: light-dark(#0067b3, #56b4e9); --run1: light-dark(#c44e00, #ff9f4a); --run2: light-dark(#00805c, #35c99a);
  --run3: light-dark(#a8408a, #e59ac8); --run4: light-dark(#7a6a00, #e3d24a); --run5: light-dark(#5b4bb5, #a79cf5);
  --run6: light-dark(#8a2b2b, #f08080); --run7: light-dark(#40545f, #a9c0cc); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: baseline; padding: 1.25rem 0 .75rem;
  border-bottom: 1px solid var(--line); }
h1 { font-size: 1.5rem; margin: 0; flex: 1 1 auto; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .35rem; overflow-wrap: anywhere; }
p { margin: .35rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: 0 .9rem; } a { color: var(--run0); }
button, select { font: inherit; font-size: .875rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .35rem; padding: .25rem .5rem; max-width: 100%; }
button { cursor: pointer; }
:focus-visible, .slider:has(:focus-visible) { outline: 3px solid var(--run0); outline-offset: 2px; }
span.key { display: inline-block; margin-right: 1.1rem; overflow-wrap: anywhere; }
svg.key { width: 1.8rem; height: .65rem; } .any { stroke: var(--soft); }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: .5rem 0;
  border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: right; padding: .35rem .7rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 7.5rem; }
tr + tr > * { border-top: 1px solid var(--line); }
thead tr > * { background: var(--card) !important; vertical-align: bottom; }
td.best { font-weight: 700; }
.note { border-left: 4px solid var(--run1); padding: .1rem .75rem; overflow-wrap: anywhere; }
.picture { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
  margin: 1rem 0; }
.picture h3 { margin-top: 0; }
.choice { display: flex; justify-content: space-between; gap: .5rem; flex-wrap: wrap; margin-bottom: .5rem; }
.choice label { display: flex; align-items: center; gap: .4rem; max-width: 100%; font-size: .875rem; }
.choice select { min-width: 0; }
.slider { position: relative; margin: 0 auto; border-radius: .35rem; overflow: hidden; background: #000; }
.slider img { display: block; width: 100%; height: auto; }
.slider img + img { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--cut, 50%)); }
.slider i { position: absolute; top: 0; bottom: 0; left: var(--cut, 50%); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.slider i::after { content: "\\2194"; position: absolute; top: 50%; left: 1px; transform: translate(-50%, -50%);
  font: 700 1.1rem/2rem system-ui, sans-serif; width: 2rem; text-align: center; border-radius: 50%;
  background: #fff; color: #222; box-shadow: 0 0 4px #000; }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y; appearance: none; }
.slider input::-webkit-slider-thumb { appearance: none; width: 1px; height: 100%; }
.slider input::-moz-range-thumb { width: 1px; height: 100%; border: 0; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8.5rem, 30%), 1fr));
  gap: .6rem; margin-top: .8rem; }
.strip button { padding: .3rem; text-align: left; display: flex; flex-direction: column; gap: .25rem; }
.strip button[aria-pressed=true] { border-color: var(--run0); box-shadow: 0 0 0 1px var(--run0); }
.strip img { width: 100%; height: auto; border-radius: .2rem; }
.strip span { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.strip small { color: var(--soft); } .strip b { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .9rem; }
.charts figure { margin: 0; padding: .6rem .6rem .3rem; border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; }
.charts figcaption { color: var(--ink); display: flex; justify-content: space-between; gap: .5rem;
  overflow-wrap: anywhere; }
.charts output { display: block; min-height: 2.6em; font-size: .8rem; line-height: 1.3; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.chart { width: 100%; display: block; touch-action: pan-y; } .chart text { font-size: 12px; fill: var(--soft); }
.chart .grid { stroke: var(--line); } .chart .cursor { stroke: var(--soft); stroke-dasharray: 2 3; }
.cursor[hidden] { display: none; }
polyline, svg.key line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
summary { padding: .2rem 0; } .charts { margin-top: .5rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; max-height: 32rem; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font-size: .8rem; line-height: 1.4; }
.ramp { display: inline-block; vertical-align: middle; width: 7rem; height: .7rem; border-radius: .2rem;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
@media print { .slider, .choice, header button { display: none; } }
""" + "".join(f".run{n} {{ stroke: var(--run{n}); }} circle.run{n} {{ fill: var(--run{n}); }}\n" for n in range(8))

SCRIPT = """
"use strict";
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, root = document.documentElement.style;
  root.colorScheme = (root.colorScheme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
});

for (const card of document.querySelectorAll(".picture")) {
  const slider = card.querySelector(".slider"), range = slider.querySelector("input");
  const images = slider.querySelectorAll("img"), selects = card.querySelectorAll("select");
  const buttons = card.querySelectorAll(".strip button");
  const name = side => selects[side].selectedOptions[0].textContent;
  const draw = () => {
    slider.style.setProperty("--cut", range.value + "%");
    range.setAttribute("aria-valuetext", `${range.value} % ${name(0)}, the rest ${name(1)}`);
    selects.forEach((select, side) => {
      const source = buttons[select.value].querySelector("img");
      if (images[side].src !== source.src) images[side].src = source.src;
      images[side].alt = name(side);
    });
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", n == selects[1].value));
  };
  buttons.forEach((button, n) => button.addEventListener("click", () => { selects[1].value = n; draw(); }));
  for (const control of [range, ...selects]) control.addEventListener("input", draw);
  draw();
}

for (const chart of document.querySelectorAll(".chart")) {
  const numbers = name => chart.dataset[name].split(" ").map(Number);
  const [left, right, bottom, top] = numbers("box"), [x0, x1, y0, y1] = numbers("range");
  const lines = [...chart.querySelectorAll("polyline")].map(line => [line.dataset.label,
    line.getAttribute("points").split(" ").map(point => point.split(",").map(Number))]);
  const cursor = chart.querySelector(".cursor"), output = chart.parentElement.querySelector("output");
  const resting = output.textContent;
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect(), width = chart.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / box.width * width;
    const near = lines.map(([label, points]) =>
      [label, points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)]);
    const u = near.reduce((a, b) => Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a)[1][0];
    const value = v => {
      const y = y0 + (bottom - v) / (bottom - top) * (y1 - y0);
      return (chart.dataset.log === "1" ? 10 ** y : y).toPrecision(4);
    };
    output.textContent = `step ${Math.round(x0 + (u - left) / (right - left) * (x1 - x0))}: ` +
      near.filter(([, point]) => Math.abs(point[0] - u) < 3).map(([label, p]) => `${label} ${value(p[1])}`).join(", ");
    cursor.removeAttribute("hidden");
    for (const [key, at] of [["x1", u], ["x2", u], ["y1", top], ["y2", bottom]]) cursor.setAttribute(key, at);
  });
  chart.addEventListener("pointerleave", () => { output.textContent = resting; cursor.setAttribute("hidden", ""); });
}
"""
