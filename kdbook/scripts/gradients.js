/* RW-KD: a held-out gradient decides between the label's and the teacher's. */
(function () {
  "use strict";
  const kd = window.kdbook;

  const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
  // Agreement with the held-out gradient, clipped below, as shares: the teacher's
  function teacherWeight(heldOut, label, teacher, floor) {
    const kept = [label, teacher].map((g) => Math.max(floor, dot(heldOut, g)));
    return kept[1] / (kept[0] + kept[1]);
  }
  kd.gradients = { teacherWeight };

  kd.kinds.gradients = function (stage, data) {
    const SIZE = 300,
      unit = 46,
      zero = SIZE / 2;
    const arrows = {
      "held-out": data.held_out.slice(),
      label: data.label.slice(),
      teacher: data.teacher.slice(),
    };
    const hue = { "held-out": 2, label: 1, teacher: 0 };
    const picture = kd.canvas(SIZE, SIZE, ""),
      scale = kd.canvas(330, 170, "");
    picture.removeAttribute("role");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    const ends = Object.fromEntries(
      Object.keys(arrows).map(function (name) {
        const line = kd.svg("line", { x1: zero, y1: zero, "stroke-width": 4 });
        const end = kd.svg("circle", {
          r: 9,
          tabindex: 0,
          role: "slider",
          class: "kd-knob",
          "aria-label": `gradient of the ${name} loss`,
          "data-lm-suppress-shortcuts": "true",
        });
        const words = kd.svg("text", { "font-size": 13, fill: "currentColor" }, name);
        picture.append(line, end, words);
        const set = function (x, y) {
          arrows[name] = [x, y].map((v) =>
            kd.clamp(Math.round(20 * v) / 20, -2.9, 2.9),
          );
          draw();
        };
        kd.draggable(
          picture,
          end,
          (x, y) => set((x - zero) / unit, (zero - y) / unit),
          (dx, dy) => set(arrows[name][0] + 0.1 * dx, arrows[name][1] + 0.1 * dy),
        );
        return [name, { line, end, words }];
      }),
    );
    stage.append(
      kd.node(
        "div",
        { class: "kd-parts" },
        kd.part("Gradients of one sample: drag their ends", picture),
        kd.part("Its two weights", scale),
      ),
      facts,
    );

    function draw() {
      const { colors } = kd.theme(stage);
      for (const [name, [x, y]] of Object.entries(arrows)) {
        const { line, end, words } = ends[name],
          color = colors[hue[name]];
        const px = zero + unit * x,
          py = zero - unit * y;
        line.setAttribute("x2", px);
        line.setAttribute("y2", py);
        line.setAttribute("stroke", color);
        end.setAttribute("cx", px);
        end.setAttribute("cy", py);
        end.setAttribute("fill", color);
        end.setAttribute("aria-valuetext", `${kd.fixed(x, 2)}, ${kd.fixed(y, 2)}`);
        end.setAttribute("aria-valuenow", x);
        words.setAttribute("x", px + (x < 0 ? -12 : 12));
        words.setAttribute("text-anchor", x < 0 ? "end" : "start");
        words.setAttribute("y", py - 10);
      }
      const w = teacherWeight(arrows["held-out"], arrows.label, arrows.teacher, 1e-8);
      scale.replaceChildren(
        ...kd.bars(330, 170, [1 - w, w], {
          low: 0,
          high: 1,
          names: ["label", "teacher"],
          fill: (k) => colors[1 - k],
          texts: (v) => kd.fixed(v, 2),
        }),
      );
      const with_ = (name) => dot(arrows["held-out"], arrows[name]) > 0;
      const both = with_("label") && with_("teacher");
      const words = both
        ? "Both help the held-out rows: they share."
        : with_("label")
          ? "Only the label helps the held-out rows."
          : with_("teacher")
            ? "Only the teacher helps the held-out rows."
            : "Neither helps: both are clipped to the same floor, so each weighs a half.";
      facts.textContent =
        `Teacher ${kd.fixed(w, 2)}, label ${kd.fixed(1 - w, 2)}. ` + words;
      scale.setAttribute("aria-label", facts.textContent);
    }
    kd.onTheme(draw);
    draw();
  };
})();
