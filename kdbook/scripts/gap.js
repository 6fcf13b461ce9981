/* Combined-KD: look for the input where student and teacher differ most, train there. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // A student that agrees with its teacher where it has looked, with straight lines
  // between, and beyond the ends as at the ends
  function interpolated(known, x) {
    const after = known.findIndex(([u]) => u >= x);
    if (after === -1) return known[known.length - 1][1];
    if (after === 0) return known[0][1];
    const [[u, a], [v, b]] = [known[after - 1], known[after]];
    return a + ((b - a) * (x - u)) / (v - u);
  }
  const widest = (xs, teacher, known) =>
    xs.reduce(
      function (best, x, k) {
        const gap = Math.abs(teacher[k] - interpolated(known, x));
        return gap > best[1] ? [k, gap] : best;
      },
      [0, -1],
    );
  kd.gap = { interpolated, widest };

  kd.kinds.gap = function (stage, data) {
    const W = 640,
      H = 240,
      { xs, teacher } = data;
    const x = kd.mapped(xs[0], xs[xs.length - 1], 8, W - 8),
      y = kd.mapped(0, 1, H - 14, 12);
    let known, rounds;
    const picture = kd.canvas(W, H, ""),
      facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    const add = function (k) {
      known = known
        .filter(([u]) => u !== xs[k])
        .concat([[xs[k], teacher[k]]])
        .sort((a, b) => a[0] - b[0]);
      rounds += 1;
      draw();
    };
    const start = function () {
      known = data.known.map((k) => [xs[k], teacher[k]]);
      rounds = 0;
      draw();
    };
    stage.append(
      kd.node(
        "div",
        { class: "kd-row" },
        kd.button("Train at the widest gap", () => add(widest(xs, teacher, known)[0])),
        kd.button("Train at a random place", () =>
          add(Math.floor(Math.random() * xs.length)),
        ),
        kd.button("Reset", start),
      ),
      picture,
      facts,
    );

    function draw() {
      const { colors } = kd.theme(stage),
        [k, gap] = widest(xs, teacher, known);
      const curve = (value) =>
        xs.map((u, i) => `${i ? "L" : "M"}${x(u)} ${y(value(u, i))}`).join("");
      const line = (d, color, dashes) =>
        kd.svg("path", {
          d,
          fill: "none",
          stroke: color,
          "stroke-width": 2.5,
          "stroke-dasharray": dashes,
        });
      picture.replaceChildren(
        kd.svg("line", {
          x1: x(xs[k]),
          x2: x(xs[k]),
          y1: y(teacher[k]),
          y2: y(interpolated(known, xs[k])),
          stroke: "currentColor",
          "stroke-width": 2,
        }),
        line(
          curve((_, i) => teacher[i]),
          colors[0],
        ),
        line(
          curve((u) => interpolated(known, u)),
          colors[1],
          "6 4",
        ),
        ...known.map(([u, v]) =>
          kd.svg("circle", { cx: x(u), cy: y(v), r: 5, fill: colors[1] }),
        ),
      );
      facts.textContent =
        `${rounds} rounds: the widest gap between teacher (line) and ` +
        `student (dashed) is ${kd.fixed(gap, 2)}.`;
      picture.setAttribute("aria-label", facts.textContent);
    }
    kd.onTheme(draw);
    start();
  };
})();
