"use strict";
// Values under the pointer: a chart's points come with their positions, so that nothing is scaled here.
const tip = document.getElementById("tip");
const element = (name, properties, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

for (const chart of document.querySelectorAll("figure.chart")) {
  const { x: unit, lines, names } = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot");
  const strokes = chart.querySelectorAll("polyline");
  const stops = [...new Set(lines.flat().map((point) => point[0]))].sort((a, b) => a - b);
  let overlay = [];
  let at = null;

  const hide = () => {
    overlay.forEach((one) => one.remove());
    overlay = [];
    tip.hidden = true;
    at = null;
  };
  const show = (x) => {
    hide();
    at = x;
    const found = lines.map((points) => nearest(points, x));
    const cursor = element("i", { className: "cursor" });
    cursor.style.left = `${100 * nearest(found, x)[0]}%`;
    overlay = [cursor, ...found.map(([left, bottom], i) => {
      const mark = element("i", { className: "mark" });
      mark.style.cssText = `left:${100 * left}%;bottom:${100 * bottom}%;--line:${getComputedStyle(strokes[i]).stroke}`;
      return mark;
    })];
    plot.append(...overlay);
    const swatches = chart.querySelectorAll(".legend .swatch");
    const rows = found.map(([, , step, value], i) => element("tr", {},
      element("td", {}, swatches[i] ? swatches[i].cloneNode(true) : ""),
      element("td", { textContent: names[i] }),
      element("td", { className: "n", textContent: value }),
      element("td", { className: "n quiet", textContent: step })));
    const head = ["", "", chart.querySelector("figcaption").firstChild.textContent.trim(), unit];
    const cells = head.map((textContent, i) => element("th", { textContent, className: i > 1 ? "n quiet" : "" }));
    tip.replaceChildren(element("table", {}, element("tr", {}, ...cells), ...rows));
    tip.hidden = false;
    const box = plot.getBoundingClientRect();
    const right = Math.min(box.left + x * box.width + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const beside = x > 0.5 ? box.left + x * box.width - tip.offsetWidth - 14 : right;
    tip.style.left = `${window.scrollX + Math.max(8, beside)}px`;
    tip.style.top = `${window.scrollY + Math.max(8, box.top - (box.width < 500 ? tip.offsetHeight + 6 : -10))}px`;
  };
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = at === null ? (step > 0 ? -1 : stops.length) : stops.indexOf(nearest(stops.map((s) => [s]), at)[0]);
    show(stops[Math.min(stops.length - 1, Math.max(0, now + step))]);
  });
}
