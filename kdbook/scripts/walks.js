/* Several students on one plane: small surfaces with one camera and one clock. */
(function () {
  "use strict";
  const kd = window.kdbook;

  kd.kinds.walks = function (stage, data) {
    const { scene, turnable, between } = kd.landscape;
    const nx = data.xs.length,
      ny = data.ys.length,
      epochs = data.says[0].length;
    const share = (v, all) => (v - all[0]) / (all[all.length - 1] - all[0]);
    const view = { turn: data.turn, tilt: 0.62 };
    const shown = data.names.map(function (name, m) {
      const surfaces = data.surfaces[m].map((grid) => grid.flat());
      let top = 1;
      const drawn = scene(view, nx, ny, (height) => height / top);
      return {
        ...drawn,
        name,
        // a method with one objective keeps its surface; each is drawn as high as wide
        at: function (epoch) {
          const z = surfaces[Math.min(epoch, surfaces.length) - 1];
          top = Math.max(...z);
          return z;
        },
        path: data.paths[m].map(([x, y]) => [share(x, data.xs), share(y, data.ys)]),
        facts: kd.node("div", { class: "kd-small" }),
      };
    });

    const slider = kd.slider(
      "epoch",
      { min: 1, max: epochs, step: 1, value: data.epoch, words: String },
      draw,
    );
    let waited = 0;
    const play = kd.player("Train all", function (seconds) {
      waited += seconds;
      if (waited < 0.7) return true;
      waited = 0;
      slider.value = slider.value >= epochs ? 1 : slider.value + 1;
      draw();
      return slider.value < epochs;
    });
    stage.append(
      kd.node(
        "div",
        { class: "kd-parts kd-many" },
        ...shown.map((each) =>
          kd.node(
            "div",
            { class: "kd-part" },
            kd.node("div", {}, each.name),
            each.picture,
            each.facts,
          ),
        ),
      ),
      kd.node(
        "div",
        { class: "kd-row" },
        slider.element,
        ...(kd.still() ? [] : [play.element]),
      ),
    );

    function draw() {
      const epoch = slider.value;
      shown.forEach(function (each, m) {
        const z = each.at(epoch),
          way = each.path.slice(0, epoch + 1);
        const loss = between(z, nx, ny, ...way[way.length - 1]);
        const range = `${kd.fixed(Math.min(...z), 2)} to ${kd.fixed(Math.max(...z), 2)}`;
        each.facts.textContent = `${data.says[m][epoch - 1]}: ${kd.fixed(loss, 2)} of ${range}`;
        each.picture.setAttribute(
          "aria-label",
          `${each.name}, epoch ${epoch}. ${each.facts.textContent}. Arrow keys turn all.`,
        );
        each.paint(z, way);
      });
    }
    function resize() {
      shown.forEach(function (each) {
        const width = each.picture.parentElement.clientWidth || 200;
        each.resize(width, Math.round(0.9 * width));
      });
      draw();
    }
    shown.forEach((each) => turnable(each.picture, view, draw));
    kd.onTheme(draw);
    resize();
    kd.onWidth(stage, resize);
  };
})();
