/* Glitter: of a pool of variants, train on those the student gets most wrong. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // The places of the k largest losses, in their order; of equal ones the earlier
  const worst = (losses, k) =>
    losses
      .map((loss, i) => [loss, i])
      .sort((a, b) => b[0] - a[0] || a[1] - b[1])
      .slice(0, k)
      .map(([, i]) => i)
      .sort((a, b) => a - b);
  kd.pool = { worst };

  kd.kinds.pool = function (stage, data) {
    const W = 640,
      H = 220;
    let losses = data.losses.slice(),
      chosen = [],
      rounds = 0,
      cost = 0;
    const k = kd.slider(
      "variants per round",
      { min: 1, max: losses.length, step: 1, value: data.k },
      draw,
    );
    const picture = kd.canvas(W, H, "");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    // A caricature of an update: what is trained on loses a third, the rest a little
    const train = kd.button("Train on the worst", function () {
      chosen = worst(losses, k.value);
      losses = losses.map((loss, i) => loss * (chosen.includes(i) ? 0.67 : 0.96));
      rounds += 1;
      cost += k.value;
      draw();
    });
    const reset = kd.button("Reset", function () {
      [losses, rounds, cost] = [data.losses.slice(), 0, 0];
      draw();
    });
    stage.append(
      kd.node("div", { class: "kd-row" }, k.element, train, reset),
      picture,
      facts,
    );

    function draw() {
      const { colors, soft } = kd.theme(stage),
        next = worst(losses, k.value);
      picture.replaceChildren(
        ...kd.bars(W, H, losses, {
          low: 0,
          high: Math.max(...data.losses) * 1.1,
          names: data.names,
          fill: (i) => (next.includes(i) ? colors[1] : soft),
          texts: (v) => kd.fixed(v, 2),
        }),
      );
      const top = Math.max(...losses);
      facts.textContent =
        `Round ${rounds}: the worst loss is ${kd.fixed(top, 2)}. ` +
        `Trained on ${cost} variants so far; all of them in every round would be ` +
        `${rounds * losses.length}.`;
      picture.setAttribute(
        "aria-label",
        `Losses of the variants: ${losses
          .map(
            (v, i) =>
              `${data.names[i]} ${kd.fixed(v, 2)}${next.includes(i) ? " (next)" : ""}`,
          )
          .join(", ")}`,
      );
    }
    kd.onTheme(draw);
    draw();
  };
})();
