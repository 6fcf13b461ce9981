/* SWA: steps at a constant rate run around the minimum; their mean lies in it. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // Noisy gradient steps on x^2 + 4 y^2 (halved); the noise is given, so that a rate
  // is all that changes. Rates up to 0.45 are stable.
  function walk(start, noise, rate) {
    const places = [start];
    for (const [dx, dy] of noise) {
      const [x, y] = places[places.length - 1];
      places.push([x - rate * (x + dx), y - rate * (4 * y + dy)]);
    }
    return places;
  }
  const mean = (places) =>
    [0, 1].map((d) => places.reduce((sum, p) => sum + p[d], 0) / places.length);
  const loss = ([x, y]) => 0.5 * (x * x + 4 * y * y);
  kd.average = { walk, mean, loss };

  kd.kinds.average = function (stage, data) {
    const W = 640,
      H = 300,
      x = kd.mapped(-3.2, 3.2, 0, W),
      y = kd.mapped(-1.5, 1.5, H, 0);
    const steps = data.noise.length;
    const rate = kd.slider(
      "learning rate",
      {
        min: 0.02,
        max: 0.45,
        step: 0.01,
        value: data.rate,
        words: (v) => kd.fixed(v, 2),
      },
      draw,
    );
    const from = kd.slider(
      "averaging starts at",
      {
        min: 0,
        max: 0.95,
        step: 0.05,
        value: data.start,
        words: (v) => `${Math.round(100 * v)}%`,
      },
      draw,
    );
    const clock = kd.slider(
      "step",
      { min: 1, max: steps, step: 1, value: steps },
      draw,
    );
    const play = kd.player("Play", function (seconds) {
      time += 18 * seconds;
      clock.value = Math.min(steps, Math.floor(time));
      draw();
      return time < steps;
    });
    let time = 0;
    play.element.addEventListener("click", function () {
      time = clock.value >= steps ? 1 : clock.value;
    });
    const picture = kd.canvas(W, H, "");
    const facts = kd.node("p", { class: "kd-facts" });
    stage.append(
      kd.node("div", { class: "kd-row" }, rate.element, from.element),
      picture,
      kd.node(
        "div",
        { class: "kd-row" },
        clock.element,
        ...(kd.still() ? [] : [play.element]),
      ),
      facts,
    );

    function draw() {
      const { colors, line } = kd.theme(stage);
      const way = walk(data.from, data.noise, rate.value).slice(0, clock.value + 1);
      const first = Math.max(1, Math.ceil(from.value * steps));
      const kept = way.slice(first),
        last = way[way.length - 1];
      const parts = [0.1, 0.3, 0.7, 1.3, 2.2, 3.4, 5].map((level) =>
        kd.svg("ellipse", {
          cx: x(0),
          cy: y(0),
          rx: x(Math.sqrt(2 * level)) - x(0),
          ry: y(0) - y(Math.sqrt(level / 2)),
          fill: "none",
          stroke: line,
        }),
      );
      const line_ = way.map(([u, v], k) => `${k ? "L" : "M"}${x(u)} ${y(v)}`).join("");
      parts.push(
        kd.svg("path", {
          d: line_,
          fill: "none",
          stroke: colors[1],
          "stroke-opacity": 0.55,
        }),
      );
      way.forEach(([u, v], k) =>
        parts.push(
          kd.svg("circle", {
            cx: x(u),
            cy: y(v),
            r: k === way.length - 1 ? 7 : 3,
            fill: colors[1],
            "fill-opacity": k < first ? 0.35 : 0.9,
          }),
        ),
      );
      let words = `Last step: loss ${kd.fixed(loss(last), 3)}. `;
      if (kept.length) {
        const middle = mean(kept);
        parts.push(
          kd.svg("circle", {
            cx: x(middle[0]),
            cy: y(middle[1]),
            r: 8,
            fill: colors[0],
            stroke: "#ffffff",
            "stroke-width": 2,
          }),
        );
        words += `Mean of ${kept.length} steps: loss ${kd.fixed(loss(middle), 3)}.`;
      } else words += "Nothing is averaged yet.";
      picture.replaceChildren(...parts);
      picture.setAttribute("aria-label", words);
      facts.textContent = words;
    }
    kd.onTheme(draw);
    draw();
  };
})();
