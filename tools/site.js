// What the site's pages do besides moving their figures; pages.py links it.

// what scrolls sideways can be reached and scrolled by keys
addEventListener("load", function () {
  const wide = "pre, .cell-output, .math.display, .table-responsive, .sd-table";
  document.querySelectorAll(wide).forEach(function (element) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
  });
});

// the search shows a page or section of that name before what only mentions it
addEventListener("load", function () {
  if (!window.Fuse) return;
  const last = ["References", "Exercises", "Provenance"];
  function rank(entry, query) {
    const title = entry.title.toLowerCase();
    const section = entry.section.toLowerCase();
    if (last.includes(entry.section) && section !== query) return 6;
    if (!section && title.includes(query)) return 0;
    if (section === query) return 1;
    if (section.includes(query)) return 2;
    if (title.includes(query)) return 3;
    return entry.text.toLowerCase().includes(query) ? 4 : 5;
  }
  window.Fuse = class extends window.Fuse {
    search(query, options) {
      const wanted = query.trim().toLowerCase();
      const hits = super.search(query, {});
      const ranks = new Map(hits.map((hit) => [hit, rank(hit.item, wanted)]));
      hits.sort((a, b) => ranks.get(a) - ranks.get(b)); // stable: ties stay
      return hits.slice(0, (options || {}).limit);
    }
  };
});

// the steps of a path can be ticked off, and the browser remembers
addEventListener("DOMContentLoaded", function () {
  const key = "kdbook-path";
  let done = {};
  try {
    done = JSON.parse(localStorage.getItem(key)) || {};
  } catch (e) {
    // storage is switched off: the ticks last as long as the page
  }
  document.querySelectorAll(".kd-path li").forEach(function (step) {
    const name = step.textContent.trim();
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = Boolean(done[name]);
    box.setAttribute("aria-label", "Read: " + name);
    box.addEventListener("change", function () {
      done[name] = box.checked;
      try {
        localStorage.setItem(key, JSON.stringify(done));
      } catch (e) {
        // as above
      }
    });
    step.prepend(box);
  });
});
