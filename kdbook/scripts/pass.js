/* A map of the loss, a line between two places that can be dragged, and its barrier. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // How far the highest point rises above the straight line between both ends
  function barrier(heights) {
    const last = heights.length - 1;
    return heights.reduce((most, h, k) => {
      const straight = heights[0] + (k / last) * (heights[last] - heights[0]);
      return Math.max(most, h - straight);
    }, 0);
  }
  kd.pass = { barrier };

  const STEPS = 80;

  kd.kinds.pass = function (stage, data) {
    const { finer, between, contour, shade } = kd.landscape;
    const nx = 2 * data.xs.length - 1,
      ny = 2 * data.ys.length - 1;
    const z = finer(data.heights.flat(), data.xs.length, data.ys.length);
    const low = Math.min(...z),
      high = Math.max(...z);
    const W = 380,
      H = 320;
    const u = kd.mapped(data.xs[0], data.xs[data.xs.length - 1], 0, 1);
    const v = kd.mapped(data.ys[0], data.ys[data.ys.length - 1], 0, 1);
    const px = (a) => a * W,
      py = (b) => H - b * H;
    const map = kd.canvas(W, H, "Map of the loss"),
      profile = kd.canvas(360, 220, "");
    map.removeAttribute("role");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    const ends = data.ends.map((k) => [u(data.points[k][0]), v(data.points[k][1])]);

    // the map is drawn once: cells from below, contours, the named places
    const wide = W / (nx - 1),
      tall = H / (ny - 1);
    for (let j = 0; j < ny - 1; j++) {
      for (let i = 0; i < nx - 1; i++) {
        const k = j * nx + i;
        const mean = (z[k] + z[k + 1] + z[k + nx] + z[k + nx + 1]) / 4;
        map.append(
          kd.svg("rect", {
            x: i * wide,
            y: H - (j + 1) * tall,
            width: wide + 0.4,
            height: tall + 0.4,
            fill: shade((mean - low) / (high - low), 1),
          }),
        );
      }
    }
    for (let n = 1; n < 12; n++) {
      const d = contour(z, nx, ny, low + (high - low) * (n / 12) ** 2)
        .map(([a, b, c, e]) => `M${px(a)} ${py(b)}L${px(c)} ${py(e)}`)
        .join("");
      map.append(
        kd.svg("path", {
          d,
          fill: "none",
          stroke: "#ffffff",
          "stroke-opacity": 0.55,
          "stroke-width": 0.8,
        }),
      );
    }
    data.points.forEach(function ([x, y], k) {
      const a = px(u(x)),
        b = py(v(y)),
        right = a > 0.7 * W;
      map.append(
        kd.svg("circle", { cx: a, cy: b, r: 5, fill: "#ffffff", stroke: "#000000" }),
        kd.svg(
          "text",
          {
            x: a + (right ? -8 : 8),
            y: b - 10,
            "font-size": 13,
            "text-anchor": right ? "end" : "start",
            fill: "#ffffff",
            stroke: "#000000",
            "stroke-width": 3,
            "paint-order": "stroke",
          },
          data.names[k],
        ),
      );
    });
    const line = map.appendChild(
      kd.svg("line", { stroke: "#d55e00", "stroke-width": 3 }),
    );
    const knobs = ends.map(function (end, k) {
      const knob = map.appendChild(
        kd.svg("circle", {
          r: 9,
          fill: "#d55e00",
          stroke: "#ffffff",
          "stroke-width": 2,
          tabindex: 0,
          role: "slider",
          class: "kd-knob",
          "aria-label": k ? "end of the line" : "start of the line",
          "data-lm-suppress-shortcuts": "true",
        }),
      );
      const set = (a, b) => {
        ends[k] = [kd.clamp(a, 0, 1), kd.clamp(b, 0, 1)];
        draw();
      };
      kd.draggable(
        map,
        knob,
        (x, y) => set(x / W, (H - y) / H),
        (dx, dy) => set(ends[k][0] + 0.02 * dx, ends[k][1] + 0.02 * dy),
      );
      return knob;
    });
    stage.append(
      kd.node(
        "div",
        { class: "kd-parts" },
        kd.part("Loss on the plane: drag the ends of the line", map),
        kd.part("Loss along the line", profile),
      ),
      facts,
    );

    function draw() {
      const { colors, line: faint } = kd.theme(stage);
      const [[a, b], [c, d]] = ends;
      [
        ["x1", px(a)],
        ["y1", py(b)],
        ["x2", px(c)],
        ["y2", py(d)],
      ].forEach(([name, value]) => line.setAttribute(name, value));
      const heights = Array.from({ length: STEPS + 1 }, (_, k) =>
        between(z, nx, ny, a + (k / STEPS) * (c - a), b + (k / STEPS) * (d - b)),
      );
      const x = kd.mapped(0, STEPS, 8, 352),
        y = kd.mapped(0, high, 204, 14);
      const path = heights.map((h, k) => `${k ? "L" : "M"}${x(k)} ${y(h)}`).join("");
      profile.replaceChildren(
        kd.svg("line", { x1: 8, x2: 352, y1: y(0), y2: y(0), stroke: faint }),
        kd.svg("line", {
          x1: x(0),
          y1: y(heights[0]),
          x2: x(STEPS),
          y2: y(heights[STEPS]),
          stroke: "currentColor",
          "stroke-dasharray": "4 4",
        }),
        kd.svg("path", { d: path, fill: "none", stroke: colors[1], "stroke-width": 3 }),
      );
      const rise = barrier(heights);
      facts.textContent =
        `From ${kd.fixed(heights[0], 2)} to ` +
        `${kd.fixed(heights[STEPS], 2)}; the barrier between is ${kd.fixed(rise, 2)}.`;
      profile.setAttribute("aria-label", facts.textContent);
      ends.forEach(function ([e, f], k) {
        knobs[k].setAttribute("cx", px(e));
        knobs[k].setAttribute("cy", py(f));
        knobs[k].setAttribute("aria-valuenow", kd.fixed(e, 2));
        knobs[k].setAttribute(
          "aria-valuetext",
          `${kd.fixed(e, 2)}, ${kd.fixed(f, 2)}, loss ` +
            kd.fixed(heights[k ? STEPS : 0], 2),
        );
      });
    }
    kd.onTheme(draw);
    draw();
  };
})();
