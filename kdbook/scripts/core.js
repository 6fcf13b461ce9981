/* What the figures that move share. Beside it stands one file for each kind of figure,
   which adds a function (card, data) to kdbook.kinds; kdbook.mount() calls it once for
   every card on the page that waits for one. */
(function () {
  "use strict";
  if (window.kdbook) return;

  const SVG = "http://www.w3.org/2000/svg";
  // Okabe and Ito's colours, told apart by readers with any colour vision
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b0648f", "#7a6a00"];
  const DARK = ["#56b4e9", "#f0a35e", "#35c49a", "#e39cc6", "#f0e442"];

  /* ---- making elements */

  function filled(element, attributes, children) {
    Object.entries(attributes || {}).forEach(function ([name, value]) {
      if (value !== null && value !== undefined) element.setAttribute(name, value);
    });
    element.append(...children);
    return element;
  }
  const node = (tag, attributes, ...children) =>
    filled(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    filled(document.createElementNS(SVG, tag), attributes, children);

  // An SVG for pictures of `width` x `height` units that shrinks with its column
  function canvas(width, height, label) {
    const viewBox = `0 0 ${width} ${height}`;
    const style = `max-width:${width}px`;
    return svg("svg", { viewBox, style, role: "img", "aria-label": label });
  }

  /* ---- controls: labelled, moved by keys, silent for JupyterLab's shortcuts */

  const quiet = { "data-lm-suppress-shortcuts": "true" };

  // A slider with its value in words; `moved(value)` is called when the reader moves it
  function slider(name, { min, max, step, value, words }, moved) {
    const range = { type: "range", min, max, step, autocomplete: "off", ...quiet };
    const input = node("input", { ...range, "aria-label": name });
    const output = node("output", { "aria-live": "off" });
    input.value = value;
    const control = {
      element: node(
        "label",
        { class: "kd-slider" },
        node("span", {}, name),
        input,
        output,
      ),
      input,
      get value() {
        return +input.value;
      },
      set value(v) {
        input.value = v;
        say();
      },
    };
    function say() {
      const text = words ? words(+input.value) : input.value;
      output.textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    input.addEventListener("input", function () {
      say();
      moved(+input.value);
    });
    say();
    return control;
  }

  function button(text, pressed) {
    const made = node("button", { type: "button", ...quiet }, text);
    made.addEventListener("click", pressed);
    return made;
  }

  function checkbox(text, checked, changed) {
    const input = node("input", { type: "checkbox", ...quiet });
    input.checked = checked;
    input.addEventListener("change", function () {
      changed(input.checked);
    });
    return node("label", { class: "kd-check" }, input, text);
  }

  const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // A button that runs `step(seconds)` in every frame until that returns false
  function player(text, step) {
    let running = null,
      before = 0;
    const made = button(text, function () {
      running === null ? start() : stop();
    });
    function stop() {
      cancelAnimationFrame(running);
      running = null;
      made.textContent = text;
    }
    function frame(now) {
      const seconds = Math.min(0.05, (now - before) / 1000);
      before = now;
      running = requestAnimationFrame(frame);
      if (step(seconds) === false) stop();
    }
    function start() {
      made.textContent = "Pause";
      before = performance.now();
      running = requestAnimationFrame(frame);
    }
    return {
      element: made,
      start,
      stop,
      get running() {
        return running !== null;
      },
    };
  }

  /* ---- numbers */

  const fixed = (x, digits) => x.toFixed(digits).replace("-", "\u2212");
  const mapped = (a, b, u, v) => (x) => u + ((x - a) / (b - a)) * (v - u);
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

  // Exponentials of logits / temperature, normalised; the largest is taken off first
  function softmax(logits, temperature) {
    const top = Math.max(...logits);
    const e = logits.map((z) => Math.exp((z - top) / (temperature || 1)));
    const total = e.reduce((sum, x) => sum + x, 0);
    return e.map((x) => x / total);
  }
  // In bits; a class without probability adds nothing
  const entropy = (p) => p.reduce((h, x) => h - (x > 0 ? x * Math.log2(x) : 0), 0);

  // Bars from `zero` up or down, with a name below and a number beyond the end
  function bars(width, height, values, { names, low, high, fill, texts }) {
    const y = mapped(low, high, height - 24, 18),
      gap = width / values.length;
    return values.flatMap(function (value, k) {
      const middle = (k + 0.5) * gap,
        end = y(value);
      const text = (at, words, size) =>
        svg(
          "text",
          {
            x: middle,
            y: at,
            "text-anchor": "middle",
            "font-size": size,
            fill: "currentColor",
          },
          words,
        );
      return [
        svg("rect", {
          x: middle - 0.3 * gap,
          width: 0.6 * gap,
          y: Math.min(end, y(0)),
          height: Math.abs(end - y(0)),
          fill: typeof fill === "function" ? fill(k) : fill,
        }),
        text(end + (value < 0 ? 14 : -5), texts(value, k), 12),
        text(height - 4, names[k], 12),
      ];
    });
  }

  const part = (words, picture) =>
    node("div", { class: "kd-part" }, node("div", {}, words), picture);

  // Moves `element` by pointer and keys; `moved(x, y)` gets units of the picture,
  // `nudged(dx, dy)` a step of the arrow keys
  function draggable(picture, element, moved, nudged) {
    element.addEventListener("pointerdown", function (event) {
      event.preventDefault();
      element.focus();
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", function (event) {
      if (!element.hasPointerCapture(event.pointerId)) return;
      const box = picture.getBoundingClientRect(),
        view = picture.viewBox.baseVal;
      moved(
        ((event.clientX - box.left) / box.width) * view.width,
        ((event.clientY - box.top) / box.height) * view.height,
      );
    });
    element.addEventListener("keydown", function (event) {
      const by = {
        ArrowUp: [0, 1],
        ArrowRight: [1, 0],
        ArrowDown: [0, -1],
        ArrowLeft: [-1, 0],
      }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      nudged(...by);
    });
  }

  /* ---- the page's colours */

  // Light text means a dark page, whoever drew it: the site, JupyterLab or Colab
  function theme(card) {
    const channels = getComputedStyle(card)
      .color.match(/[\d.]+/g)
      .map(Number);
    const dark = 0.3 * channels[0] + 0.6 * channels[1] + 0.1 * channels[2] > 128;
    return {
      dark,
      colors: dark ? DARK : LIGHT,
      ink: dark ? "#e8e8e8" : "#222222",
      soft: dark ? "#9aa4ad" : "#5c6670",
      line: dark ? "#4a5158" : "#d0d7de",
    };
  }

  // Calls `draw` again when the page changes its colours
  function onTheme(draw) {
    const seen = new MutationObserver(draw);
    const attributeFilter = ["class", "theme", "data-scheme", "data-jp-theme-light"];
    [document.documentElement, document.body].forEach(function (element) {
      seen.observe(element, { attributes: true, attributeFilter });
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  // Calls `draw` when the column becomes wider or narrower
  function onWidth(element, draw) {
    let width = element.clientWidth;
    new ResizeObserver(function () {
      if (element.clientWidth === width) return;
      width = element.clientWidth;
      draw();
    }).observe(element);
  }

  /* ---- putting figures in their places */

  const kinds = {};

  function mount() {
    document.querySelectorAll(".kd-figure:not([data-ready])").forEach(function (card) {
      const draw = kinds[card.dataset.kind];
      if (!draw) return;
      card.setAttribute("data-ready", "");
      const data = JSON.parse(card.querySelector("script").textContent);
      const stage = node("div", { class: "kd-stage" });
      card.querySelector(".kd-still").replaceWith(stage);
      draw(stage, data);
    });
  }
  addEventListener("DOMContentLoaded", mount);

  window.kdbook = {
    kinds,
    mount,
    node,
    svg,
    canvas,
    slider,
    button,
    checkbox,
    player,
    bars,
    part,
    draggable,
    still,
    fixed,
    mapped,
    clamp,
    softmax,
    entropy,
    theme,
    onTheme,
    onWidth,
  };
})();
