/* How labels go wrong: the rate, the kind, and when the wrong class wins. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // From the true class (row) to the observed one (column)
  function transition(kind, rate, classes) {
    return Array.from({ length: classes }, (_, i) =>
      Array.from({ length: classes }, function (_, j) {
        if (i === j) return 1 - rate;
        if (kind === "symmetric") return rate / (classes - 1);
        return j === (i + 1) % classes ? rate : 0;
      }),
    );
  }
  kd.noise = { transition };

  kd.kinds.noise = function (stage, data) {
    const { names } = data,
      n = names.length,
      SIZE = 250;
    let kind = data.noise;
    const rate = kd.slider(
      "share of wrong labels",
      {
        min: 0,
        max: 1,
        step: 0.01,
        value: data.rate,
        words: (v) => `${Math.round(100 * v)}%`,
      },
      draw,
    );
    const swap = kd.button("", function () {
      kind = kind === "symmetric" ? "pair" : "symmetric";
      draw();
    });
    const matrix = kd.canvas(SIZE, SIZE, ""),
      dots = kd.canvas(SIZE, SIZE, "");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    stage.append(
      kd.node("div", { class: "kd-row" }, rate.element, swap),
      kd.node(
        "div",
        { class: "kd-parts" },
        kd.part("True class (row) to observed label (column)", matrix),
        kd.part(`Twenty samples of ${names[0]}, coloured by their label`, dots),
      ),
      facts,
    );

    function draw() {
      const { colors, dark } = kd.theme(stage);
      const T = transition(kind, rate.value, n),
        cell = (SIZE - 50) / n;
      swap.textContent =
        kind === "symmetric" ? "Confuse neighbours only" : "Confuse all classes";
      matrix.replaceChildren(
        ...T.flatMap((row, i) => [
          kd.svg(
            "text",
            {
              x: 44,
              y: 8 + (i + 0.6) * cell,
              "text-anchor": "end",
              "font-size": 12,
              fill: "currentColor",
            },
            names[i],
          ),
          kd.svg(
            "text",
            {
              x: 50 + (i + 0.5) * cell,
              y: SIZE - 26,
              "text-anchor": "middle",
              "font-size": 12,
              fill: "currentColor",
            },
            names[i],
          ),
          ...row.flatMap((p, j) => [
            kd.svg("rect", {
              x: 50 + j * cell,
              y: 8 + i * cell,
              width: cell - 2,
              height: cell - 2,
              fill: colors[i === j ? 0 : 1],
              "fill-opacity": p,
            }),
            kd.svg(
              "text",
              {
                x: 49 + (j + 0.5) * cell,
                y: 12 + (i + 0.5) * cell,
                "text-anchor": "middle",
                "font-size": 12,
                fill: p > 0.6 ? (dark ? "#14181c" : "#ffffff") : "currentColor",
              },
              p.toFixed(2),
            ),
          ]),
        ]),
      );
      // The first sample turns at 1/20, the second at 2/20, ... so that a slider that
      // moves on changes one sample at a time
      const wrong = Math.round(20 * rate.value);
      const label = (k) => (k >= wrong ? 0 : kind === "pair" ? 1 : 1 + (k % (n - 1)));
      dots.replaceChildren(
        ...Array.from({ length: 20 }, (_, k) =>
          kd.svg(
            "g",
            {},
            kd.svg("circle", {
              cx: 30 + 46 * (k % 5),
              cy: 26 + 46 * Math.floor(k / 5),
              r: 17,
              fill: colors[label(k) % colors.length],
            }),
            kd.svg(
              "text",
              {
                x: 30 + 46 * (k % 5),
                y: 30 + 46 * Math.floor(k / 5),
                "text-anchor": "middle",
                "font-size": 10,
                fill: dark ? "#14181c" : "#ffffff",
              },
              names[label(k)].slice(0, 5),
            ),
          ),
        ),
      );
      const limit = kind === "symmetric" ? (n - 1) / n : 0.5;
      const wins =
        rate.value > limit
          ? "a wrong class is more frequent than the right one"
          : rate.value === limit
            ? "right and wrong are level"
            : "the right class is still the most frequent one";
      facts.textContent =
        `At ${Math.round(100 * rate.value)}% ${wins}; the border is ` +
        `${Math.round(100 * limit)}% for this kind.`;
      matrix.setAttribute(
        "aria-label",
        `Matrix with ${kd.fixed(1 - rate.value, 2)} on ` + "its diagonal",
      );
      dots.setAttribute("aria-label", `${wrong} of 20 labels are wrong`);
    }
    kd.onTheme(draw);
    draw();
  };
})();
