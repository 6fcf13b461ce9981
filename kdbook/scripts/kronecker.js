/* A matrix, the sum of Kronecker products nearest to it, and what is left. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // Block (i, j) of the product is a[i][j] times b
  const product = (a, b) =>
    a.flatMap((rowA) => b.map((rowB) => rowA.flatMap((x) => rowB.map((y) => x * y))));
  function sum(as, bs, rank) {
    return as
      .slice(0, rank)
      .map((a, r) => product(a, bs[r]))
      .reduce((m, more) => m.map((row, i) => row.map((x, j) => x + more[i][j])));
  }
  kd.kronecker = { product, sum };

  kd.kinds.kronecker = function (stage, data) {
    const { weight, choices } = data,
      SIZE = 200;
    const m = weight.length,
      n = weight[0].length;
    const largest = Math.max(...weight.flat().map(Math.abs));
    const shape = kd.slider(
      "shape of A",
      {
        min: 0,
        max: choices.length - 1,
        step: 1,
        value: data.shape,
        words: (k) => choices[k].shape.join(" x "),
      },
      fit,
    );
    const rank = kd.slider(
      "products",
      { min: 1, max: data.rank, step: 1, value: data.rank },
      draw,
    );
    const pictures = ["W", "sum of A \u2297 B", "what is left"].map((words) => [
      words,
      kd.canvas(SIZE, SIZE, words),
    ]);
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    stage.append(
      kd.node("div", { class: "kd-row" }, shape.element, rank.element),
      kd.node(
        "div",
        { class: "kd-parts" },
        ...pictures.map(([words, picture]) => kd.part(words, picture)),
      ),
      facts,
    );

    function fit() {
      rank.input.max = choices[shape.value].a.length;
      rank.value = Math.min(rank.value, choices[shape.value].a.length);
      draw();
    }
    function paint(picture, matrix, blocks) {
      const { colors, line } = kd.theme(stage),
        w = SIZE / n,
        h = SIZE / m;
      const parts = matrix.flatMap((row, i) =>
        row.map((x, j) =>
          kd.svg("rect", {
            x: j * w,
            y: i * h,
            width: w + 0.3,
            height: h + 0.3,
            fill: colors[x < 0 ? 1 : 0],
            "fill-opacity": Math.min(1, Math.abs(x) / largest).toFixed(3),
          }),
        ),
      );
      const [rows, columns] = blocks || [1, 1];
      const lines = (count, draw) =>
        Array.from({ length: count + 1 }, (_, k) => draw((k * SIZE) / count)).join("");
      const d =
        lines(rows, (y) => `M0 ${y}H${SIZE}`) +
        lines(columns, (x) => `M${x} 0V${SIZE}`);
      parts.push(kd.svg("path", { d, fill: "none", stroke: line }));
      picture.replaceChildren(...parts);
    }
    function draw() {
      const {
          shape: [m1, n1],
          a,
          b,
        } = choices[shape.value],
        r = rank.value;
      const near = sum(a, b, r);
      const rest = weight.map((row, i) => row.map((x, j) => x - near[i][j]));
      paint(pictures[0][1], weight, [m1, n1]);
      paint(pictures[1][1], near, [m1, n1]);
      paint(pictures[2][1], rest);
      const norm = (matrix) => Math.hypot(...matrix.flat());
      const numbers = r * (m1 * n1 + (m / m1) * (n / n1));
      facts.textContent =
        `${numbers} numbers instead of ${m * n}; the rest is ` +
        `${Math.round((100 * norm(rest)) / norm(weight))}% of the matrix in its norm.`;
      pictures[1][1].setAttribute(
        "aria-label",
        `${r} products of a ${m1} by ${n1} ` + `matrix. ${facts.textContent}`,
      );
    }
    kd.onTheme(draw);
    fit();
  };
})();
