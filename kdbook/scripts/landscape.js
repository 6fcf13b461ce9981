/* A loss surface that turns, morphs with phi, and lets a ball roll. */
(function () {
  "use strict";
  const kd = window.kdbook;

  /* ---- the surface: two stored ones give the objective at every phi */

  // phi high + (1 - phi) low - phi (1 - phi) cross, at every point of the grid
  function mix(low, high, cross, phi) {
    const less = phi * (1 - phi) * cross;
    return high.map((h, k) => phi * h + (1 - phi) * low[k] - less);
  }

  // Twice as many points, by a cubic through four neighbours; linear in the values
  function finer(rows, nx, ny) {
    const line = function (values) {
      const at = (k) => values[kd.clamp(k, 0, values.length - 1)],
        out = [];
      values.forEach(function (v, k) {
        out.push(v);
        if (k < values.length - 1) {
          out.push((9 * (at(k) + at(k + 1)) - at(k - 1) - at(k + 2)) / 16);
        }
      });
      return out;
    };
    const wide = [];
    for (let j = 0; j < ny; j++) wide.push(line(rows.slice(j * nx, (j + 1) * nx)));
    const columns = wide[0].map((_, i) => line(wide.map((row) => row[i])));
    return columns[0].flatMap((_, j) => columns.map((column) => column[j]));
  }

  // The value between the grid's points; u and v run from 0 to 1
  function between(z, nx, ny, u, v) {
    const x = kd.clamp(u, 0, 1) * (nx - 1),
      y = kd.clamp(v, 0, 1) * (ny - 1);
    const i = Math.min(nx - 2, Math.floor(x)),
      j = Math.min(ny - 2, Math.floor(y));
    const a = x - i,
      b = y - j,
      k = j * nx + i;
    return (
      (1 - b) * ((1 - a) * z[k] + a * z[k + 1]) +
      b * ((1 - a) * z[k + nx] + a * z[k + nx + 1])
    );
  }

  // Line pieces of the level through the grid, as [u, v, u, v] from 0 to 1
  function contour(z, nx, ny, level) {
    const out = [];
    for (let j = 0; j < ny - 1; j++) {
      for (let i = 0; i < nx - 1; i++) {
        const at = [
            [i, j],
            [i + 1, j],
            [i + 1, j + 1],
            [i, j + 1],
          ],
          cut = [];
        for (let s = 0; s < 4; s++) {
          const [x1, y1] = at[s],
            [x2, y2] = at[(s + 1) % 4];
          const a = z[y1 * nx + x1] - level,
            b = z[y2 * nx + x2] - level;
          if (a < 0 === b < 0) continue;
          const t = a / (a - b);
          cut.push((x1 + t * (x2 - x1)) / (nx - 1), (y1 + t * (y2 - y1)) / (ny - 1));
        }
        for (let s = 0; s + 3 < cut.length; s += 4) out.push(cut.slice(s, s + 4));
      }
    }
    return out;
  }
  // Viridis, from high to low: deep is yellow
  const STOPS = [
    [68, 1, 84],
    [71, 44, 122],
    [59, 81, 139],
    [44, 113, 142],
    [33, 144, 141],
    [39, 173, 129],
    [92, 200, 99],
    [170, 220, 50],
    [253, 231, 37],
  ];
  function shade(height, light) {
    const at = (1 - kd.clamp(height, 0, 1)) * 8,
      k = Math.min(7, Math.floor(at));
    const mixed = STOPS[k].map((c, d) => c + (at - k) * (STOPS[k + 1][d] - c));
    return `rgb(${mixed.map((c) => Math.round(kd.clamp(c * light, 0, 255)))})`;
  }

  const LIFT = 0.95,
    DROP = 0.55,
    LEVELS = 12;

  /* ---- a canvas that shows a surface: floor, surface from far to near, path

     `view` holds turn and tilt and may be shared; `scale` takes heights to 0 to 1. */

  function scene(view, nx, ny, scale) {
    const picture = kd.node("canvas", {
      tabindex: 0,
      role: "img",
      class: "kd-scene",
      "data-lm-suppress-shortcuts": "true",
    });
    const pen = picture.getContext("2d");
    let width = 0,
      height = 0,
      size = 1,
      z = [],
      dark = false;

    function resize(w, h) {
      const ratio = Math.min(2, devicePixelRatio || 1);
      [width, height] = [w, h];
      picture.style.height = `${height}px`;
      picture.width = Math.round(width * ratio);
      picture.height = Math.round(height * ratio);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    // Whatever the tilt, floor and summit stay inside the picture
    function fit() {
      const deep = 2 * Math.SQRT2 * Math.sin(view.tilt),
        tall = LIFT * (1 + DROP) * Math.cos(view.tilt);
      size = Math.min(width / 2.9, (height - 16) / (deep + tall));
    }
    function screen(u, v, h) {
      const x = 2 * u - 1,
        y = 2 * v - 1;
      const depth = x * Math.sin(view.turn) + y * Math.cos(view.turn);
      const up = LIFT * (h - (1 - DROP) / 2) * Math.cos(view.tilt);
      return [
        width / 2 + size * (x * Math.cos(view.turn) - y * Math.sin(view.turn)),
        height / 2 + size * (depth * Math.sin(view.tilt) - up),
      ];
    }
    const onFloor = ([u, v]) => screen(u, v, -DROP);
    const onTop = ([u, v]) => screen(u, v, scale(between(z, nx, ny, u, v)));

    function stroke(points, color, thick, place) {
      pen.beginPath();
      points.forEach(function (p, k) {
        const [x, y] = place(p);
        k ? pen.lineTo(x, y) : pen.moveTo(x, y);
      });
      pen.strokeStyle = color;
      pen.lineWidth = thick;
      pen.stroke();
    }
    function dot([x, y], radius, fill, edge) {
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.fillStyle = fill;
      pen.fill();
      pen.strokeStyle = edge;
      pen.lineWidth = 1.5;
      pen.stroke();
    }

    function drawFloor(way) {
      const corners = [
        [0, 0],
        [1, 0],
        [1, 1],
        [0, 1],
        [0, 0],
      ];
      const bottom = Math.min(...z),
        top = Math.max(...z);
      stroke(corners, dark ? "#4a5158" : "#c9d0d7", 1, onFloor);
      for (let k = 0; k < LEVELS; k++) {
        const level = bottom + (top - bottom) * ((k + 0.5) / LEVELS) ** 2;
        pen.beginPath();
        for (const [a, b, c, d] of contour(z, nx, ny, level)) {
          pen.moveTo(...onFloor([a, b]));
          pen.lineTo(...onFloor([c, d]));
        }
        pen.strokeStyle = shade(scale(level), dark ? 1.25 : 0.9);
        pen.lineWidth = 1.1;
        pen.stroke();
      }
      stroke(way, dark ? "#9aa4ad" : "#8a939c", 1.2, onFloor);
    }

    function drawSurface() {
      const points = [],
        h = z.map(scale);
      for (let j = 0; j < ny; j++) {
        for (let i = 0; i < nx; i++) {
          points.push(screen(i / (nx - 1), j / (ny - 1), h[j * nx + i]));
        }
      }
      const along = Math.sin(view.turn) > 0,
        across = Math.cos(view.turn) > 0;
      for (let b = 0; b < ny - 1; b++) {
        const j = across ? b : ny - 2 - b;
        for (let a = 0; a < nx - 1; a++) {
          const i = along ? a : nx - 2 - a,
            k = j * nx + i;
          const dx = h[k + 1] - h[k],
            dy = h[k + nx] - h[k];
          const light = kd.clamp(1 - 3.2 * (0.7 * dx + 0.4 * dy), 0.6, 1.3);
          const color = shade((h[k] + h[k + 1] + h[k + nx] + h[k + nx + 1]) / 4, light);
          pen.beginPath();
          for (const c of [k, k + 1, k + nx + 1, k + nx]) pen.lineTo(...points[c]);
          pen.closePath();
          pen.fillStyle = pen.strokeStyle = color;
          pen.lineWidth = 0.8;
          pen.fill();
          pen.stroke();
        }
      }
    }

    // The path with points between, so that it lies on the surface
    const ribbon = (way) =>
      way.flatMap(([u, v], k) =>
        k === 0
          ? [[u, v]]
          : Array.from({ length: 16 }, (_, n) => [
              way[k - 1][0] + ((n + 1) / 16) * (u - way[k - 1][0]),
              way[k - 1][1] + ((n + 1) / 16) * (v - way[k - 1][1]),
            ]),
      );

    // `heights` of the grid, `way` from the start to where the student is now
    function paint(heights, way) {
      z = heights;
      dark = kd.theme(picture.parentElement || picture).dark;
      fit();
      pen.clearRect(0, 0, width, height);
      drawFloor(way);
      drawSurface();
      stroke(ribbon(way), "#000000aa", 5, onTop);
      stroke(ribbon(way), "#ffffff", 2.4, onTop);
      way.forEach((p) => dot(onTop(p), 3.2, "#ffffff", "#000000aa"));
      if (way.length) dot(onTop(way[way.length - 1]), 6, "#d55e00", "#ffffff");
    }
    return { picture, resize, paint, onTop, dot };
  }

  // Pointer and arrow keys turn `view`; `redraw()` shows it
  function turnable(picture, view, redraw) {
    const by = function (across, up) {
      view.turn += across;
      view.tilt = kd.clamp(view.tilt + up, 0.12, 1.45);
      redraw();
    };
    let held = null;
    picture.addEventListener("pointerdown", function (event) {
      held = [event.clientX, event.clientY];
      picture.setPointerCapture(event.pointerId);
    });
    picture.addEventListener("pointermove", function (event) {
      if (!held) return;
      const [x, y] = held;
      held = [event.clientX, event.clientY];
      by((event.clientX - x) / 140, (event.clientY - y) / 200);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      picture.addEventListener(end, function () {
        held = null;
      });
    }
    picture.addEventListener("keydown", function (event) {
      const step = {
        ArrowLeft: [-0.1, 0],
        ArrowRight: [0.1, 0],
        ArrowUp: [0, -0.06],
        ArrowDown: [0, 0.06],
      }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      by(...step);
    });
  }
  kd.landscape = { mix, finer, between, contour, shade, scene, turnable };

  kd.kinds.landscape = function (stage, data) {
    const nx = 2 * data.xs.length - 1,
      ny = 2 * data.ys.length - 1;
    const low = finer(data.low.flat(), data.xs.length, data.ys.length);
    const high = finer(data.high.flat(), data.xs.length, data.ys.length);
    const scale = kd.mapped(0, Math.max(...low, ...high), 0, 1);
    const [x0, x1] = [data.xs[0], data.xs[data.xs.length - 1]];
    const [y0, y1] = [data.ys[0], data.ys[data.ys.length - 1]];
    const unit = ([x, y]) => [(x - x0) / (x1 - x0), (y - y0) / (y1 - y0)];
    const path = data.path.map(unit);
    const view = { turn: data.turn, tilt: 0.5 };
    let z = [],
      ball = null;
    const shown = scene(view, nx, ny, scale),
      picture = shown.picture;
    const facts = kd.node("p", { class: "kd-facts" });
    const scale01 = { min: 0, max: 1, step: 0.001 };
    const slider = kd.slider(
      "\u03a6, the share of the teacher",
      { ...scale01, value: data.phi, words: (v) => kd.fixed(v, 2) },
      changed,
    );
    const grow = kd.player("Anneal", function (seconds) {
      if (slider.value >= 1) slider.value = 0;
      slider.value = Math.min(1, slider.value + seconds / 7);
      changed();
      return slider.value < 1;
    });
    const roll = kd.player("Roll a ball", step);
    roll.element.addEventListener("click", function () {
      if (roll.running) drop(path.length ? path[0] : [0.1, 0.1]);
    });
    stage.append(
      picture,
      kd.node(
        "div",
        { class: "kd-row" },
        slider.element,
        ...(kd.still() ? [] : [grow.element]),
        roll.element,
      ),
      facts,
    );

    function resize() {
      const width = stage.clientWidth || 640;
      shown.resize(width, Math.round(Math.min(0.68 * width, 470)));
      draw();
    }

    // The path up to the last epoch whose phi is not above the slider's
    const epoch = () => data.phis.filter((p) => p <= slider.value + 1e-9).length;
    const walked = () => path.slice(0, epoch() + 1);
    function draw() {
      shown.paint(z, walked());
      if (ball) {
        const [x, y] = shown.onTop([ball.u, ball.v]);
        shown.dot([x, y - 7], 8, "#e8eef4", "#14181c");
      }
    }

    /* ---- what the reader does */

    function changed() {
      z = mix(low, high, data.cross, slider.value);
      const least = Math.min(...z),
        k = epoch(),
        way = walked();
      const here = way.length ? way[way.length - 1] : null;
      const student = here && kd.fixed(between(z, nx, ny, ...here), 2);
      facts.textContent =
        `\u03a6 = ${kd.fixed(slider.value, 2)}: the loss runs from ` +
        `${kd.fixed(least, 2)} to ${kd.fixed(Math.max(...z), 2)} here` +
        (here ? `; where epoch ${k} ends it is ${student}.` : ".");
      picture.setAttribute(
        "aria-label",
        `Loss surface. ${facts.textContent} ` + "Arrow keys turn it.",
      );
      draw();
    }

    function drop([u, v]) {
      ball = { u, v, du: 0, dv: 0, still: 0, age: 0 };
    }
    // Downhill with friction, until it rests
    function step(seconds) {
      if (!ball) drop(path.length ? path[0] : [0.1, 0.1]);
      const e = 0.004,
        at = (u, v) => scale(between(z, nx, ny, u, v));
      const slopeU = (at(ball.u + e, ball.v) - at(ball.u - e, ball.v)) / (2 * e);
      const slopeV = (at(ball.u, ball.v + e) - at(ball.u, ball.v - e)) / (2 * e);
      const drag = Math.exp(-1.3 * seconds);
      ball.du = (ball.du - 6 * slopeU * seconds) * drag;
      ball.dv = (ball.dv - 6 * slopeV * seconds) * drag;
      for (const [place, speed] of [
        ["u", "du"],
        ["v", "dv"],
      ]) {
        ball[place] += ball[speed] * seconds;
        if (ball[place] < 0 || ball[place] > 1) ball[speed] *= -0.4;
        ball[place] = kd.clamp(ball[place], 0, 1);
      }
      const moves =
        Math.hypot(ball.du, ball.dv) > 0.01 || Math.hypot(slopeU, slopeV) > 0.05;
      ball.still = moves ? 0 : ball.still + seconds;
      draw();
      ball.age += seconds;
      return ball.still < 1 && ball.age < 30;
    }

    // The point of the surface nearest to a place on the screen; of two, the nearer
    function under(x, y) {
      let best = null,
        least = Infinity;
      for (let k = 0; k < nx * ny; k++) {
        const place = [(k % nx) / (nx - 1), Math.floor(k / nx) / (ny - 1)];
        const [px, py] = shown.onTop(place);
        const depth = place[0] * Math.sin(view.turn) + place[1] * Math.cos(view.turn);
        const away = Math.hypot(px - x, py - y) - 4 * depth;
        if (away < least) [best, least] = [place, away];
      }
      return best;
    }
    picture.addEventListener("dblclick", function (event) {
      const box = picture.getBoundingClientRect();
      drop(under(event.clientX - box.left, event.clientY - box.top));
      if (!roll.running) roll.start();
    });

    turnable(picture, view, draw);
    kd.onTheme(draw);
    changed();
    resize();
    kd.onWidth(stage, resize);
  };
})();
