/* One function in two suits of weights: what noise makes of them, and scaled noise. */
(function () {
  "use strict";
  const kd = window.kdbook;

  kd.kinds.twins = function (stage, data) {
    const WIDTH = 640,
      HEIGHT = 300,
      LEFT = 52,
      FLOOR = HEIGHT - 40;
    const all = [data.raw, data.scaled].flatMap((s) => [s.net, ...s.twins]).flat();
    const [least, most] = [Math.min(...all), Math.max(...all)];
    let scaled = data.start === "scaled";
    const slider = kd.slider(
      "first layer of the twin, times",
      {
        min: 0,
        max: data.factors.length - 1,
        step: 1,
        value: data.factors.length - 1,
        words: (k) => `${data.factors[k]}`,
      },
      draw,
    );
    const toggle = kd.checkbox("noise in proportion to the weights", scaled, (on) => {
      scaled = on;
      draw();
    });
    const picture = kd.canvas(WIDTH, HEIGHT, "");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    stage.append(
      picture,
      kd.node("div", { class: "kd-row" }, slider.element, toggle),
      facts,
    );

    function draw() {
      const { colors, line } = kd.theme(stage);
      const shown = scaled ? data.scaled : data.raw,
        twin = shown.twins[slider.value];
      const x = kd.mapped(shown.xs[0], shown.xs[shown.xs.length - 1], LEFT, WIDTH - 12);
      const y = kd.mapped(Math.log(least), Math.log(most), FLOOR, 14);
      const curve = (losses, color, thick, dash) =>
        kd.svg("polyline", {
          points: losses.map((v, k) => `${x(shown.xs[k])},${y(Math.log(v))}`).join(" "),
          fill: "none",
          stroke: color,
          "stroke-width": thick,
          "stroke-dasharray": dash,
        });
      const text = (at, up, words, anchor) =>
        kd.svg(
          "text",
          {
            x: at,
            y: up,
            "font-size": 12,
            "text-anchor": anchor,
            fill: "currentColor",
          },
          words,
        );
      const ticks = [0.1, 1, 10, 100, 1000].filter((v) => v > least && v < most);
      picture.replaceChildren(
        ...ticks.flatMap((v) => [
          kd.svg("line", {
            x1: LEFT,
            x2: WIDTH - 12,
            y1: y(Math.log(v)),
            y2: y(Math.log(v)),
            stroke: line,
          }),
          text(LEFT - 8, y(Math.log(v)) + 4, `${v}`, "end"),
        ]),
        curve(shown.net, colors[0], 5, null),
        curve(twin, colors[1], 2.2, "7 5"),
        text(x(0), HEIGHT - 6, scaled ? "scaled noise" : "noise", "middle"),
        ...[shown.xs[0], 0, shown.xs[shown.xs.length - 1]].map((v) =>
          text(x(v), FLOOR + 16, kd.fixed(v, 1), "middle"),
        ),
      );
      const edge = (losses) => kd.fixed(losses[losses.length - 1], 2);
      facts.textContent =
        `Loss at the right edge: the net ${edge(shown.net)}, ` +
        `its twin ${edge(twin)} nats. Both give the same answers.`;
      picture.setAttribute("aria-label", `Loss by noise. ${facts.textContent}`);
    }
    kd.onTheme(draw);
    draw();
  };
})();
