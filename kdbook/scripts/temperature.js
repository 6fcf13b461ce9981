/* Logits that can be dragged, a temperature, and the probabilities they make. */
(function () {
  "use strict";
  const kd = window.kdbook;
  const HEIGHT = 210,
    FLOOR = 176,
    TOP = 22,
    REACH = 10;

  function axis(width) {
    return kd.svg("line", {
      x1: 0,
      x2: width,
      y1: FLOOR,
      y2: FLOOR,
      stroke: "currentColor",
      "stroke-opacity": 0.35,
    });
  }

  kd.kinds.temperature = function (stage, data) {
    const logits = data.logits.slice(),
      count = logits.length;
    const width = Math.max(300, 52 * count),
      gap = width / count;
    const middle = (k) => (k + 0.5) * gap;
    const left = kd.canvas(width, HEIGHT, "Logits"),
      right = kd.canvas(width, HEIGHT, "");
    const toY = kd.mapped(-REACH, REACH, FLOOR, TOP),
      toLogit = kd.mapped(FLOOR, TOP, -REACH, REACH);
    const height = (p) => p * (FLOOR - TOP);
    const text = (parent, x, y, words, more) =>
      parent.appendChild(
        kd.svg(
          "text",
          { x, y, "text-anchor": "middle", fill: "currentColor", ...more },
          words,
        ),
      );

    // logits: a knob each, a slider for those who use keys or hear the page
    left.removeAttribute("role");
    left.append(
      kd.svg("line", {
        x1: 0,
        x2: width,
        y1: toY(0),
        y2: toY(0),
        stroke: "currentColor",
        "stroke-opacity": 0.35,
      }),
    );
    const knobs = logits.map(function (_, k) {
      const stem = left.appendChild(
        kd.svg("line", {
          x1: middle(k),
          x2: middle(k),
          y1: toY(0),
          "stroke-width": 5,
          "stroke-opacity": 0.5,
        }),
      );
      const value = text(left, middle(k), 0, "", { "font-size": 12 });
      const knob = left.appendChild(
        kd.svg("circle", {
          cx: middle(k),
          r: 10,
          tabindex: 0,
          role: "slider",
          "aria-label": `logit of ${data.names[k]}`,
          "aria-valuemin": -REACH,
          "aria-valuemax": REACH,
          class: "kd-knob",
          "data-lm-suppress-shortcuts": "true",
        }),
      );
      text(left, middle(k), HEIGHT - 12, data.names[k], { "font-size": 13 });
      kd.draggable(
        left,
        knob,
        (_, y) => set(k, toLogit(y)),
        (dx, dy) => set(k, logits[k] + 0.5 * (dx + dy)),
      );
      return { stem, value, knob };
    });
    function set(k, value) {
      logits[k] = kd.clamp(Math.round(10 * value) / 10, -REACH, REACH);
      draw();
    }

    // probabilities: a bar each, before the people's own if there are any
    right.append(axis(width));
    const human = (data.human || []).map((p, k) =>
      right.appendChild(
        kd.svg("rect", {
          x: middle(k) - 0.42 * gap,
          width: 0.84 * gap,
          y: FLOOR - height(p),
          height: height(p),
          fill: "currentColor",
          "fill-opacity": 0.13,
          stroke: "currentColor",
          "stroke-opacity": 0.5,
          "stroke-dasharray": "4 3",
        }),
      ),
    );
    const bars = logits.map(function (_, k) {
      const bar = right.appendChild(
        kd.svg("rect", { x: middle(k) - 0.27 * gap, width: 0.54 * gap }),
      );
      const share = text(right, middle(k), 0, "", { "font-size": 12 });
      text(right, middle(k), HEIGHT - 12, data.names[k], { "font-size": 13 });
      return { bar, share };
    });

    const heat = kd.slider(
      "temperature",
      {
        min: -1,
        max: 1.3,
        step: 0.01,
        value: Math.log10(data.temperature),
        words: (v) => kd.fixed(10 ** v, 2),
      },
      draw,
    );
    const reset = kd.button("Reset", function () {
      data.logits.forEach((z, k) => {
        logits[k] = z;
      });
      heat.value = Math.log10(data.temperature);
      draw();
    });
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    stage.append(
      kd.node("div", { class: "kd-row" }, heat.element, reset),
      kd.node(
        "div",
        { class: "kd-parts" },
        kd.part("Logits: drag them", left),
        kd.part(
          human.length
            ? "Probabilities, and how people voted (dashed)"
            : "Probabilities",
          right,
        ),
      ),
      facts,
    );

    function draw() {
      const T = 10 ** heat.value,
        p = kd.softmax(logits, T),
        { colors } = kd.theme(stage);
      knobs.forEach(function ({ stem, value, knob }, k) {
        const y = toY(logits[k]);
        stem.setAttribute("y2", y);
        stem.setAttribute("stroke", colors[0]);
        knob.setAttribute("cy", y);
        knob.setAttribute("fill", colors[0]);
        knob.setAttribute("aria-valuenow", logits[k]);
        value.setAttribute("y", y + (logits[k] < 0 ? 25 : -15));
        value.textContent = kd.fixed(logits[k], 1);
      });
      bars.forEach(function ({ bar, share }, k) {
        bar.setAttribute("y", FLOOR - height(p[k]));
        bar.setAttribute("height", height(p[k]));
        bar.setAttribute("fill", colors[1]);
        share.setAttribute(
          "y",
          FLOOR - Math.max(height(p[k]), height((data.human || [])[k] || 0)) - 6,
        );
        share.textContent = `${(100 * p[k]).toFixed(p[k] < 0.0995 ? 1 : 0)}%`;
      });
      const words = data.names.map((n, k) => `${n} ${(100 * p[k]).toFixed(1)}%`);
      right.setAttribute("aria-label", `Probabilities: ${words.join(", ")}`);
      facts.textContent =
        `Entropy ${kd.fixed(kd.entropy(p), 2)} of at most ` +
        `${kd.fixed(Math.log2(count), 2)} bits at temperature ${kd.fixed(T, 2)}.`;
    }
    kd.onTheme(draw);
    draw();
  };
})();
