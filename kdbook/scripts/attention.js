/* Universal-KD: a student's answer decides which of the teacher's layers it hears. */
(function () {
  "use strict";
  const kd = window.kdbook;

  // Softmax of the dot products of the student's logits with each layer's
  const attend = (student, layers) =>
    kd.softmax(layers.map((z) => z.reduce((sum, x, c) => sum + x * student[c], 0)));
  const mixed = (shares, layers) =>
    layers[0].map((_, c) =>
      shares.reduce((sum, share, l) => sum + share * layers[l][c], 0),
    );
  kd.attention = { attend, mixed };

  kd.kinds.attention = function (stage, data) {
    const { names, layers } = data,
      student = data.student.slice();
    const sliders = names.map((name, c) =>
      kd.slider(
        `student's logit of ${name}`,
        { min: -4, max: 4, step: 0.1, value: student[c], words: (v) => kd.fixed(v, 1) },
        function (v) {
          student[c] = v;
          draw();
        },
      ),
    );
    const shares = kd.canvas(330, 170, ""),
      target = kd.canvas(330, 170, "");
    const facts = kd.node("p", { class: "kd-facts" });
    stage.append(
      kd.node("div", { class: "kd-row" }, ...sliders.map((s) => s.element)),
      kd.node(
        "div",
        { class: "kd-parts" },
        kd.part("Attention to the teacher's layers", shares),
        kd.part("Target: the layers' answers, mixed", target),
      ),
      facts,
    );

    function draw() {
      const { colors } = kd.theme(stage),
        heard = attend(student, layers);
      const p = kd.softmax(mixed(heard, layers));
      const percent = (x) => `${Math.round(100 * x)}%`;
      shares.replaceChildren(
        ...kd.bars(330, 170, heard, {
          low: 0,
          high: 1,
          names: layers.map((_, l) => `layer ${l + 1}`),
          fill: colors[0],
          texts: percent,
        }),
      );
      target.replaceChildren(
        ...kd.bars(330, 170, p, {
          names,
          low: 0,
          high: 1,
          fill: colors[1],
          texts: percent,
        }),
      );
      const most = heard.indexOf(Math.max(...heard));
      const says = layers[most].indexOf(Math.max(...layers[most]));
      shares.setAttribute("aria-label", `Attention: ${heard.map(percent).join(", ")}`);
      target.setAttribute(
        "aria-label",
        `Target: ${names.map((n, c) => `${n} ${percent(p[c])}`).join(", ")}`,
      );
      facts.textContent =
        `Layer ${most + 1} is heard most (${percent(heard[most])}); ` +
        `it says ${names[says]}.`;
    }
    kd.onTheme(draw);
    draw();
  };
})();
