/* The schedules of three methods over one clock, and what each asks of the student. */
(function () {
  "use strict";
  const kd = window.kdbook;

  /* ---- the schedules, as kdbook's Python has them; epochs count from 0 */

  const phi = (temperature, tauMax) => 1 - (temperature - 1) / tauMax;
  function temperatures(epochs, tauMax) {
    const each = Math.floor(epochs / tauMax);
    return Array.from({ length: epochs }, (_, epoch) =>
      Math.max(1, tauMax - Math.floor(epoch / each)),
    );
  }
  const linearPsi = (epochs) =>
    Array.from({ length: epochs }, (_, k) =>
      epochs > 1 ? kd.clamp(k / (epochs - 1), 0, 1) : 0,
    );
  function stagePhi(psi, tauMax) {
    const heard = psi.filter((weight) => weight < 1).length;
    const all = temperatures(heard, tauMax).concat(Array(psi.length - heard).fill(1));
    return all.map((temperature) => phi(temperature, tauMax));
  }
  const place = (epoch, epochs, checkpoints) =>
    Math.min(checkpoints - 1, Math.floor((epoch / epochs) * checkpoints));
  kd.schedules = { phi, temperatures, linearPsi, stagePhi, place };

  /* ---- the picture */

  const HEIGHT = 230,
    LEFT = 30,
    TOP = 12,
    FLOOR = 200;

  kd.kinds.schedules = function (stage, data) {
    const { names, teacher, trail, label } = data,
      labelEpochs = data.label_epochs;
    const shown = new Set(data.shown);
    const all = {
      annealing: "Annealing-KD",
      continuation: "Continuation-KD",
      progressive: "Pro-KD",
    };
    const methods = Object.keys(all).filter((key) => trail || key !== "progressive");
    const hue = { annealing: 0, continuation: 1, progressive: 2 };
    const chart = kd.canvas(660, HEIGHT, "");
    const facts = kd.node("p", { class: "kd-facts", "aria-live": "polite" });
    const panels = kd.node("div", { class: "kd-parts" });

    const total = () => length.value + labelEpochs;
    const length = kd.slider(
      "epochs with the teacher",
      { min: 4, max: 30, step: 1, value: data.epochs },
      fit,
    );
    const hottest = kd.slider(
      "largest temperature",
      { min: 1, max: 20, step: 1, value: data.tau_max },
      draw,
    );
    const margin = kd.slider(
      "margin",
      { min: 0, max: 4, step: 0.1, value: data.margin, words: (v) => kd.fixed(v, 1) },
      draw,
    );
    const clock = kd.slider(
      "epoch",
      { min: 1, max: total(), step: 1, value: data.epoch },
      draw,
    );
    let time = 0;
    const play = kd.player("Play", function (seconds) {
      time += 3 * seconds;
      clock.value = Math.min(total(), 1 + Math.floor(time));
      draw();
      return time < total();
    });
    play.element.addEventListener("click", function () {
      time = clock.value >= total() ? 0 : clock.value - 1;
    });
    const checks = methods.map((key) =>
      kd.checkbox(all[key], shown.has(key), function (on) {
        on ? shown.add(key) : shown.delete(key);
        draw();
      }),
    );
    stage.append(
      kd.node("div", { class: "kd-row" }, ...checks),
      kd.node(
        "div",
        { class: "kd-row" },
        length.element,
        hottest.element,
        margin.element,
      ),
      chart,
      kd.node(
        "div",
        { class: "kd-row" },
        clock.element,
        ...(kd.still() ? [] : [play.element]),
      ),
      panels,
      facts,
    );

    function fit() {
      hottest.input.max = Math.min(20, length.value);
      hottest.value = Math.min(hottest.value, length.value);
      clock.input.max = total();
      clock.value = Math.min(clock.value, total());
      draw();
    }

    // The lines of each method: [what, values by epoch, dashed]
    function lines() {
      const E = length.value,
        tau = hottest.value,
        rest = Array(labelEpochs).fill(0);
      const psi = linearPsi(E + labelEpochs);
      const found = {
        annealing: [
          [
            "\u03a6",
            temperatures(E, tau)
              .map((T) => phi(T, tau))
              .concat(rest),
            false,
          ],
        ],
        continuation: [
          ["\u03a6", stagePhi(psi, tau), false],
          ["\u03c8", psi, true],
        ],
      };
      if (trail)
        found.progressive = [
          [
            "checkpoint",
            Array.from(
              { length: E },
              (_, k) => (place(k, E, trail.length) + 1) / trail.length,
            ).concat(rest),
            false,
          ],
        ];
      return found;
    }

    function draw() {
      const { colors, line, soft } = kd.theme(stage),
        found = lines(),
        n = total(),
        width = kd.clamp(stage.clientWidth || 660, 280, 720),
        right = width - 8;
      checks.forEach(function (check, k) {
        check.style.borderBottom = `3px solid ${colors[hue[methods[k]]]}`;
      });
      chart.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      chart.style.maxWidth = `${width}px`;
      const now = clock.value - 1;
      const x = kd.mapped(0, n, LEFT, right),
        y = kd.mapped(0, 1, FLOOR, TOP);
      const parts = [];
      for (const tick of [0, 0.5, 1]) {
        parts.push(
          kd.svg("line", {
            x1: LEFT,
            x2: right,
            y1: y(tick),
            y2: y(tick),
            stroke: line,
          }),
          kd.svg(
            "text",
            {
              x: LEFT - 6,
              y: y(tick) + 4,
              "text-anchor": "end",
              "font-size": 12,
              fill: soft,
            },
            String(tick),
          ),
        );
      }
      const every = n > 16 ? 5 : 2;
      for (let k = 1; k <= n; k++) {
        if (k !== 1 && k % every) continue;
        parts.push(
          kd.svg(
            "text",
            {
              x: x(k - 0.5),
              y: FLOOR + 18,
              "text-anchor": "middle",
              "font-size": 12,
              fill: soft,
            },
            String(k),
          ),
        );
      }
      parts.push(
        kd.svg("rect", {
          x: x(now),
          width: x(1) - x(0),
          y: TOP,
          height: FLOOR - TOP,
          fill: "currentColor",
          "fill-opacity": 0.1,
        }),
        kd.svg("line", {
          x1: x(length.value),
          x2: x(length.value),
          y1: TOP,
          y2: FLOOR,
          stroke: soft,
          "stroke-dasharray": "2 3",
        }),
        kd.svg(
          "text",
          { x: x(length.value) + 4, y: FLOOR - 6, "font-size": 11, fill: soft },
          "labels only *",
        ),
      );
      const words = [];
      for (const key of methods.filter((each) => shown.has(each))) {
        for (const [what, values, dashed] of found[key]) {
          const stop = key === "continuation" ? n : length.value;
          let path = `M${x(0)} ${y(values[0])}`;
          for (let k = 0; k < stop; k++) {
            path += `L${x(k)} ${y(values[k])}L${x(k + 1)} ${y(values[k])}`;
          }
          parts.push(
            kd.svg("path", {
              d: path,
              fill: "none",
              stroke: colors[hue[key]],
              "stroke-width": key === "annealing" ? 6 : 2.5,
              "stroke-opacity": key === "annealing" ? 0.6 : 1,
              "stroke-dasharray": dashed ? "6 4" : null,
            }),
          );
          if (now < stop) {
            parts.push(
              kd.svg("circle", {
                cx: x(now + 0.5),
                cy: y(values[now]),
                r: 5,
                fill: colors[hue[key]],
              }),
            );
            words.push(`${all[key]} ${what} ${kd.fixed(values[now], 2)}`);
          } else words.push(`${all[key]} labels only`);
        }
      }
      chart.replaceChildren(...parts);
      chart.setAttribute(
        "aria-label",
        `Weights over ${n} epochs; in epoch ` + `${now + 1}: ${words.join(", ")}`,
      );
      facts.textContent =
        `Epoch ${now + 1}: ${words.join("; ") || "pick a method"}. ` +
        "* Annealing-KD and Pro-KD end with labels only; Continuation-KD lets them in by ψ.";
      panels.replaceChildren(
        ...methods
          .filter((each) => shown.has(each))
          .map((key) =>
            panel(
              key,
              found[key].map(([, values]) => values[now]),
              now,
              colors,
            ),
          ),
      );
    }

    // What a method asks of the student in this epoch, over the whole teacher
    function panel(key, [first, psi], now, colors) {
      const width = 210,
        height = 130,
        zero = 70,
        reach = Math.max(
          ...teacher.map(Math.abs),
          ...(trail || []).flat().map(Math.abs),
        );
      const gap = width / names.length,
        up = (z) => (z / reach) * 50;
      const over = key !== "continuation" && now >= length.value;
      const target =
        key === "progressive" && !over
          ? trail[Math.round(first * trail.length) - 1]
          : teacher.map((z) => first * z);
      const half = key === "continuation" ? Math.sqrt(margin.value * first) : 0;
      const ask = over
        ? "the label"
        : key === "progressive"
          ? `checkpoint ${Math.round(first * trail.length)} of ${trail.length}`
          : `${kd.fixed(first, 2)} of the logits` +
            (psi > 0 ? `, label weighs ${kd.fixed(psi, 2)}` : "");
      const picture = kd.canvas(width, height, `${all[key]} asks for ${ask}`);
      picture.append(
        kd.svg("line", {
          x1: 0,
          x2: width,
          y1: zero,
          y2: zero,
          stroke: "currentColor",
          "stroke-opacity": 0.4,
        }),
      );
      names.forEach(function (name, k) {
        const bar = (z, wide, more) =>
          kd.svg("rect", {
            x: (k + 0.5 - wide / 2) * gap,
            width: wide * gap,
            y: zero - Math.max(0, up(z)),
            height: Math.abs(up(z)),
            ...more,
          });
        const grey = { fill: "none", stroke: "currentColor", "stroke-opacity": 0.5 };
        picture.append(bar(teacher[k], 0.8, { ...grey, "stroke-dasharray": "3 2" }));
        if (!over) {
          picture.append(bar(target[k], 0.56, { fill: colors[hue[key]] }));
        }
        if (half && !over) {
          picture.append(
            kd.svg("rect", {
              x: (k + 0.3) * gap,
              width: 0.4 * gap,
              y: zero - up(target[k] + half),
              height: 2 * up(half),
              fill: "currentColor",
              "fill-opacity": 0.25,
            }),
          );
        }
        const bold = k === label && (over || psi > 0);
        picture.append(
          kd.svg(
            "text",
            {
              x: (k + 0.5) * gap,
              y: height - 2,
              "text-anchor": "middle",
              "font-size": 11,
              fill: "currentColor",
              "font-weight": bold ? 700 : 400,
            },
            bold ? `\u2713 ${name}` : name,
          ),
        );
      });
      return kd.node(
        "div",
        { class: "kd-part" },
        kd.node("div", {}, `${all[key]}: ${ask}`),
        picture,
      );
    }
    kd.onTheme(draw);
    fit();
    kd.onWidth(stage, draw);
  };
})();
